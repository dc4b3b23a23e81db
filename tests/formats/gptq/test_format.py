"""GPTQ folders, checked without a GPTQ runtime.

The bytes, names and shards that are written, what `write` and `plan` refuse, and the errors of the
reader on damaged folders.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.formats.gptq.test_packing import slow_pack
from vlmq_export.errors import ArtifactError, FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gptq import requirements
from vlmq_export.formats.gptq.inspect import inspect
from vlmq_export.formats.gptq.plan import plan
from vlmq_export.formats.gptq.proof import autogptq
from vlmq_export.formats.gptq.read import GptqFolder, read
from vlmq_export.formats.gptq.write import write
from vlmq_export.formats.in_transformers.proof.rows import own_decoder
from vlmq_export.formats.model_plan import LinearSpec, ModelPlan, TensorSpec, artifact_plan
from vlmq_export.formats.proof.checks import Check, CheckSettings, compare_weights
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.manifest import SCHEMA, Manifest, ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.artifact.write import write_layer, write_manifest
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.model.architecture import Architecture

LAYERS, OUT, IN = 3, 64, 96
OPTIONS = FormatOptions()


def random_linear(name, quant, rng, *, permuted, low) -> QuantizedLinear:
    """Random codes. Zero-points are drawn from `low` up; a symmetric grid has its own."""
    bits, groups = quant.bits, quant.groups(IN)
    g_idx = torch.arange(IN, dtype=torch.int32) // quant.group_columns(IN)
    zeros = torch.randint(low, 2**bits, (OUT, groups), generator=rng, dtype=torch.uint8)
    solution = Solution(
        torch.randint(0, 2**bits, (OUT, IN), generator=rng, dtype=torch.uint8),
        (torch.rand(OUT, groups, generator=rng) + 0.01).half(),
        torch.full_like(zeros, 2 ** (bits - 1)) if quant.symmetric else zeros,
        g_idx[torch.randperm(IN, generator=rng)] if permuted else g_idx,
    )
    bias = torch.randn(OUT, generator=rng).half() if name.endswith("q_proj") else None
    return QuantizedLinear(name, solution, bias, bits, quant.group_size, quant.symmetric)


def make_artifact(
    folder: Path, bits=4, group_size=32, symmetric=False, permuted=False, low=1
) -> Artifact:
    """A small artifact with the tensor names of a Qwen2.5-VL.

    The float tensors have odd shapes and several dtypes.
    """
    (folder / "source").mkdir(parents=True)
    config = {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "ünusual": {"kept": 1e-06},
    }
    (folder / "source" / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "source" / "tokenizer.json").write_text('{"as": "it is"}', "utf-8")
    rng = torch.Generator().manual_seed(bits)
    order = "dynamic" if permuted else "off"
    quant = QuantConfig("rtn", bits, group_size, symmetric=symmetric, act_order=order)
    records = []
    for i in range(LAYERS):
        names = [f"model.layers.{i}.{kind}" for kind in ("self_attn.q_proj", "mlp.down_proj")]
        linears = [random_linear(n, quant, rng, permuted=permuted, low=low) for n in names]
        own = [ModuleRecord.of(linear, i, {}) for linear in linears]
        write_layer(folder, i, linears, own)
        records += own
    floats = {
        "model.embed_tokens.weight": torch.randn(5, 7, generator=rng).bfloat16(),
        "model.norm.weight": torch.randn(7, generator=rng),
        "visual.patch_embed.proj.weight": torch.randn(3, 1, 5, generator=rng).bfloat16(),
        "lm_head.weight": torch.randn(5, 7, generator=rng).half(),
    }
    save_file(floats, folder / "float-00001.safetensors")
    manifest = Manifest(SCHEMA, "0", "tiny", "qwen2_5_vl", {}, quant.to_dict(), {}, records)
    write_manifest(folder, manifest)
    return Artifact(folder)


def written(tmp_path: Path, options: FormatOptions = OPTIONS, **kw) -> tuple[Artifact, Path]:
    artifact = make_artifact(tmp_path / "artifact", **kw)
    folder = tmp_path / "gptq"
    folder.mkdir()
    write(artifact, folder, options)
    return artifact, folder


def compared(artifact: Artifact, folder: Path) -> Check:
    """The weights that our reader decodes from `folder`, compared with those of the artifact."""
    weights, opened = Weights(artifact.path), GptqFolder(folder)
    return compare_weights("gptq", "own", weights.items(), opened.array, count=weights.count)


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")


# --- write and read back --------------------------------------------------------------------------

GRIDS = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": -1},
    {"bits": 4, "group_size": 32, "permuted": True},
    {"bits": 3, "group_size": 32},
    {"bits": 3, "group_size": -1, "symmetric": True},
    {"bits": 3, "group_size": 16, "permuted": True},
    {"bits": 2, "group_size": 32},
    {"bits": 2, "group_size": -1},
    {"bits": 8, "group_size": 32, "symmetric": True},
    {"bits": 8, "group_size": -1},
]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_round_trip(tmp_path, grid, version):
    artifact, folder = written(tmp_path, replace(OPTIONS, gptq_version=version), **grid)
    row = compared(artifact, folder)
    # per layer two weights and a bias, and the four float tensors
    count = LAYERS * (2 * OUT * IN + OUT) + 35 + 7 + 15 + 35
    assert (row.status, row.compared) == ("passed", count)
    names = set(Weights(artifact.path).names())
    assert set(GptqFolder(folder).weight_names()) == names == set(read(folder))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stored_tensors_by_the_slow_oracle(tmp_path, bits):
    artifact, folder = written(tmp_path, bits=bits, permuted=True)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    solution = artifact.linear(name).solution
    stored = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    for n in (0, 31, OUT - 1):
        assert stored["qweight"][:, n].tolist() == slow_pack(solution.codes[n].tolist(), bits)
    for g in range(IN // 32):
        one_less = [z - 1 for z in solution.zero_points[:, g].tolist()]  # as v1 stores zero-points
        assert stored["qzeros"][g].tolist() == slow_pack(one_less, bits)
    assert torch.equal(stored["scales"], solution.scales.T)
    assert stored["scales"].dtype == torch.float16
    assert torch.equal(stored["g_idx"], solution.g_idx)
    assert stored["g_idx"].dtype == torch.int32
    assert f"{name}.bias" not in tensors
    assert tensors["model.layers.1.self_attn.q_proj.bias"].dtype == torch.float16


def test_folder_is_the_source_plus_quantization(tmp_path):
    artifact, folder = written(tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    quantization = config.pop("quantization_config")
    assert config == artifact.source_config and list(config) == list(artifact.source_config)
    assert json.loads((folder / "quantize_config.json").read_text("utf-8")) == quantization
    assert quantization["checkpoint_format"] == "gptq" and quantization["desc_act"] is False
    assert "gptqmodel:7.7.0" in quantization["meta"]["quantizer"]
    tokenizer = (artifact.source / "tokenizer.json").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == tokenizer
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {"0o644"}
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "quantize_config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    tensors = load_file(folder / "model.safetensors")
    for name in artifact.float_names():
        want = artifact.float_tensor(name)
        assert tensors[name].dtype == want.dtype and torch.equal(tensors[name], want)
    with safe_open(folder / "model.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_same_artifact_same_bytes(tmp_path):
    artifact, folder = written(tmp_path, permuted=True)
    again = tmp_path / "again"
    again.mkdir()
    write(artifact, again, OPTIONS)
    one, other = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (folder, again))
    assert one == other


@pytest.mark.parametrize(("group_size", "permuted"), [(32, True), (-1, False)])
def test_desc_act_says_that_g_idx_is_permuted(tmp_path, group_size, permuted):
    """With one group there is nothing to permute, whatever the order of the column loop was."""
    _, folder = written(tmp_path, permuted=True, group_size=group_size)
    assert GptqFolder(folder).quantization["desc_act"] is permuted


def test_module_names(tmp_path):
    artifact, folder = written(tmp_path, replace(OPTIONS, gptq_names="module"))
    names = set(load_file(folder / "model.safetensors"))
    assert "model.language_model.layers.0.self_attn.q_proj.qweight" in names
    assert {
        "model.visual.patch_embed.proj.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
    } <= names
    assert compared(artifact, folder).status == "passed"
    assert set(GptqFolder(folder).weight_names()) == set(Weights(artifact.path).names())


@pytest.mark.parametrize("names", ["hub", "module"])
def test_shards(tmp_path, names):
    options = replace(OPTIONS, shard_bytes=10_000, gptq_names=names)
    artifact, folder = written(tmp_path, options)
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    tensors = {name: t for shard in shards for name, t in load_file(shard).items()}
    assert len(shards) > 2 and set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert not (folder / "model.safetensors").exists()
    assert compared(artifact, folder).status == "passed"


# --- refusals -------------------------------------------------------------------------------------


def rewrite(artifact: Artifact, **parts) -> Artifact:
    """The artifact with the first layer's down_proj changed."""
    names = [m.name for m in artifact.manifest.modules if m.layer == 0]
    linears = [artifact.linear(n) for n in names]
    solution = linears[1].solution
    changed = {k: change(getattr(solution, k).clone()) for k, change in parts.items()}
    linears[1] = replace(linears[1], solution=replace(solution, **changed))
    write_layer(artifact.path, 0, linears, [artifact.records[n] for n in names])
    return Artifact(artifact.path)


def put(value, at=(0, 0)):
    def change(tensor):
        tensor[at] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("grid", "parts", "message"),
    [
        ({}, {"zero_points": put(0)}, "zero-point of 0"),
        ({}, {"zero_points": put(16)}, "zero-points over 15"),
        ({}, {"codes": put(16)}, "codes over 15"),
        ({}, {"scales": put(float("nan"))}, "not finite"),
        ({}, {"g_idx": put(3, 0)}, "g_idx entries outside 0..2"),
        ({"symmetric": True}, {"zero_points": put(7)}, "other than the symmetric 8"),
    ],
)
def test_a_damaged_artifact_is_not_written(tmp_path, grid, parts, message):
    artifact = rewrite(make_artifact(tmp_path / "artifact", **grid), **parts)
    folder = tmp_path / "gptq"
    folder.mkdir()
    with pytest.raises((ArtifactError, FormatError), match=message) as error:
        write(artifact, folder, OPTIONS)
    assert "model.layers.0.mlp.down_proj" in str(error.value) and "\n" not in str(error.value)
    assert not list(folder.iterdir())


def test_zero_point_of_zero_is_fine_in_v2(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", low=0)
    (tmp_path / "gptq").mkdir()
    write(artifact, tmp_path / "gptq", replace(OPTIONS, gptq_version="v2"))
    assert compared(artifact, tmp_path / "gptq").status == "passed"


def model_plan(config: QuantConfig, shape=(128, 256)) -> ModelPlan:
    linears = [LinearSpec("model.layers.0.mlp.down_proj", *shape, True)]
    floats = [TensorSpec("model.norm.weight", (256,), "BF16")]
    architecture = Architecture.of({"model_type": "qwen2_vl"})
    return ModelPlan("m", architecture, linears, floats, config, Path("m"))


@pytest.mark.parametrize(
    ("config", "shape", "options", "word"),
    [
        ({"bits": 5}, (128, 256), {}, "--bits 5"),
        ({"group_size": 48}, (128, 96), {}, "--group-size 48"),
        ({"group_size": 2048}, (128, 4096), {}, "--group-size 2048"),
        ({"group_size": 128}, (128, 192), {}, "does not divide in_features 192"),
        ({"group_size": -1}, (100, 256), {}, "out_features 100"),
        ({"group_size": -1}, (128, 250), {}, "in_features 250"),
        ({}, (128, 256), {"gptq_version": "v3"}, "--gptq-version v3"),
        ({}, (128, 256), {"gptq_names": "onnx"}, "--gptq-names onnx"),
    ],
)
def test_plan_refuses(config, shape, options, word):
    refusals = plan(model_plan(QuantConfig(**config), shape), replace(OPTIONS, **options)).refusals
    assert len(refusals) == 1 and word in refusals[0] and "\n" not in refusals[0]


def test_plan_counts_what_is_written(tmp_path):
    artifact, folder = written(tmp_path, bits=3)
    m, floats = artifact.manifest, [TensorSpec(*i) for i in artifact.float_info()]
    described = replace(artifact_plan(artifact), linears=m.modules, floats=floats)
    planned = plan(described, OPTIONS)
    data = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert planned.size_bytes == data
    # A weight costs 3 bits of its own, 1/32 of its group's scale (16 bits) and zero-point (3 bits),
    # and 1/OUT of its column's g_idx (32 bits).
    assert planned.bits_per_weight == pytest.approx(3 + 19 / 32 + 32 / OUT)
    assert inspect(folder).bits_per_weight == pytest.approx(planned.bits_per_weight)


def test_plan_names_dropped_fast_paths():
    def notes(config: QuantConfig, **options) -> list[str]:
        return plan(model_plan(config), replace(OPTIONS, **options)).notes

    fast = " ".join(notes(QuantConfig(symmetric=True, act_order="off"), gptq_names="module"))
    assert "kernel" not in fast and "gptq_torch" not in fast
    slow = " ".join(notes(QuantConfig(group_size=-1, act_order="dynamic"), gptq_version="v2"))
    assert (
        "vLLM" in slow
        and "zero-points (--sym)" in slow
        and "gptq_torch" in slow
        and "gptq_v2" in slow
    )
    assert "g_idx" not in slow
    assert "g_idx" in " ".join(notes(QuantConfig(act_order="dynamic")))


# --- reader on damaged folders --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("version", "label"), [("v1", "gptq_v2"), ("v2", "gptq")])
def test_mislabelled_symmetric_file(tmp_path, bits, version, label):
    _, folder = written(tmp_path, replace(OPTIONS, gptq_version=version), bits=bits, symmetric=True)
    config = folder / "config.json"
    edit_json(config, lambda c: c["quantization_config"].update(checkpoint_format=label))
    with pytest.raises(FormatError, match=f"are those of {version}"):
        read(folder)


def test_shard_outside_the_folder_is_not_read(tmp_path):
    _, folder = written(tmp_path, replace(OPTIONS, shard_bytes=10_000))
    outside = tmp_path / "elsewhere.safetensors"
    index = folder / "model.safetensors.index.json"
    before = index.read_text("utf-8")
    first = next(iter(sorted(folder.glob("model-*.safetensors"))))
    outside.write_bytes(first.read_bytes())

    def point_to(name):
        """Make the index say that the tensors of the first shard are in the file `name`."""
        places = json.loads(before)["weight_map"]
        moved = {k: name if v == first.name else v for k, v in places.items()}
        edit_json(index, lambda i: i.update(weight_map=moved))

    for name in ("../elsewhere.safetensors", str(outside)):
        point_to(name)
        with pytest.raises(FormatError, match="outside the folder"):
            GptqFolder(folder)
        index.write_text(before, "utf-8")
    first.unlink()
    first.symlink_to(outside)
    with pytest.raises(FormatError, match="outside the folder"):
        GptqFolder(folder)
    first.unlink()
    with pytest.raises(FormatError, match="is missing"):
        GptqFolder(folder)


def test_damaged_files_are_one_line_errors(tmp_path):
    _, folder = written(tmp_path)
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, text = file.read_bytes(), config.read_text("utf-8")
    for content in (whole[:-1], whole[:4], b"\xff" * 64, b"\x08" + bytes(7) + b"[[[[[[[["):
        file.write_bytes(content)
        with pytest.raises(FormatError, match=r"model\.safetensors") as error:
            GptqFolder(folder)
        assert "\n" not in str(error.value)
    file.write_bytes(whole)
    for content in ("{", "[]", "{}", '{"quantization_config": {"quant_method": "awq"}}'):
        config.write_text(content, "utf-8")
        with pytest.raises(FormatError, match=r"config\.json"):
            GptqFolder(folder)
    config.write_text(text, "utf-8")
    edit_json(config, lambda c: c["quantization_config"].update(bits=5))
    with pytest.raises(FormatError, match="5 bits"):
        GptqFolder(folder)


def test_missing_extra_and_misfit_tensors(tmp_path):
    artifact, folder = written(tmp_path)
    reference, file = _Reference(artifact), folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, file)
    row = own_decoder(GptqFolder(folder), reference)
    assert row.status == "failed" and "model.norm.weight (missing)" in row.worst
    bias = "model.layers.0.mlp.down_proj.bias"
    save_file(tensors | {bias: torch.zeros(OUT)}, file)
    row = own_decoder(GptqFolder(folder), reference)
    assert row.status == "failed" and f"{bias} (not in the model)" in row.worst
    g_idx = "model.layers.2.mlp.down_proj.g_idx"
    save_file(tensors | {g_idx: torch.full((IN,), 9).int()}, file)
    row = own_decoder(GptqFolder(folder), reference)
    assert row.status == "failed" and "model.layers.2.mlp.down_proj" in row.detail


class _Reference:
    """A `Reference` without a model: the weights are all that the checks here read."""

    def __init__(self, artifact: Artifact):
        self.weights = Weights(artifact.path)


# --- inspect, and a check without its runtime -----------------------------------------------------


def test_inspect(tmp_path):
    _, folder = written(tmp_path, bits=8, symmetric=True)
    found = inspect(folder / "model.safetensors")
    assert found.kind == "GPTQ v1 safetensors"
    assert found.metadata["bits"] == "8" and found.metadata["sym"] == "true"
    assert len(found.tensors) == LAYERS * 9 + 4
    with pytest.raises(FormatError):
        inspect(tmp_path)


def test_not_installed_is_not_run(tmp_path, monkeypatch):
    artifact, folder = written(tmp_path)
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == "gptqmodel" else True
    )
    monkeypatch.setattr(autogptq, "source_file", lambda: None)
    assert FORMATS["gptq"].missing() == "gptqmodel"
    rows = FORMATS["gptq"].check(folder, _Reference(artifact), OPTIONS, CheckSettings())
    assert [r.status for r in rows] == ["passed"] + ["not run"] * 5
    assert all("not installed" in r.detail for r in rows[1:])
