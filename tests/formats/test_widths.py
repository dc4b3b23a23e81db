"""Mixed widths in the formats: names in patterns, stored bits, and what a reader refuses."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.artifacts import GRIDS, edit, mixed, rtn_artifact
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.errors import ArtifactError, FormatError
from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.in_transformers.read import named_linears
from vlmq_export.formats.in_transformers.widths import kept_patterns, width_patterns
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import BITS, QuantConfig
from vlmq_export.quantizer.model.families import FAMILIES, groups_of

SYMMETRIC = GRIDS["w4g128-sym"]
OPTIONS = FormatOptions(gptq_names="module")
# The plan of ONNX adds what its graphs take, for which it has an estimate.
FOLDERS = {"gptq": GptqFolder, "compressed-tensors": CompressedFolder}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("m") / "model", layers=5, depth=3)


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    return rtn_artifact(tmp_path_factory.mktemp("a") / "artifact", mixed(SYMMETRIC, model), model)


@pytest.fixture(scope="module")
def written(artifact, tmp_path_factory):
    """Format → the folder that it wrote."""
    found = {}
    for name in FORMATS:
        found[name] = tmp_path_factory.mktemp("out") / name
        found[name].mkdir()
        FORMATS[name].write(artifact, found[name], OPTIONS)
    return found


# --- expressions over names -----------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.data(), st.sampled_from(sorted(FAMILIES)), st.integers(1, 12))
def test_patterns_name_each_linear_once_and_no_other(data, model_type, layers):
    family = FAMILIES[model_type]
    chains = [data.draw(st.sampled_from(family.chains)) for _ in range(layers)]
    names = [f"{i}.{n}" for i, c in enumerate(chains) for group in groups_of(c) for n in group]
    widths = {n: data.draw(st.sampled_from(BITS)) for n in names}
    found = width_patterns({f"{family.layers}{n}": w for n, w in widths.items()}, family)
    assert set(found) == set(widths.values())
    for name in names:
        # The names on the hub, in transformers, and in vLLM.
        hub = f"{family.layers}{name}"
        for spelt in (hub, family.module_name(hub), f"language_model.model.layers.{name}"):
            matching = [w for w, ps in found.items() if any(re.match(p, spelt) for p in ps)]
            assert matching == [widths[name]], spelt
        read = [w for w, ps in found.items() if any(name in (named_linears(p) or ()) for p in ps)]
        assert read == [widths[name]]
    every = [p for patterns in found.values() for p in patterns]
    for tower in family.vision:
        other = f"{tower}encoder.layers.0.self_attn.q_proj"
        assert not any(re.match(p, other) for p in every)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_patterns_of_what_stays_float_name_no_linear_that_is_quantized(model_type):
    family = FAMILIES[model_type]
    patterns = [p.removeprefix("re:") for p in kept_patterns(family)]

    def named(name: str) -> bool:
        hub = f"{family.layers}1.{name}"
        spelt = (hub, family.module_name(hub), f"language_model.model.layers.1.{name}")
        (found,) = {any(re.match(p, one) for p in patterns) for one in spelt}
        return found

    for block in family.every_block:
        assert not any(map(named, (*block.ins, block.out, block.norm)))
        assert all(map(named, block.kept))
    assert named("linear_attn.in_proj_ba") == (model_type == "qwen3_5")  # as vLLM fuses them


def test_linears_that_programs_fuse_have_the_fused_name_too():
    family = FAMILIES["qwen2_vl"]
    names = [n for group in groups_of(family.blocks) for n in group]
    widths = {f"model.layers.{i}.{n}": 4 for i in (0, 1) for n in names}
    (patterns,) = width_patterns(widths, family).values()
    for fused in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert any(re.match(p, f"language_model.model.layers.1.{fused}") for p in patterns)
        assert not any(re.match(p, f"language_model.model.layers.2.{fused}") for p in patterns)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r".*",
        r".*model\.layers\.(0|1)\.self_attn\.(q_proj)",
        r".*model\.layers\.()\.self_attn\.(q_proj)$",
        r".*model\.layers\.(0|1)\.self_attn\.(.*)$",
        r".*model\.layers\.(99999999999)\.mlp\.(down_proj)$",
        7,
    ],
)
def test_expressions_of_another_form_are_not_run(pattern):
    assert named_linears(pattern) is None


# --- what is stored -------------------------------------------------------------------------------


def test_each_linear_is_stored_at_its_width(artifact, written):
    widths = artifact.config.widths
    assert {*widths.values()} == {*BITS}
    assert all(artifact.records[name].bits == bits for name, bits in widths.items())
    opened = {name: kind(written[name]) for name, kind in FOLDERS.items()}
    onnx, weights = OnnxFolder(written["onnx"]), Weights(artifact.path)
    for name, bits in widths.items():
        assert opened["gptq"].grid_of(opened["gptq"].stored_name(name)) == (bits, True)
        grid = opened["compressed-tensors"].grid_of(name)
        assert (grid.bits, grid.symmetric) == (bits, True)
        assert onnx.linear(name).bits == {3: 4}.get(bits, bits)
        for folder in opened.values():
            assert (folder.array(f"{name}.weight") == weights.array(f"{name}.weight")).all()


@pytest.mark.parametrize("name", [*FORMATS])
def test_the_plan_counts_each_linear_at_its_width(artifact, written, name):
    model = artifact_plan(artifact)
    planned = FORMATS[name].plan(model, OPTIONS)
    assert planned.refusals == []
    bits = sum(
        FORMATS[name].linear_bits(x, model.config.of(x.name), OPTIONS) for x in model.linears
    )
    assert planned.notes[0].startswith(
        f"mixed widths, {bits / sum(x.numel for x in model.linears):.3f} bits per weight: "
    )
    assert "8 linears at 2 bits" in planned.notes[0] or "linears at 2 bits, " in planned.notes[0]
    stored = sum(f.stat().st_size for f in written[name].rglob("*") if f.is_file())
    assert stored == pytest.approx(planned.size_bytes, rel=0.05)
    if name in FOLDERS:
        tensors = FOLDERS[name](written[name]).tensors.values()
        assert planned.size_bytes == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", [*FORMATS])
def test_linear_bits_are_all_that_a_width_changes(model, artifact, name):
    plan = artifact_plan(artifact)
    wide = replace(plan, config=replace(plan.config, widths=dict.fromkeys(plan.config.widths, 8)))
    sizes = [FORMATS[name].plan(each, OPTIONS).size_bytes for each in (plan, wide)]
    bits = [
        sum(FORMATS[name].linear_bits(x, p.config.of(x.name), OPTIONS) for x in p.linears)
        for p in (plan, wide)
    ]
    assert 8 * (sizes[1] - sizes[0]) == bits[1] - bits[0] > 0


def test_eight_bits_are_symmetric_where_fewer_are_not(model, tmp_path):
    config = mixed(GRIDS["w4g128"], model)
    assert {config.of(n).symmetric for n, w in config.widths.items() if w == 8} == {True}
    assert {config.of(n).symmetric for n, w in config.widths.items() if w < 8} == {False}
    made = rtn_artifact(tmp_path / "artifact", config, model)
    (tmp_path / "gptq").mkdir()
    FORMATS["gptq"].write(made, tmp_path / "gptq", OPTIONS)
    folder, weights = GptqFolder(tmp_path / "gptq"), Weights(made.path)
    for name, bits in config.widths.items():
        assert folder.grid_of(folder.stored_name(name)) == (bits, bits == 8)
        assert (folder.array(f"{name}.weight") == weights.array(f"{name}.weight")).all()


# --- what is refused ------------------------------------------------------------------------------


def test_what_no_loader_takes_is_refused(model, tmp_path):
    loose = rtn_artifact(tmp_path / "artifact", mixed(GRIDS["w4g128"], model), model)
    plan = artifact_plan(loose)
    (said,) = FORMATS["gptq"].plan(plan, FormatOptions()).refusals
    assert "add --gptq-names module" in said
    assert FORMATS["gptq"].plan(plan, OPTIONS).refusals == []


def test_a_family_that_no_loader_takes_is_refused(tiny, tmp_path):
    source = tiny("idefics3")
    made = rtn_artifact(tmp_path / "artifact", mixed(SYMMETRIC, source), source)
    said = FORMATS["gptq"].plan(artifact_plan(made), OPTIONS).refusals
    assert any(x.startswith("mixed widths") and "--bits" in x for x in said), said


@pytest.mark.parametrize(
    "widths",
    [[], 3, {"model.layers.0.mlp.up_proj": 5}, {"model.layers.0.mlp.up_proj": True}, {"x": 4}],
    ids=["a list", "a number", "five bits", "a flag", "no linear"],
)
def test_a_manifest_with_other_widths_is_refused(artifact, tmp_path, widths):
    import shutil

    shutil.copytree(artifact.path, tmp_path / "artifact")
    edit(tmp_path / "artifact" / "manifest.json", lambda m: m["config"].update(widths=widths))
    with pytest.raises(ArtifactError, match="widths that are no bits of its linears"):
        Artifact(tmp_path / "artifact")


def test_a_manifest_without_widths_has_no_key():
    assert "widths" not in QuantConfig().to_dict()
    assert QuantConfig(widths={"a": 3}).to_dict()["widths"] == {"a": 3}


def damaged(folder, tmp_path, change):
    """A copy whose quantization_config is changed."""
    import shutil

    shutil.copytree(folder, tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged" / "config.json").read_text("utf-8"))
    change(config["quantization_config"])
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config), "utf-8")
    return tmp_path / "damaged"


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q["dynamic"].update({"+:(a+)+$": {"bits": 4}}),
        lambda q: q["dynamic"].update({"-:.*": {}}),
        lambda q: q.update(dynamic=[1]),
        lambda q: q["dynamic"].update({next(iter(q["dynamic"])): {"bits": 5}}),
        lambda q: q["dynamic"].update({next(iter(q["dynamic"])): {"bits": 4, "group_size": 32}}),
    ],
    ids=["an evil expression", "an exclusion", "a list", "five bits", "another group"],
)
def test_rules_that_we_do_not_write_are_refused(written, tmp_path, change):
    with pytest.raises(FormatError, match="of dynamic is not readable here"):
        GptqFolder(damaged(written["gptq"], tmp_path, change))


@pytest.mark.parametrize("target", ["re:(a+)+$", "QKVParallelLinear", 3])
def test_targets_that_we_do_not_write_are_refused(written, tmp_path, target):
    def change(q):
        q["config_groups"]["group_0"]["targets"].append(target)

    with pytest.raises(FormatError, match="is not readable here"):
        CompressedFolder(damaged(written["compressed-tensors"], tmp_path, change))


def test_a_linear_that_no_group_names_is_refused(written, tmp_path):
    def change(q):
        q["config_groups"]["group_0"]["targets"].pop()

    folder = CompressedFolder(damaged(written["compressed-tensors"], tmp_path, change))
    with pytest.raises(FormatError, match="no config group is for"):
        [folder.array(name) for name in folder.weight_names()]
