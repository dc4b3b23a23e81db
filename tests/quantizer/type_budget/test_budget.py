"""--target-bpw.

The knapsack is held against all possible choices, the costs against the KL itself. The command
writes a file that keeps the budget.
"""

import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.artifacts import edit
from tests.vlmq_export.test_cli import call, refused
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import bundled
from vlmq_export.errors import UsageError
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.hooks import before
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import TOWER, QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks
from vlmq_export.quantizer.type_budget import likeness
from vlmq_export.quantizer.type_budget.errors import errors_of, ratios_of
from vlmq_export.quantizer.type_budget.knapsack import choose
from vlmq_export.quantizer.type_budget.sensitivity import measured
from vlmq_export.quantizer.vision.stage import put_tower, solved_tower, tower_names

CPU = torch.device("cpu")
EMBEDDING = "model.embed_tokens"
LAYER = "model.layers.%d.%s"
pytestmark = pytest.mark.usefixtures("one_thread")
# matrix → type → (bits, cost)
BITS_AND_COST = st.tuples(st.integers(1, 30), st.floats(0, 100))
KINDS = st.dictionaries(st.sampled_from("PQRS"), BITS_AND_COST, min_size=1)
COSTS = st.dictionaries(st.sampled_from("abcd"), KINDS, min_size=1)


@settings(deadline=None, max_examples=200)
@given(COSTS, st.integers(1, 120))
def test_the_choice_fits_and_is_at_most_one_step_from_the_best(costs, budget):
    choices = [dict(zip(costs, kinds)) for kinds in product(*costs.values())]

    def total(choice, i):
        """The bits (0) or the cost (1) of a choice."""
        return sum(costs[n][k][i] for n, k in choice.items())

    fitting = [c for c in choices if total(c, 0) <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="raise it"):
            choose(costs, budget)
        return
    chosen = choose(costs, budget)
    assert total(chosen, 0) <= budget
    per_matrix = [[cost for _, cost in kinds.values()] for kinds in costs.values()]
    one_step = max(max(found) - min(found) for found in per_matrix)
    assert total(chosen, 1) <= min(total(c, 1) for c in fitting) + one_step + 1e-9
    everything = choose(costs, 10**6)
    assert total(everything, 1) == min(total(c, 1) for c in choices)


def test_bits_go_where_a_bit_gains_most():
    def kinds(weight):
        return {"Q2": (2, 16.0 * weight), "Q4": (4, 1.0 * weight), "Q8": (8, 0.0)}

    costs = {"small": kinds(1), "large": kinds(100)}
    assert choose(costs, 6) == {"small": "Q2", "large": "Q4"}
    assert choose(costs, 8) == {"small": "Q4", "large": "Q4"}
    assert choose(costs, 12) == {"small": "Q4", "large": "Q8"}


def test_a_step_that_is_large_is_not_left_out_for_small_ones_that_gain_a_little_more_per_bit():
    linears = {name: {2: (2, 0.081), 3: (3, 0.02), 4: (4, 0.0)} for name in "abcde"}
    tower = {"tower": {4: (8, 0.3), 8: (13, 0.0)}}
    chosen = choose(linears | tower, 5 * 2 + 8 + 9)
    assert chosen.pop("tower") == 8 and sorted(chosen.values()) == [2, 3, 3, 3, 3]


@pytest.fixture(scope="module")
def reference():
    """(model, samples) of the bundled reference VLM."""
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:64]]
    return load_model(Checkpoint(bundled.REFERENCE_VLM), CPU), samples


def costs_of(kinds, samples, config, **options):
    """The costs in the bundled reference VLM."""
    checkpoint = Checkpoint(bundled.REFERENCE_VLM)
    job = Job.of(checkpoint.architecture, config)
    return measured(StreamedModel(checkpoint, CPU), job, kinds, samples, **options)


@torch.no_grad()
def answers(model, samples):
    """Log-probabilities at the answer tokens, float64 [tokens, vocabulary]."""
    found = []
    for s in samples:
        log_p = model(**s.model_inputs(), use_cache=False).logits[0, :-1].double().log_softmax(-1)
        found.append(log_p[s.answer[1:]])
    return torch.cat(found)


def test_a_cost_is_the_kl_that_the_rounded_matrix_has(reference):
    """The embedding is only rounded, so that its change is known.

    Few tokens carry most of the KL, so the cost is a mean of three estimates.
    """
    model, samples = reference
    embedding, kinds = model.get_input_embeddings(), ["Q4_K", "Q6_K"]
    configs = [QuantConfig(seed=seed) for seed in range(3)]
    costs = [costs_of({EMBEDDING: kinds}, samples, c)[EMBEDDING] for c in configs]
    before, source = answers(model, samples[1::2]), embedding.weight.data.clone()
    for kind in kinds:
        embedding.weight.data = nearest_in_blocks(source, GRIDS[kind]).decode()
        after = answers(model, samples[1::2])
        embedding.weight.data = source
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        cost = sum(c[kind] for c in costs) / 3
        assert kl / 1.5 < cost < 1.5 * kl, (kind, kl, cost)


def test_the_costs_are_those_of_gradients_through_the_whole_model(reference):
    """Of every kind of matrix, against transformers' own model with all weights in memory.

    Damping takes the solver close to rounding, whose codes do not follow the last bits of sums.
    """
    model, samples = reference
    config = QuantConfig(damp=1e4)
    fitted, held = samples[:8:2], samples[1:8:2]
    kinds = {LAYER % (1, "self_attn.v_proj"): ["Q2_K", "Q4_K"]}
    kinds |= {LAYER % (1, "mlp.down_proj"): ["Q2_K", 3], EMBEDDING: ["Q4_K"]}
    costs = costs_of(kinds, samples[:8], config)
    family = Checkpoint(bundled.REFERENCE_VLM).architecture.family
    for name, tried in kinds.items():
        module = model.get_submodule(family.module_name(name))
        sums = None if name == EMBEDDING else inputs_of(model, module, fitted)
        errors = errors_of(module.weight, tried, sums, config)
        for kind in tried:
            slopes = [slope(model, module, errors[kind], s, i) for i, s in enumerate(held)]
            tokens = sum(int(s.answer[1:].sum()) for s in held)
            want = sum(s**2 for s in slopes) / 2 / tokens
            assert costs[name][kind] == pytest.approx(want, rel=2e-3), (name, kind)
        assert costs[name][tried[0]] > costs[name][tried[-1]] or len(tried) == 1


@torch.no_grad()
def inputs_of(model, module, samples):
    """The sums of what enters a linear, in the whole model."""
    sums = Statistics.empty(module.weight.shape[1], drift=False, device=CPU)
    with before(module, lambda args, _: sums.add(args[0].flatten(0, -2))):
        for sample in samples:
            model(**sample.model_inputs(), use_cache=False)
    return sums.to_float32()


def slope(model, module, error, sample, place):
    """⟨∂ (vᵀz) / ∂W, ΔW⟩ by autograd through the whole model."""
    weight = module.weight.requires_grad_(True)
    found = model(**sample.model_inputs(), use_cache=False).logits[0, :-1][sample.answer[1:]]
    (gradient,) = torch.autograd.grad((directions(found, place) * found).sum(), weight)
    weight.requires_grad_(False)
    return float((gradient.double() * error.double()).sum())


def directions(logits, place):
    """v of one sample, [answer tokens, vocabulary]."""
    p = logits.detach().softmax(-1)
    draws = torch.Generator().manual_seed(place)
    scattered = p.sqrt() * (torch.randint(2, p.shape, generator=draws) * 2 - 1)
    return scattered - p * scattered.sum(-1, keepdim=True)


@pytest.mark.parametrize("family", ["the reference", "qwen3_vl"])
def test_a_tower_costs_what_it_changes_in_the_answers(family, tiny):
    """At 8 bits the change is small enough for a slope. Qwen3-VL's features enter behind layers."""
    folder = bundled.REFERENCE_VLM if family == "the reference" else tiny(family)
    checkpoint, preprocessor = Checkpoint(folder), Preprocessor(folder)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:16]]
    job = Job.of(checkpoint.architecture, QuantConfig("gptq"))
    streamed = StreamedModel(checkpoint, CPU)
    costs = measured(streamed, job, {TOWER: [4, 8]}, samples)[TOWER]
    assert costs[4] > 20 * costs[8]
    held, eight = samples[1::2], replace(job, config=job.config.with_vision(8))
    names = tower_names(checkpoint)
    solved = solved_tower(streamed, names, samples[::2], eight, Shelf(CPU))
    model = load_model(checkpoint, CPU)
    before = [logits(model, sample) for sample in held]
    put_tower(model, [linear for linear, _ in solved], eight)
    moved = [
        float((directions(z, i) * (logits(model, sample) - z)).sum())
        for i, (z, sample) in enumerate(zip(before, held))
    ]
    want = sum(m**2 for m in moved) / 2 / sum(len(z) for z in before)
    assert costs[8] == pytest.approx(want, rel=0.05)


@torch.no_grad()
def logits(model, sample):
    """At the answer tokens of a sample."""
    return model(**sample.model_inputs(), use_cache=False).logits[0, :-1][sample.answer[1:]]


def test_an_embedding_of_eight_bits_costs_what_its_block_type_does(reference):
    """The grid of its integers has the same numbers."""
    _, samples = reference
    costs = costs_of({EMBEDDING: [8, 4, "Q8_0", "Q4_0"]}, samples[:4], QuantConfig())[EMBEDDING]
    assert (costs[8], costs[4]) == (costs["Q8_0"], costs["Q4_0"])


def test_activations_on_disk_give_the_same_costs(reference, tmp_path):
    _, samples = reference
    kinds = {LAYER % (2, "mlp.down_proj"): ["Q2_K", "Q5_0"]}
    plain = costs_of(kinds, samples[:4], QuantConfig())
    shelf = Shelf(CPU, "disk", tmp_path)
    assert costs_of(kinds, samples[:4], QuantConfig(), shelf=shelf) == plain
    assert next(shelf._numbers) > 8  # files were made, and are gone with what they held


def test_an_output_matrix_of_its_own_has_a_cost(tiny):
    checkpoint = Checkpoint(tiny("llava_onevision", tied=False))
    preprocessor = Preprocessor(checkpoint.path)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:4]]
    job = Job.of(checkpoint.architecture, QuantConfig())
    kinds = {job.family.head: ["Q4_0", "Q8_0"], job.family.embedding: ["Q8_0"]}
    costs = measured(StreamedModel(checkpoint, CPU), job, kinds, samples)
    assert costs[job.family.head]["Q4_0"] > 20 * costs[job.family.head]["Q8_0"] > 0
    assert costs[job.family.embedding]["Q8_0"] > 0


def test_a_lattice_costs_what_the_probes_say(reference):
    """It is solved on two of three matrices, and costs the others as much more than its K type."""
    _, samples = reference
    names = [LAYER % (i, "self_attn.v_proj") for i in range(3)]
    tried = (["IQ2_XXS", "IQ3_S", "Q2_K", "Q3_K"], ["Q2_K"], ["IQ2_XXS", "Q2_K"])
    kinds = dict(zip(names, tried))
    costs = costs_of(kinds, samples[:8], QuantConfig())
    assert {name: [*each] for name, each in costs.items()} == kinds
    first, _, last = (costs[name] for name in names)
    assert first["IQ2_XXS"] > first["Q2_K"] > first["IQ3_S"] > 0
    # The mean of both probes' ratios stands for either.
    assert first["IQ2_XXS"] / first["Q2_K"] == pytest.approx(last["IQ2_XXS"] / last["Q2_K"])


def test_ranges_and_descent_gain_nearly_the_same_on_every_linear(reference, monkeypatch):
    """So that widths of many bits need not be solved with them on each."""
    model, samples = reference
    family = Checkpoint(bundled.REFERENCE_VLM).architecture.family
    config, widths, found = QuantConfig(), [4, 8], []
    for part in ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        module = model.get_submodule(family.module_name(LAYER % (2, part)))
        sums = inputs_of(model, module, samples[:8])
        told = ratios_of(module.weight, [2, *widths], sums, config)
        quick = errors_of(module.weight, widths, sums, config)
        with monkeypatch.context() as patch:
            patch.setattr(likeness, "PLAIN", 9)
            whole = errors_of(module.weight, widths, sums, config)
        assert told == likeness.gains(whole, quick, sums.hessian)
        found.append(told)
    for bits in widths:
        gains = [each[bits] for each in found]
        assert min(gains) > 0.6 and max(gains) <= min(1.0, 1.5 * min(gains)), gains


def test_probes_are_spread_over_the_matrices():
    many = {str(i): ["IQ2_S", "Q2_K"] for i in range(42)} | {"e": ["IQ2_S", "Q2_K"], "v": ["IQ2_S"]}
    linears = {*many} - {"e"}
    assert likeness.probes(many, linears) == ["5", "15", "25", "35"]
    few = {"a": ["IQ2_S", "Q2_K"], "b": ["Q2_K"], "c": ["IQ2_S", "Q2_K"]}
    assert likeness.probes(few, {"a", "b", "c"}) == ["a", "c"]
    assert likeness.quick(["IQ2_S"]) == ["IQ2_S"]  # --tensor-type leaves no other


def test_the_ratio_is_the_mean_of_the_probes():
    kinds = {"a": ["IQ2_S", "Q2_K"], "b": ["Q2_K"], "c": ["IQ3_S", "Q3_K"]}
    costs = {"a": {"Q2_K": 3.0}, "b": {"Q2_K": 1.0}, "c": {"Q3_K": 5.0}}
    probes = [{"IQ2_S": 0.25}, {"IQ2_S": 4.0}, {"IQ2_S": 1.0}]
    full = likeness.completed(costs, kinds, probes, solved=costs)
    assert full["a"] == {"IQ2_S": pytest.approx(3.0), "Q2_K": 3.0}
    assert full["b"] == {"Q2_K": 1.0}
    assert full["c"] == {"IQ3_S": 5.0, "Q3_K": 5.0}  # no probe could tell
    widths = {"d": {2: 3.0, 4: 2.0}, "e": {4: 2.0}}
    probes = [{4: 0.5}, {4: 2.0}, {4: 8.0}]
    full = likeness.completed(widths, widths, probes, solved=["d"])
    assert full["d"] == {2: 3.0, 4: pytest.approx(4.0)}
    assert full["e"] == {4: 2.0}  # which is rounded, and was measured so


BUDGET = 4.2


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """An output folder that keeps a budget, and the flags that it was made with."""
    folder = tmp_path_factory.mktemp("begun")
    model, out = make_random_checkpoint(folder / "model", layers=3, depth=3), folder / "out"
    flags = [model, "--format", "gguf", "--method", "gptq", "--samples", 8, "--target-bpw", BUDGET]
    flags += ["--tensor-type", "attn_v=Q8_0", "--no-verify", "--quiet"]
    code, _, err = call(*flags, "--out", out)
    assert code == 0, err
    return out, flags


def written(out):
    """The matrices of the GGUF in an output folder, and their bits per weight."""
    tensors = GGUFFile(find_files(out / "gguf")[0]).tensors
    matrices = [t for t in tensors.values() if len(t.shape) == 2]
    bits = sum(8 * t.nbytes for t in matrices) / sum(t.shape[0] * t.shape[1] for t in matrices)
    return matrices, bits


def test_the_file_keeps_the_budget(begun, tmp_path):
    out, flags = begun
    matrices, bits = written(out)
    assert BUDGET - 0.05 < bits <= BUDGET
    assert {t.type for t in matrices if "attn_v" in t.name} == {"Q8_0"}
    assert all(TYPES[t.type].block > 1 for t in matrices)
    config = Artifact(out / "artifact").config
    assert config.gguf_type == "" and len(config.types) == len(matrices)
    assert f"{BUDGET} bits per weight" in (out / "README.md").read_text("utf-8")
    code, _, err = call(*flags, "--out", out, "--resume")
    assert code == 0, err
    again = ("--format", "gguf", "--gguf-type", "Q4_K_M", "--out", tmp_path / "x")
    assert "already" in refused(out / "artifact", *again, code=2)


@pytest.mark.slow
def test_a_budget_below_the_k_types_is_met_by_lattices(begun, tmp_path):
    _, flags = begun
    flags = [*flags[: flags.index(BUDGET)], 2.4, "--no-verify", "--quiet"]
    code, _, err = call(*flags, "--out", tmp_path / "out")
    assert code == 0, err
    matrices, bits = written(tmp_path / "out")
    assert 2.35 < bits <= 2.4
    assert {"IQ2_XXS"} < {t.type for t in matrices}


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: run.clear(),
        lambda run: run.update(config=3),
        lambda run: run["config"].update(types=["Q4_K"]),
        lambda run: run["config"]["types"].popitem(),
        lambda run: run["config"]["types"].update({next(iter(run["config"]["types"])): "Q9_K"}),
        lambda run: run["config"]["types"].update({next(iter(run["config"]["types"])): []}),
    ],
    ids=["empty", "no config", "a list", "one is missing", "one is unknown", "one is a list"],
)
def test_the_types_of_a_run_that_is_resumed_are_checked(begun, tmp_path, damage):
    """They are read before anything says whose the folder is."""
    out, flags = begun
    shutil.copytree(out, tmp_path / "out")
    edit(tmp_path / "out" / "artifact" / "run.json", damage)
    (tmp_path / "out" / "artifact" / "manifest.json").unlink()
    said = refused(*flags, "--out", tmp_path / "out", "--resume", code=1)
    assert "run.json: its types are not those of this recipe" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gguf-type", "Q4_K_M"), "exclude each other"),
        (("--bits", 3), "exclude each other"),
        (("--tensor-type", "a=Q4_K", "--format", "onnx"), "--target-bpw 3.5 chooses widths here"),
        (("--method", "rtn"), "--method rtn does not use"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(flags, said, tmp_path):
    given = ("--format", "gguf", "--target-bpw", 3.5, *flags)
    assert said in refused(*given, "--out", tmp_path / "o", code=2)
    assert not (tmp_path / "o").exists()


def test_a_budget_below_the_smallest_types_is_refused(tmp_path):
    said = refused("--format", "gguf", "--target-bpw", 2, "--out", tmp_path / "o", code=2)
    assert "--target-bpw" in said
    assert "1.039 times" in said
