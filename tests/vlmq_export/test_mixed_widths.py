"""--target-bpw with other formats than GGUF alone: a width for each group of linears, by cost."""

import re
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.artifacts import edit
from tests.vlmq_export.test_cli import call, refused
from tools.bench.widths import answers
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import Recipe, bundled
from vlmq_export.errors import UsageError
from vlmq_export.formats.contract import FORMATS
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.model_plan import artifact_plan, with_kinds
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.planning.mixed_widths import budget_of, by_linear, choices_of, planned_widths
from vlmq_export.planning.target_bpw import measured_costs
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.divergence import distance_of
from vlmq_export.quantizer.config import BITS, QuantConfig
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.type_budget.knapsack import choose
from vlmq_export.quantizer.type_budget.sensitivity import measured
from vlmq_export.recipes.recipe_file import load_recipe
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.locate import open_source

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--method", "gptq", "--samples", 8, "--no-verify", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("m") / "model", layers=3, depth=3)


def planned(model, *formats, **keys):
    """The plan of a run, without its time."""
    source = open_source(str(model))
    recipe = Recipe(model=str(model), format=[*formats], **keys)
    return source.plan(source.recipe_for(recipe, CalibrationRows(recipe)))


def taken(name, plan, recipe):
    """Bits per weight of the decoder's linears in a format."""
    options = recipe.format_options(plan.name)
    linears = [x for x in plan.linears if x.name in plan.config.widths]
    bits = sum(FORMATS[name].linear_bits(x, plan.config.of(x.name), options) for x in linears)
    return bits / sum(x.numel for x in linears)


# --- the choice -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(model):
    """(formats, sym) → what the choice is made from: the model's plan and the recipe."""

    def get(formats, sym):
        keys = {"target_bpw": 8.5, "sym": sym, "gptq_names": "module"}
        return planned(model, *formats, **keys).model, Recipe(format=[*formats], **keys)

    return get


FORMAT_SETS = st.sets(st.sampled_from([*FORMATS]), min_size=1).filter(lambda f: f != {"gguf"})


@settings(deadline=None, max_examples=60)
@given(
    FORMAT_SETS,
    st.booleans(),
    st.floats(1, 10),
    st.lists(st.floats(0, 1), min_size=48, max_size=48),
)
def test_the_choice_never_exceeds_the_budget_in_any_format(shapes, formats, sym, bpw, drawn):
    plan, recipe = shapes(sorted(formats), sym)
    recipe = recipe.model_copy(update={"target_bpw": bpw})
    choices = choices_of(plan, recipe)
    assert {len(group) for group in choices} == {1, 2, 3}
    try:
        budget = budget_of(plan, recipe, choices)
    except UsageError as e:
        least = float(re.findall(r"at least ([\d.]+) bits", str(e))[0])
        assert least > bpw
        budget_of(plan, recipe.model_copy(update={"target_bpw": least}), choices)
        return
    costs = iter(drawn)
    measured = {g: {w: (b, next(costs)) for w, b in ws.items()} for g, ws in choices.items()}
    chosen = with_kinds(plan, by_linear(choose(measured, budget)))
    for name in formats:
        assert taken(name, chosen, recipe) <= bpw
    for group in choices:
        assert len({chosen.config.widths[name] for name in group}) == 1


def test_linears_of_one_input_share_a_width(shapes):
    plan, recipe = shapes(["onnx"], False)
    ends = {tuple(n.rpartition(".")[2] for n in group) for group in choices_of(plan, recipe)}
    assert ends == {
        ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
    }  # fmt: skip


def test_three_bits_are_not_chosen_where_they_take_as_many_as_four(shapes):
    plan, recipe = shapes(["onnx"], False)
    bits = next(iter(choices_of(plan, recipe).values()))
    assert bits[2] < bits[3] == bits[4] < bits[8]
    for bpw in (3.0, 3.5, 4.1):
        chosen = planned_widths(plan, recipe.model_copy(update={"target_bpw": bpw}))
        assert 3 not in chosen.values()


def test_what_a_width_takes_is_its_codes_scales_and_zero_points(shapes):
    """bits + (16 + bits) / group_size, and a little for the order of GPTQ's columns."""
    for sym in (False, True):
        plan, recipe = shapes(["compressed-tensors", "onnx"], sym)
        linears = {x.name: x for x in plan.linears}
        size = plan.config.group_size
        for group, widths in choices_of(plan, recipe).items():
            weights = sum(linears[name].numel for name in group)
            for bits, found in widths.items():
                container = {3: 4}.get(bits, bits)  # of MatMulNBits
                formula = container + (16 + container) / size
                assert found / weights == pytest.approx(formula, rel=0.02)


# --- what it costs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples():
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:64]]


def test_fewer_bits_cost_more(samples):
    checkpoint, name = Checkpoint(bundled.REFERENCE_VLM), "model.layers.1.mlp.down_proj"
    job = Job.of(checkpoint.architecture, QuantConfig("gptq"))
    streamed = StreamedModel(checkpoint, torch.device("cpu"))
    costs = measured(streamed, job, {name: BITS}, samples[:16])[name]
    assert costs[2] > costs[3] > costs[4] > costs[8] > 0


def test_a_rotated_model_is_measured_rotated(samples):
    plain, turned = (
        planned(bundled.REFERENCE_VLM, "onnx", target_bpw=3, rotate=rotate).model
        for rotate in ("off", "folded")
    )
    name = next(iter(plain.config.widths))
    costs = [
        measured_costs(
            plan,
            Recipe(format=["onnx"], target_bpw=3, rotate=plan.config.rotate),
            {name: {2: 1}},
            Checkpoint(bundled.REFERENCE_VLM),
            samples[:8],
            10**9,
            lambda *_: None,
        )[name][2][1]
        for plan in (plain, turned)
    ]
    assert costs[0] != costs[1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2.29, 3.15])
def test_mixed_widths_are_closer_than_one_width_of_as_many_bits(bits, samples, tmp_path):
    """W2 in groups of 64, and W3 in groups of 128, beside 2, 3, 4 and 8 bits in groups of 128."""
    uniform = {2.29: ("--bits", 2, "--group-size", 64), 3.15: ("--bits", 3)}[bits]
    held = [Preprocessor(bundled.REFERENCE_VLM).sample(r) for r in read_rows(bundled.HELDOUT)[:64]]
    full = answers(load_model(Checkpoint(bundled.REFERENCE_VLM), torch.device("cpu")), held)
    names = ("--format", "gptq", "--gptq-names", "module")
    kl = []
    for flags in (uniform, ("--target-bpw", bits)):
        out = tmp_path / str(flags[0])
        given = (*names, *flags, "--samples", 64, "--no-verify", "--quiet", "--out", out)
        code, _, err = call(*given)
        assert code == 0, err
        whole = load_model(Checkpoint(bundled.REFERENCE_VLM), torch.device("cpu"))
        weights = dict(Weights(out / "artifact").items())
        family = Checkpoint(bundled.REFERENCE_VLM).architecture.family
        state = {family.module_name(n): torch.from_numpy(w) for n, w in weights.items()}
        whole.load_state_dict(state, strict=False)
        kl.append(float(distance_of(full, answers(whole, held)).kl.mean()))
    sizes = [(tmp_path / f / "gptq" / "model.safetensors") for f in (uniform[0], "--target-bpw")]
    assert sizes[1].stat().st_size < 1.001 * sizes[0].stat().st_size
    assert kl[1] <= kl[0], kl


# --- a run ----------------------------------------------------------------------------------------

BUDGET = 3.4


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    """An output folder that keeps a budget, and the flags that it was made with."""
    out = tmp_path_factory.mktemp("begun") / "out"
    flags = (model, "--format", "gptq,onnx", "--gptq-names", "module", *QUICK)
    flags = (*flags, "--target-bpw", BUDGET, "--head-bits", 4)
    flags = (*flags[:2], "onnx", *flags[3:])  # gptq holds no quantized head
    code, _, err = call(*flags, "--out", out)
    assert code == 0, err
    return out, flags


def test_the_files_keep_the_budget(begun):
    out, _ = begun
    artifact = Artifact(out / "artifact")
    counts = Counter(artifact.config.widths.values())
    assert len(counts) > 1 and sum(counts.values()) == 3 * 7
    assert artifact.config.head_bits == 4 and "lm_head" not in artifact.config.widths
    plan = artifact_plan(artifact)
    bits = taken("onnx", plan, Recipe(format=["onnx"]))
    assert BUDGET - 0.15 < bits <= BUDGET
    card = (out / "README.md").read_text("utf-8")
    spread = ", ".join(f"{n} to {w}" for w, n in sorted(counts.items()))
    assert f"to mixed widths ({spread} bits), chosen by measured cost for {BUDGET} bits" in card


def test_a_resumed_run_keeps_its_widths(begun, tmp_path):
    out, flags = begun
    shutil.copytree(out, tmp_path / "out")
    before = Artifact(out / "artifact").config.widths
    (tmp_path / "out" / "artifact" / "manifest.json").unlink()
    (tmp_path / "out" / "artifact" / "layer-00002.safetensors").unlink()
    code, _, err = call(*flags, "--out", tmp_path / "out", "--resume")
    assert code == 0, err
    again = Artifact(tmp_path / "out" / "artifact")
    assert again.config.widths == before
    for name in ("manifest.json", "layer-00002.safetensors"):
        files = [folder / "artifact" / name for folder in (out, tmp_path / "out")]
        assert files[0].read_bytes() == files[1].read_bytes()
    other = [4.5 if x == BUDGET else x for x in flags]
    said = refused(*other, "--out", tmp_path / "out", "--resume", code=2)
    assert f"target_bpw was {BUDGET}, now 4.5" in said


@pytest.mark.parametrize(
    "damage",
    [
        lambda config: config.pop("widths"),
        lambda config: config.update(widths=[4]),
        lambda config: config["widths"].popitem(),
        lambda config: config["widths"].update({next(iter(config["widths"])): 5}),
        lambda config: config["widths"].update({next(iter(config["widths"])): 4.0}),
        lambda config: config["widths"].update({next(iter(config["widths"])): [4]}),
    ],
    ids=["none", "a list", "one is missing", "five bits", "no whole number", "one is a list"],
)
def test_the_widths_of_a_run_that_is_resumed_are_checked(begun, tmp_path, damage):
    out, flags = begun
    shutil.copytree(out, tmp_path / "out")
    edit(tmp_path / "out" / "artifact" / "run.json", lambda run: damage(run["config"]))
    (tmp_path / "out" / "artifact" / "manifest.json").unlink()
    said = refused(*flags, "--out", tmp_path / "out", "--resume", code=1)
    assert "run.json: its widths are not those of this recipe" in said


def test_the_artifact_is_written_again_as_it_is(begun, tmp_path):
    out, _ = begun
    again = (out / "artifact", "--no-verify", "--quiet", "--format")
    code, _, err = call(*again, "onnx", "--out", tmp_path / "onnx", "--target-bpw", BUDGET)
    assert code == 0, err
    code, _, err = call(*again, "gguf", "--out", tmp_path / "gguf")
    assert code == 0, err
    assert "to mixed widths (" in (tmp_path / "gguf" / "README.md").read_text("utf-8")
    for flags in (("gguf", "--target-bpw", 4), ("gguf", "--gguf-type", "Q4_K_M")):
        said = refused(*again, *flags, "--out", tmp_path / "x", code=2)
        assert "the artifact has mixed widths already" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vlmq", "vlmq-paper", "vlm-ptq", "awq", "mbq", "auto"])
def test_every_calibrated_method_solves_each_linear_at_its_width(model, tmp_path, method):
    flags = (model, "--format", "onnx", "--method", method, "--samples", 16, "--no-verify")
    given = (*flags, "--target-bpw", 3.5, "--quiet", "--out", tmp_path / "o")
    code, _, err = call(*given)
    assert code == 0, err
    artifact = Artifact(tmp_path / "o" / "artifact")
    widths = artifact.config.widths
    assert len({*widths.values()}) > 1
    assert all(artifact.records[name].bits == bits for name, bits in widths.items())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--tune", 2), ("--rotate", "folded"), ("--embedding-bits", 8)])
def test_other_options_combine(model, tmp_path, flags):
    given = (model, "--format", "onnx", "--samples", 16, "--no-verify", "--quiet", *flags)
    code, _, err = call(*given, "--target-bpw", 3.5, "--out", tmp_path / "o")
    assert code == 0, err
    widths = Artifact(tmp_path / "o" / "artifact").config.widths
    assert len(widths) == 3 * 7 and len({*widths.values()}) > 1


# --- before any work ------------------------------------------------------------------------------


def test_the_dry_run_plans_widths_within_the_budget(model):
    found = planned(model, "onnx", "gguf", "compressed-tensors", target_bpw=5, sym=True)
    assert found.refusals == []
    assert all(plan.bits_per_weight <= 5.1 for plan in found.formats.values())
    flags = (model, "--format", "onnx", "--target-bpw", 3, "--dry-run")
    code, out, err = call(*flags)
    assert code == 0, err
    said = " ".join(out.split())
    assert re.search(r"mixed widths, 2\.\d+ bits per weight: \d+ linears at 2 bits", said)
    assert "on this machine with nothing else to do" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--bits", 3), "--bits and --target-bpw 3 exclude each other: the widths are chosen"),
        (("--gguf-type", "Q4_K_M"), "--gguf-type and --target-bpw exclude each other"),
        (("--target-size", 1), "--target-bpw and --target-size exclude each other"),
        (("--tensor-type", "a=Q8_0"), "--tensor-type names GGUF's block types"),
        (("--method", "rtn"), "--method rtn does not use"),
        (("--target-bpw", 2), "the linears take at least 2.153 bits per weight in onnx, scales"),
        (("--format", "gguf"), "the linears take at least 4.5 bits per weight in onnx and gguf"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(flags, said, tmp_path):
    given = ("--format", "onnx", "--target-bpw", 3, *flags)
    assert said in refused(*given, "--out", tmp_path / "o", code=2)
    assert said in refused(*given, "--dry-run", code=2)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--format", "gptq"), "add --gptq-names module"),
        (("--rotate", "online"), "--rotate online"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_too(flags, said, tmp_path):
    given = ("--format", "onnx", "--target-bpw", 3, *flags)
    assert said in refused(*given, "--out", tmp_path / "o", code=2)
    code, out, _ = call(*given, "--dry-run")
    assert code == 2 and said in " ".join(out.split()) and "has these" not in out
    assert not (tmp_path / "o").exists()


# --- a size ---------------------------------------------------------------------------------------


def least_of(model, *formats, **keys):
    """The size in GB that the refusal of a much too small one names."""
    with pytest.raises(UsageError, match=r"the files take at least [\d.]+ GB in ") as raised:
        planned(model, *formats, target_size=1e-4, **keys)
    return float(re.findall(r"at least ([\d.]+) GB", str(raised.value))[0])


@pytest.mark.parametrize("formats", [("gptq",), ("onnx",), ("compressed-tensors", "gguf", "onnx")])
def test_the_largest_planned_file_keeps_the_size(model, formats):
    keys = {"sym": "gguf" in formats, "gptq_names": "module"}
    least = least_of(model, *formats, **keys)
    for size in (least, 1.1 * least):
        found = planned(model, *formats, target_size=size, **keys)
        sizes = [plan.size_bytes for plan in found.formats.values()]
        assert found.refusals == [] and 0.9 * size * 1e9 < max(sizes) <= size * 1e9
    found = planned(model, *formats, target_size=1, **keys)
    assert {*found.model.config.widths.values()} == {8}
    assert any("every linear has these" in x for p in found.formats.values() for x in p.notes)


def test_what_is_written_keeps_the_size(model, tmp_path):
    size = 1.1 * least_of(model, "gptq", gptq_names="module")
    flags = (model, "--format", "gptq", "--gptq-names", "module", *QUICK, "--target-size", size)
    code, _, err = call(*flags, "--out", tmp_path / "o")
    assert code == 0, err
    tensors = GptqFolder(tmp_path / "o" / "gptq").tensors.values()
    stored = sum(t.nbytes for t in tensors)
    assert 0.95 * size * 1e9 < stored <= size * 1e9
    assert len({*Artifact(tmp_path / "o" / "artifact").config.widths.values()}) > 1


def test_the_recipe_comes_back_from_its_file(tmp_path):
    recipe = Recipe(format=["onnx"], target_bpw=2.7, sym=True, head_bits=4)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file, {}) == recipe
    assert recipe.widths_by_cost and not recipe.types_by_cost and recipe.block_types is None
    assert recipe.label() == "2.7bpwg128-sym-head4-vlmq" and recipe.grid == "2.7 bits per weight"
    alone = Recipe(format=["gguf"], target_bpw=2.7)
    assert alone.types_by_cost and not alone.widths_by_cost and alone.label() == "2.7bpw-vlmq"
