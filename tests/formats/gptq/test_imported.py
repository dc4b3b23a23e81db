"""Import of GPTQ checkpoints that other programs wrote.

The artifact holds the integers of the checkpoint, or the import is refused and the reason is named.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.artifacts import GRIDS, edit, rtn_artifact
from tests.formats.gptq.test_packing import slow_pack
from vlmq_export.errors import CheckpointError, UsageError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gptq.imports.checkpoint import GptqCheckpoint, write_artifact
from vlmq_export.formats.gptq.imports.scheme import quantization_of, scheme_of
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.pipeline import dry_run, run
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.recipes.recipe import Recipe

TENSORS = ("codes", "scales", "zero_points", "g_idx")  # of a solution


def exported(artifact: Artifact, folder: Path, **options) -> Path:
    folder.mkdir()
    FORMATS["gptq"].write(artifact, folder, FormatOptions(**options))
    return folder


def imported(folder: Path, out: Path) -> Artifact:
    write_artifact(GptqCheckpoint(folder), out, "m")
    return Artifact(out)


def assert_same(ours: Artifact, theirs: Artifact) -> None:
    assert ours.linear_names() == theirs.linear_names()
    assert sorted(ours.float_names()) == sorted(theirs.float_names())
    for a, b in zip(ours.linears(), theirs.linears(), strict=True):
        assert (a.bits, a.group_size, a.symmetric) == (b.bits, b.group_size, b.symmetric)
        parts = [(f, getattr(a.solution, f), getattr(b.solution, f)) for f in TENSORS]
        for part, x, y in (*parts, ("bias", a.bias, b.bias)):
            equal = x is y is None or (x.dtype == y.dtype and torch.equal(x, y))
            assert equal, f"{a.name}.{part}"
    for name in ours.float_names():
        x, y = ours.float_tensor(name), theirs.float_tensor(name)
        assert x.dtype == y.dtype and torch.equal(x, y), name
    assert ours.source_config == theirs.source_config
    assert {p.name for p in ours.source.iterdir()} == {p.name for p in theirs.source.iterdir()}


@pytest.mark.parametrize(
    ("arch", "tag", "options"),
    [
        ("qwen2_vl", "w4g128", {}),
        ("qwen2_vl", "w4g128-dynamic", {"gptq_version": "v2"}),
        ("qwen2_vl", "w3-sym", {"gptq_names": "module"}),
        ("qwen3_vl", "w3g128", {"shard_bytes": 400_000}),
        ("internvl", "w2g128", {"gptq_names": "module"}),
        ("llava_onevision", "w8g128", {}),
        ("qwen2_5_vl", "w4", {}),
    ],
)
def test_our_own_files_come_back_bit_for_bit(arch, tag, options, tiny, tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS[tag], tiny(arch))
    folder = exported(artifact, tmp_path / "gptq", **options)
    back = imported(folder, tmp_path / "back")
    assert_same(artifact, back)
    again = exported(back, tmp_path / "again", **options)
    # Only the tensors: from groups in natural order, the import cannot know the act_order that the
    # config names.
    for file in folder.glob("model*"):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    order = "dynamic" if tag == "w4g128-dynamic" else GRIDS[tag].act_order
    assert replace(back.config, act_order=order) == artifact.config
    assert back.config.act_order == ("dynamic" if tag == "w4g128-dynamic" else "gar")
    assert "vlmq-export" in back.manifest.calibration["imported"]


# --- compressed-tensors ---------------------------------------------------------------------------


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, L] → int32 [R, ⌈L·bits/32⌉], as pack_to_int32 of compressed-tensors defines it."""
    rows = []
    for row in values.tolist():
        padded = row + [0] * (-len(row) % 32)
        rows.append(slow_pack(padded, bits)[: -(-len(row) * bits // 32)])
    return torch.tensor(rows, dtype=torch.int64).int()


def as_compressed_tensors(artifact: Artifact, folder: Path, dtype=torch.float16) -> Path:
    """The artifact as llm-compressor would save it, in the format pack-quantized."""
    folder.mkdir()
    tensors = {n: artifact.float_tensor(n).clone() for n in artifact.float_names()}
    c, permuted = artifact.config, False
    for q in artifact.linears():
        tensors[f"{q.name}.weight_packed"] = pack_rows(q.solution.codes, q.bits)
        tensors[f"{q.name}.weight_scale"] = q.solution.scales.to(dtype)
        tensors[f"{q.name}.weight_shape"] = torch.tensor(q.solution.codes.shape)
        if not q.symmetric:
            zeros = pack_rows(q.solution.zero_points.T, q.bits)
            tensors[f"{q.name}.weight_zero_point"] = zeros.T.contiguous()
        if not q.solution.natural_order:
            permuted, tensors[f"{q.name}.weight_g_idx"] = True, q.solution.g_idx
        if q.bias is not None:
            tensors[f"{q.name}.bias"] = q.bias
    save_file(tensors, folder / "model.safetensors")
    for file in artifact.source.iterdir():
        shutil.copyfile(file, folder / file.name)
    weights = {
        "num_bits": c.bits,
        "type": "int",
        "symmetric": c.symmetric,
        "actorder": "group" if permuted else None,
        "strategy": "channel" if c.group_size == -1 else "group",
        "group_size": None if c.group_size == -1 else c.group_size,
    }
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
        "ignore": ["lm_head"],
    }
    edit(folder / "config.json", lambda config: config.update(quantization_config=scheme))
    return folder


@pytest.mark.parametrize("tag", ["w4g128", "w4g128-dynamic", "w3g128", "w3-sym", "w8g128"])
def test_what_llm_compressor_exports(tag, tiny, tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS[tag], tiny("internvl"))
    folder = as_compressed_tensors(artifact, tmp_path / "model")
    assert_same(artifact, imported(folder, tmp_path / "back"))


def test_scales_that_are_no_float16_are_refused(tiny, tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4"], tiny("internvl"))
    folder = as_compressed_tensors(artifact, tmp_path / "model", torch.bfloat16)
    # bfloat16's significand has eight bits and float16's eleven: these scales are converted exactly
    assert imported(folder, tmp_path / "back").linear_names()
    tensors = load_file(folder / "model.safetensors")
    name = artifact.linear_names()[3] + ".weight_scale"
    tensors[name] = tensors[name].float() + 1e-7
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="scales that float16 cannot hold"):
        imported(folder, tmp_path / "again")


# --- what others write ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory) -> Path:
    """A checkpoint as the forks of AutoGPTQ published them.

    Symmetric, GPTQ v1, few keys in the config, no g_idx, and a bias on every linear, of zeros where
    the model has none.
    """
    root = tmp_path_factory.mktemp("published")
    artifact = rtn_artifact(root / "artifact", GRIDS["w4g128-sym"], tiny("qwen2_vl"))
    folder = exported(artifact, root / "model")
    (folder / "quantize_config.json").unlink()
    few = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    few |= {"sym": True, "desc_act": False, "damp_percent": 0.1}
    edit(folder / "config.json", lambda c: c.update(quantization_config=few))
    tensors = load_file(folder / "model.safetensors")
    for q in artifact.linears():
        tensors.setdefault(f"{q.name}.bias", torch.zeros(q.out_features, dtype=torch.float16))
        del tensors[f"{q.name}.g_idx"]
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_biases_of_zeros_and_missing_g_idx(published, tmp_path):
    back = imported(published, tmp_path / "back")
    assert_same(Artifact(published.parent / "artifact"), back)
    assert back.config.damp == 0.1 and back.config.act_order == "off"


def change_tensor(name: str, change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value
        save_file(tensors, folder / "model.safetensors")

    return damage


def without(name: str):
    return change_tensor(name, lambda _: None)


def quantization(**values):
    def damage(folder: Path) -> None:
        edit(folder / "config.json", lambda c: c["quantization_config"].update(values))

    return damage


def without_layer_count(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.pop("num_hidden_layers"))


# Keys to the scheme in a quantization_config of compressed-tensors.
GROUP = ("config_groups", "group_0")
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
# case → what is done to the published folder, and what the refusal says
REFUSED = {
    "awq": (quantization(quant_method="awq"), "quantized by awq"),
    "marlin": (quantization(checkpoint_format="marlin"), "Marlin kernel"),
    "marlin flag": (quantization(is_marlin_format=True), "Marlin kernel"),
    "planar": (quantization(checkpoint_format="gptq_p"), "gptq_p is not gptq or gptq_v2"),
    "words": (quantization(pack_dtype="int16"), "packed in int16"),
    "mixed": (quantization(dynamic={"+:.*layers.1.*": {"bits": 8}}), "a grid of their own"),
    "head": (quantization(lm_head=True), "lm_head is quantized"),
    "bits": (quantization(bits=5), "bits 5"),
    "no bits": (quantization(bits=None), "bits None"),
    "bits of a float": (quantization(bits=4.0), "bits 4.0"),
    "group": (quantization(group_size="128"), "group_size 128 is not"),
    "a yes": (quantization(group_size=True), "group_size True is not"),
    "odd group": (quantization(group_size=96), "does not divide the 256 inputs"),
    "odd rules": (quantization(dynamic=[["+:x"]]), "a grid of their own"),
    "no layers": (without_layer_count, "model.layers.2.self_attn.q_proj"),
    "other group": (quantization(group_size=64), "its grid asks for"),
    "other version": (quantization(checkpoint_format="gptq_v2"), "v1 and v2 may be confused"),
    "a float linear": (without(f"{UP}.qweight"), "mlp.up_proj is not quantized"),
    "a tensor short": (without(NORM), "model.norm.weight is missing"),
    "no output matrix": (without("lm_head.weight"), "lm_head.weight is missing"),
    "no scales": (without(f"{UP}.scales"), "mlp.up_proj.scales is missing"),
    "a bias": (change_tensor(f"{UP}.bias", lambda b: b + 1), "the model has no such bias"),
    "a bias short": (without(Q_BIAS), "q_proj.bias is missing"),
    "words cut": (
        change_tensor(f"{UP}.qweight", lambda w: w[1:].clone()),
        "its grid asks for int32",
    ),
    "scales cut": (change_tensor(f"{UP}.scales", lambda s: s[1:].clone()), "do not fit its shape"),
    "scales not finite": (change_tensor(f"{UP}.scales", lambda s: s / 0), "NaN or infinite"),
    "zero of v1": (change_tensor(f"{UP}.qzeros", lambda z: z | 15), "save it as gptq_v2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case, published, tmp_path):
    damage, says = REFUSED[case]
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    damage(folder)
    with pytest.raises(CheckpointError) as e:
        imported(folder, tmp_path / "back")
    assert says in str(e.value) and "\n" not in str(e.value)


def test_uneven_groups_are_refused(published, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.g_idx"] = (torch.arange(256) >= 100).int()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="each of 2 groups 128 columns"):
        imported(folder, tmp_path / "back")


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        ((), {"format": "marlin-24"}, "marlin-24"),
        (("config_groups",), {"group_1": {"weights": {}}}, "2 config_groups"),
        (GROUP, {"input_activations": {"num_bits": 8}}, "input activations"),
        ((*GROUP, "weights"), {"type": "float"}, "type float"),
        ((*GROUP, "weights"), {"strategy": "tensor_group"}, "tensor_group"),
        ((), {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ],
)
def test_other_schemes_of_compressed_tensors_are_refused(place, change, says, tiny, tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4"], tiny("internvl"))
    folder = as_compressed_tensors(artifact, tmp_path / "model")

    def apply(config: dict) -> None:
        part = config["quantization_config"]
        for key in place:
            part = part[key]
        part.update(change)

    edit(folder / "config.json", apply)
    with pytest.raises(CheckpointError, match=says):
        GptqCheckpoint(folder)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS | st.sampled_from([4, 128, -1, "gptq"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    "bits", "group_size", "sym", "checkpoint_format", "format", "is_marlin_format", "pack_dtype",
    "dynamic", "lm_head", "meta", "config_groups", "kv_cache_scheme", "transform_config",
    "damp_percent",
)  # fmt: skip
WEIGHTS = st.dictionaries(
    st.sampled_from(["num_bits", "type", "symmetric", "strategy", "group_size", "actorder"]), JSON
)
GROUPS = st.fixed_dictionaries({"group_0": st.fixed_dictionaries({"weights": WEIGHTS})})


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON),
    st.sampled_from(["gptq", "compressed-tensors", None, 3]),
    GROUPS | JSON,
)
def test_any_quantization_config_is_a_scheme_or_one_line(q, method, groups):
    try:
        scheme = scheme_of({**q, "quant_method": method, "config_groups": groups}, Path("model"))
    except CheckpointError as e:
        assert str(e).startswith("model: ")
    else:
        assert scheme.bits in (2, 3, 4, 8) and scheme.maker
        assert scheme.group_size == -1 or scheme.group_size > 0


def test_a_float_checkpoint_is_none(tiny):
    assert quantization_of(tiny("qwen2_vl")) is None
    with pytest.raises(CheckpointError, match="float checkpoint"):
        GptqCheckpoint(tiny("qwen2_vl"))


# --- as MODEL -------------------------------------------------------------------------------------


def test_it_can_be_the_model(published, tmp_path):
    formats, out = ["gptq", "gguf", "onnx"], tmp_path / "out"
    recipe = Recipe(model=str(published), format=formats, verify=False, out=out)
    planned = dry_run(recipe)
    assert planned.refusals == [] and planned.model.config.symmetric
    run(recipe)
    artifact = Artifact(out / "artifact")
    assert_same(Artifact(published.parent / "artifact"), artifact)
    weights = Weights(artifact.path, published)  # the float tensors are read from the model
    assert np.isfinite(weights.array(NORM)).all()
    assert FORMATS["gptq"].inspect(out / "gptq").metadata["bits"] == "4"
    config = json.loads((out / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["sym"] is True


def test_flags_that_ask_for_another_grid_are_refused(published, tmp_path):
    out = tmp_path / "out"
    for flag in ({"bits": 3}, {"group_size": 64}, {"sym": False}, {"act_order": "dynamic"}):
        with pytest.raises(UsageError, match="the checkpoint has"):
            run(Recipe(model=str(published), format=["gptq"], verify=False, out=out, **flag))
    assert not out.exists()


@pytest.mark.parametrize("flag", [{"gguf_type": "Q4_K_M"}, {"target_bpw": 4.0}, {"target_size": 1}])
def test_flags_that_would_round_again_are_refused(published, tmp_path, flag):
    recipe = Recipe(model=str(published), format=["gguf"], out=tmp_path / "out", **flag)
    with pytest.raises(UsageError, match="the checkpoint has its integers already"):
        run(recipe)
    assert not (tmp_path / "out").exists()


def test_permuted_groups_are_refused_for_gguf_before_anything_is_written(tiny, tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128-dynamic"], tiny("qwen2_vl"))
    folder = exported(artifact, tmp_path / "model")
    with pytest.raises(UsageError, match="GGUF has no g_idx"):
        run(Recipe(model=str(folder), format=["gguf"], verify=False, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
