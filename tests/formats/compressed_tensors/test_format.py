"""compressed-tensors folders: the bytes that are written, what is refused, and damaged folders.

What the writer packed is unpacked by the library's own decompressor.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.artifacts import config_of, edit
from tests.formats.gptq.test_format import _Reference, make_artifact, model_plan
from vlmq_export.errors import FormatError
from vlmq_export.formats.compressed_tensors import requirements
from vlmq_export.formats.compressed_tensors.layout import quantization_config
from vlmq_export.formats.compressed_tensors.plan import plan
from vlmq_export.formats.compressed_tensors.proof.check import NAME, library_decoder
from vlmq_export.formats.compressed_tensors.read import CompressedFolder, read
from vlmq_export.formats.compressed_tensors.write import write
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gptq.imports.checkpoint import GptqCheckpoint
from vlmq_export.formats.in_transformers.proof.rows import own_decoder
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.inspection import inspect_path
from vlmq_export.proving.parity import required_runtimes
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.architecture import Architecture

pytestmark = pytest.mark.skipif(
    bool(requirements.missing()) and NAME not in required_runtimes(),
    reason=f"{requirements.missing()} not installed and not declared present",
)

OPTIONS = FormatOptions()
DOWN = "model.layers.1.mlp.down_proj"


def written(folder: Path, options=OPTIONS, **grid) -> tuple[Artifact, Path]:
    artifact = make_artifact(folder / "artifact", **grid)
    out = folder / "compressed-tensors"
    out.mkdir()
    write(artifact, out, options)
    return artifact, out


# --- write and read back --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_library_decodes_the_integers_of_the_artifact(tmp_path, bits, group_size, symmetric):
    artifact, out = written(tmp_path, bits=bits, group_size=group_size, symmetric=symmetric, low=0)
    folder, reference = CompressedFolder(out), _Reference(artifact)
    row = own_decoder(folder, reference)
    assert (row.status, row.compared) == ("passed", Weights(artifact.path).count), row
    row = library_decoder(folder, reference)
    assert (row.status, row.value) == ("passed", 0.0), row
    assert set(read(out)) == set(Weights(artifact.path).names())


def test_the_words_are_those_of_the_library_and_the_zero_points_those_of_the_artifact(tmp_path):
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    artifact, out = written(tmp_path, bits=3, low=0)
    tensors, solution = load_file(out / "model.safetensors"), artifact.linear(DOWN).solution
    codes = tensors[f"{DOWN}.weight_packed"]
    zeros = tensors[f"{DOWN}.weight_zero_point"]
    shape = solution.codes.shape
    assert tensors[f"{DOWN}.weight_shape"].tolist() == list(shape)
    signed = unpack_from_int32(codes, 3, shape)
    assert torch.equal(signed.short() + 4, solution.codes.short())
    signed = unpack_from_int32(zeros, 3, solution.zero_points.shape, packed_dim=0)
    assert torch.equal(signed.short() + 4, solution.zero_points.short())
    assert torch.equal(tensors[f"{DOWN}.weight_scale"], solution.scales)
    assert f"{DOWN}.bias" not in tensors
    _, plain = written(tmp_path / "sym", symmetric=True)
    assert not [n for n in load_file(plain / "model.safetensors") if "zero_point" in n]


def test_folder_is_the_source_plus_what_it_states(tmp_path):
    artifact, out = written(tmp_path)
    config = config_of(out)
    stated = config.pop("quantization_config")
    assert config == artifact.source_config
    assert stated["quant_method"] == "compressed-tensors" and stated["format"] == "pack-quantized"
    assert stated["quantization_status"] == "compressed"
    (group,) = stated["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["format"] == "pack-quantized"
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "dynamic": False}
    assert group["weights"] == weights | {"strategy": "group", "group_size": 32}
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    channel = quantization_config(model_plan(QuantConfig(group_size=-1)))
    assert channel["config_groups"]["group_0"]["weights"]["strategy"] == "channel"


def test_shards_and_the_same_bytes_again(tmp_path):
    artifact, out = written(tmp_path, replace(OPTIONS, shard_bytes=10_000))
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert own_decoder(CompressedFolder(out), _Reference(artifact)).status == "passed"
    again = tmp_path / "again"
    again.mkdir()
    write(artifact, again, replace(OPTIONS, shard_bytes=10_000))
    one, other = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (out, again))
    assert one == other


def test_an_artifact_comes_back_from_its_own_folder(tmp_path, artifacts):
    """MODEL may be a folder of this format. Its integers are taken over as they are."""
    artifact, out = artifacts("w4g128"), tmp_path / NAME
    out.mkdir()
    write(artifact, out, OPTIONS)
    checkpoint = GptqCheckpoint(out)
    name = artifact.manifest.modules[5].name
    mine, theirs = artifact.linear(name).solution, checkpoint.linear(name).solution
    for part in ("codes", "scales", "zero_points", "g_idx"):
        assert torch.equal(getattr(mine, part), getattr(theirs, part)), part


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape", "word"),
    [
        ({"act_order": "dynamic"}, (128, 256), "--act-order dynamic"),
        ({"group_size": 128}, (128, 192), "does not divide in_features 192"),
        ({"types": {"model.layers.0.mlp.down_proj": "Q4_K"}}, (128, 256), "block types"),
    ],
)
def test_plan_refuses(config, shape, word):
    refusals = plan(model_plan(QuantConfig(**config), shape), OPTIONS).refusals
    assert len(refusals) == 1 and word in refusals[0] and "\n" not in refusals[0]


@pytest.mark.parametrize(
    "config",
    [
        {"act_order": "dynamic", "group_size": -1},
        {"act_order": "static"},
        {"head_bits": 4},
        {"head_bits": 8},
        {"head_bits": 8, "symmetric": True},
    ],
)
def test_plan_does_not_refuse_what_the_layout_holds(config):
    assert plan(model_plan(QuantConfig(**config)), OPTIONS).refusals == []


def test_the_notes_say_how_transformers_takes_a_file():
    def told(**config):
        return " ".join(plan(model_plan(QuantConfig(**config)), OPTIONS).notes)

    assert "loads zero-points only with" in told() and "by its own" not in told()
    assert "transformers 5.24" not in told(symmetric=True)
    assert "each by its own, into a folder" in told(head_bits=8)
    symmetric = model_plan(QuantConfig(symmetric=True))
    llava = Architecture.of({"model_type": "llava_onevision"})
    notes = plan(replace(symmetric, architecture=llava), OPTIONS).notes
    assert any("generates with this model only with" in note for note in notes)


def test_permuted_groups_are_refused_before_a_weight_is_read(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", permuted=True)
    out = tmp_path / NAME
    out.mkdir()
    with pytest.raises(FormatError, match="--act-order dynamic"):
        write(artifact, out, OPTIONS)
    assert not list(out.iterdir())


def test_plan_counts_what_is_written(tmp_path):
    artifact, out = written(tmp_path, bits=3)
    planned = plan(artifact_plan(artifact), OPTIONS)
    data = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert planned.size_bytes == data
    # A weight costs 3 bits of its own, 1/32 of its group's scale (16 bits) and zero-point (3 bits),
    # and its share of the 16 bytes of the shape.
    assert planned.bits_per_weight == pytest.approx(3 + 19 / 32 + 128 / (64 * 96))
    shown = inspect_path(out)
    assert shown.kind == "compressed-tensors pack-quantized"
    assert shown.bits_per_weight == pytest.approx(planned.bits_per_weight)
    assert shown.metadata["bits"] == "3" and "lm_head" in shown.metadata["ignore"]


# --- reader on damaged folders --------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_the_least_change_is_caught_and_named(tmp_path, part):
    artifact, out = written(tmp_path)
    tensors = load_file(out / "model.safetensors")
    values = tensors[f"{DOWN}.{part}"].numpy()
    if part == "weight_scale":
        values[3, 1] = np.nextafter(values[3, 1], np.float16(np.inf))
    else:
        values[3, 1] ^= 1 << 8  # the lowest bit of one nibble
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    folder, reference = CompressedFolder(out), _Reference(artifact)
    for row in (own_decoder(folder, reference), library_decoder(folder, reference)):
        assert row.status == "failed" and row.worst.startswith(f"{DOWN}.weight"), row
        assert row.worst.count("(") == 1


def test_damaged_folders_are_one_line_errors(tmp_path):
    _, out = written(tmp_path)

    def broken(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        edit(copy / "config.json", lambda c: change(c["quantization_config"]))
        return copy

    def weights(q):
        return q["config_groups"]["group_0"]["weights"]

    for change, word in (
        (lambda q: q.update(quant_method="awq"), "no compressed-tensors quantization_config"),
        (lambda q: q.update(format="marlin-24"), "format marlin-24"),
        (lambda q: q.update(config_groups={}), "0 config_groups"),
        (lambda q: weights(q).update(num_bits=16), "weights of 16 bits"),
        (lambda q: weights(q).update(strategy="tensor"), "by tensor"),
        (lambda q: weights(q).update(group_size="x"), "in groups of x"),
    ):
        with pytest.raises(FormatError, match=word) as error:
            CompressedFolder(broken(change))
        assert "\n" not in str(error.value)
    with pytest.raises(FormatError, match=r"the tensors of .* do not fit together"):
        read(broken(lambda q: weights(q).update(num_bits=8)))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight_shape", lambda t: t * float("nan")),
        ("weight_shape", lambda t: t[:1]),
        ("weight_shape", lambda t: t * 2**40),
        ("weight_scale", lambda t: t.bfloat16()),
        ("weight_packed", lambda t: t[:-1]),
        ("weight_packed", lambda t: t.bfloat16()),
        ("weight_zero_point", lambda t: t.T.contiguous()),
    ],
)
def test_parts_that_do_not_fit_are_one_line(tmp_path, part, change):
    _, out = written(tmp_path)
    file = out / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{DOWN}.{part}": change(tensors[f"{DOWN}.{part}"])}, file)
    with pytest.raises(FormatError, match=f"the tensors of {DOWN} do not fit together") as error:
        CompressedFolder(out).array(f"{DOWN}.weight")
    assert "\n" not in str(error.value)


def test_missing_tensors_fail(tmp_path):
    artifact, out = written(tmp_path)
    file = out / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != f"{DOWN}.weight_zero_point"}, file)
    row = own_decoder(CompressedFolder(out), _Reference(artifact))
    assert row.status == "failed" and f"{DOWN}.weight_zero_point" in row.detail
    row = library_decoder(CompressedFolder(out), _Reference(artifact))
    assert row.status == "failed"


def test_not_installed_is_not_run(tmp_path, monkeypatch):
    artifact, out = written(tmp_path)
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == "compressed_tensors" else True
    )
    assert FORMATS[NAME].missing() == "compressed_tensors"
    rows = FORMATS[NAME].check(out, _Reference(artifact), OPTIONS, CheckSettings())
    assert [r.status for r in rows] == ["passed"] + ["not run"] * 5
    assert all("vlmq-export[compressed-tensors]" in r.detail for r in rows[1:])
