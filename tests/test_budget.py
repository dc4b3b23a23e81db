"""--target-bpw: the knapsack against every choice there is, the costs against KL itself, and what the command makes of it."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_cli import call, refused
from vlmq_export import bundled
from vlmq_export.errors import UsageError
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.budget import choose, measured
from vlmq_export.quantizer.calibration import Preprocessor, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.kquants import GRIDS
from vlmq_export.quantizer.model import load_model
from vlmq_export.quantizer.solver import nearest_in_blocks

pytestmark = pytest.mark.usefixtures("one_thread")
COSTS = st.dictionaries(
    st.sampled_from("abcd"),
    st.dictionaries(st.sampled_from("PQRS"), st.tuples(st.integers(1, 30), st.floats(0, 100)), min_size=1),
    min_size=1,
)


@settings(deadline=None, max_examples=200)
@given(COSTS, st.integers(1, 120))
def test_the_choice_fits_and_is_at_most_one_step_from_the_best(costs, budget):
    choices = [dict(zip(costs, kinds)) for kinds in product(*costs.values())]

    def total(choice, i):
        return sum(costs[n][k][i] for n, k in choice.items())

    fitting = [c for c in choices if total(c, 0) <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="raise it"):
            choose(costs, budget)
        return
    chosen = choose(costs, budget)
    assert total(chosen, 0) <= budget
    one_step = max(max(c for _, c in kinds.values()) - min(c for _, c in kinds.values()) for kinds in costs.values())
    assert total(chosen, 1) <= min(total(c, 1) for c in fitting) + one_step + 1e-9
    everything = choose(costs, 10**6)
    assert total(everything, 1) == min(total(c, 1) for c in choices)


def test_bits_go_where_a_bit_gains_most():
    costs = {n: {"Q2": (2, 16.0 * w), "Q4": (4, 1.0 * w), "Q8": (8, 0.0)} for n, w in (("small", 1), ("large", 100))}
    assert choose(costs, 6) == {"small": "Q2", "large": "Q4"}
    assert choose(costs, 8) == {"small": "Q4", "large": "Q4"}
    assert choose(costs, 12) == {"small": "Q4", "large": "Q8"}


@pytest.fixture(scope="module")
def reference():
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:64]]
    return load_model(Checkpoint(bundled.REFERENCE_VLM), torch.device("cpu")), samples


@torch.no_grad()
def answers(model, samples):
    found = []
    for s in samples:
        log_p = model(**s.model_inputs(), use_cache=False).logits[0, :-1].double().log_softmax(-1)
        found.append(log_p[s.answer[1:]])
    return torch.cat(found)


def test_a_cost_is_the_kl_that_the_rounded_matrix_has(reference):
    """The embedding is only rounded, so the change is known here. Few tokens carry the KL: a mean of three estimates."""
    model, samples = reference
    embedding, kinds = model.get_input_embeddings(), ["Q4_K", "Q6_K"]
    costs = [
        measured(model, {"e": embedding}, {"e": kinds}, (), samples, QuantConfig(seed=seed))["e"] for seed in range(3)
    ]
    before, source = answers(model, samples[1::2]), embedding.weight.data.clone()
    for kind in kinds:
        embedding.weight.data = nearest_in_blocks(source, GRIDS[kind]).decode()
        after = answers(model, samples[1::2])
        embedding.weight.data = source
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        cost = sum(c[kind] for c in costs) / 3
        assert kl / 1.5 < cost < 1.5 * kl, (kind, kl, cost)
    assert not any(p.requires_grad for p in model.parameters())


def test_parts_of_the_matrices_measure_the_same(reference):
    model, samples = reference
    layer = model.model.language_model.layers[1]
    modules = {"v": layer.self_attn.v_proj, "down": layer.mlp.down_proj}
    kinds = {"v": ["Q2_K", "Q4_K"], "down": ["Q2_K", "Q5_0"]}
    whole = measured(model, modules, kinds, modules, samples[:8], QuantConfig())
    parts = measured(model, modules, kinds, modules, samples[:8], QuantConfig(), memory=1)
    assert whole.keys() == parts.keys() and whole["v"]["Q2_K"] > whole["v"]["Q4_K"] > 0
    for name, kind in (("v", "Q2_K"), ("v", "Q4_K"), ("down", "Q2_K"), ("down", "Q5_0")):
        assert whole[name][kind] == pytest.approx(parts[name][kind], rel=1e-4)
    rounded = measured(model, modules, kinds, (), samples[:8], QuantConfig())
    assert rounded["down"]["Q2_K"] > whole["down"]["Q2_K"]  # the solver is worth its while


def test_the_file_keeps_the_budget(tmp_path):
    out, target = tmp_path / "out", 3.4
    flags = ("--format", "gguf", "--method", "gptq", "--samples", 8, "--target-bpw", target, "--no-verify", "--quiet")
    override = ("--tensor-type", "attn_v=Q8_0", "--out", out)
    code, _, err = call(*flags, *override)
    assert code == 0, err
    tensors = GGUFFile(find_files(out / "gguf")[0]).tensors
    matrices = [t for t in tensors.values() if len(t.shape) == 2]
    bits = sum(8 * t.nbytes for t in matrices) / sum(t.shape[0] * t.shape[1] for t in matrices)
    assert target - 0.05 < bits <= target
    assert {t.type for t in matrices if "attn_v" in t.name} == {"Q8_0"}
    assert all(TYPES[t.type].block > 1 for t in matrices)
    config = Artifact(out / "artifact").config
    assert config.gguf_type == "" and len(config.types) == len(matrices)
    assert "3.4 bits per weight" in (out / "README.md").read_text("utf-8")
    code, _, err = call(*flags, *override, "--resume")
    assert code == 0, err
    assert "already" in refused(
        out / "artifact", "--format", "gguf", "--gguf-type", "Q4_K_M", "--out", tmp_path / "x", code=2
    )


@pytest.mark.parametrize("flags, said", [
    (("--gguf-type", "Q4_K_M"), "exclude each other"),
    (("--bits", 3), "exclude each other"),
    (("--format", "gptq"), "only GGUF holds these integers"),
    (("--method", "rtn"), "--method rtn does not use"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(flags, said, tmp_path):
    assert said in refused("--format", "gguf", "--target-bpw", 3.5, *flags, "--out", tmp_path / "o", code=2)
    assert not (tmp_path / "o").exists()


def test_a_budget_below_the_smallest_types_is_refused(tmp_path):
    said = refused("--format", "gguf", "--target-bpw", 2, "--out", tmp_path / "o", code=2)
    assert "--target-bpw" in said and "1.312 times" in said
