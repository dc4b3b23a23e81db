"""A quantized vision tower in a compressed-tensors folder: its bytes, its size, and changed files.

runtime_tests/test_compressed_towers.py runs such folders in transformers.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.artifacts import config_of, edit
from tests.formats.gptq.test_format import _Reference
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.errors import FormatError
from vlmq_export.formats.compressed_tensors.inspect import inspect
from vlmq_export.formats.compressed_tensors.plan import plan
from vlmq_export.formats.compressed_tensors.proof.check import library_decoder
from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.compressed_tensors.requirements import missing
from vlmq_export.formats.compressed_tensors.write import write
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.in_transformers.proof.rows import own_decoder
from vlmq_export.formats.model_plan import artifact_plan, model_plan
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.proving.parity import required_runtimes
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize

pytestmark = pytest.mark.skipif(
    bool(missing()) and "compressed-tensors" not in required_runtimes(),
    reason=f"{missing()} not installed and not declared present",
)

OPTIONS = FormatOptions()
CONFIG = QuantConfig("rtn", 4, 64, vision_bits=8)
QKV = "visual.blocks.1.attn.qkv"


def rounded(folder: Path, source: Path, config: QuantConfig) -> Artifact:
    """An artifact of a source, rounded to nearest."""
    given = {"name": "tiny-vlm", "calibration": {}, "device": "cpu"}
    quantize(Checkpoint(source), [], config, folder, **given)
    return Artifact(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """get(case) → (source, artifact, folder); each is made once."""
    made = {}

    def get(case: str) -> tuple[Path, Artifact, Path]:
        if case not in made:
            top = tmp_path_factory.mktemp(case.replace(", ", "-"))
            odd = {"shape": {"vision_config": {"intermediate_size": 500}}} if "odd" in case else {}
            source = make_tiny(top / "source", case.partition(",")[0], **odd)
            bits = 4 if "4 bits" in case else 8
            artifact = rounded(top / "artifact", source, replace(CONFIG, vision_bits=bits))
            (top / "folder").mkdir()
            write(artifact, top / "folder", OPTIONS)
            made[case] = source, artifact, top / "folder"
        return made[case]

    return get


CASES = ["qwen2_5_vl", "llava_onevision, odd", "internvl, 4 bits", "qwen3_vl, 4 bits"]


@pytest.mark.parametrize("case", CASES)
def test_two_decoders_read_the_integers_of_the_artifact(case, written):
    _, artifact, out = written(case)
    folder, reference = CompressedFolder(out), _Reference(artifact)
    row = own_decoder(folder, reference)
    assert (row.status, row.compared) == ("passed", Weights(artifact.path).count), row
    row = library_decoder(folder, reference)
    assert (row.status, row.value) == ("passed", 0.0), row
    family = artifact.architecture.family
    tower = [n for n in folder.linears if family.is_vision(folder.hub_name(n))]
    bits = artifact.config.vision_bits
    assert tower and {folder.grid_of(n).bits for n in tower} == {bits}
    assert {folder.grid_of(n).group_size for n in tower} == {32}
    assert all(folder.grid_of(n).symmetric for n in tower)
    assert len(tower) < len(folder.linears) and inspect(out).metadata["vision bits"] == str(bits)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_is_written_to_the_byte(case, written):
    source, artifact, out = written(case)
    plans = [
        plan(model, OPTIONS)
        for model in (
            model_plan(Checkpoint(source), artifact.config, "m"),
            artifact_plan(artifact),
        )
    ]
    tensors = load_file(out / "model.safetensors")
    family = artifact.architecture.family
    for planned in plans:
        assert planned.size_bytes == sum(t.nbytes for t in tensors.values())
        vision = sum(t.nbytes for n, t in tensors.items() if family.is_vision(n))
        assert planned.parts["vision"] == vision
        assert 4.2 < planned.bits_per_weight < 4.4  # the decoder's
    (size,) = (note for note in plans[0].notes if note.startswith("vision tower and projector"))
    assert f"{vision / 2**20:,.1f} MiB" in size and "without --vision-bits" in size
    before = sum(t.nbytes for n, t in load_file(source / "model.safetensors").items()
                 if family.is_vision(family.hub_name(n)))  # fmt: skip
    assert f"({before / 2**20:,.1f} MiB without" in size
    assert ("rows of 500 columns" in size) == ("odd" in case)


def test_rows_that_no_groups_fill_stay_float_and_are_ignored(written):
    _, _, out = written("llava_onevision, odd")
    stated = config_of(out)["quantization_config"]
    assert r"re:.*vision_tower\.(.*\.)?encoder\.layers\.(0|1|2)\.mlp\.fc2$" in stated["ignore"]
    names = [n for n in load_file(out / "model.safetensors") if n.endswith("mlp.fc2.weight")]
    assert len(names) == 3


def test_formats_share_the_integers_of_a_tower(written):
    """Codes and scales are those of the artifact, which GGUF and ONNX have too."""
    _, artifact, out = written("qwen2_5_vl")
    tensors, solution = load_file(out / "model.safetensors"), artifact.linear(QKV).solution
    codes = tensors[f"{QKV}.weight_packed"].numpy().view(np.uint8)
    assert (codes == solution.codes.numpy()).all()
    assert (tensors[f"{QKV}.weight_scale"] == solution.scales).all()
    assert f"{QKV}.weight_zero_point" not in tensors
    assert "model.layers.0.mlp.up_proj.weight_zero_point" in tensors


# --- changed files --------------------------------------------------------------------------------


def rows_of(folder: Path, artifact: Artifact):
    opened, reference = CompressedFolder(folder), _Reference(artifact)
    return own_decoder(opened, reference), library_decoder(opened, reference)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_the_least_change_of_a_tower_is_caught_and_named(part, written, tmp_path):
    _, artifact, out = written("qwen2_5_vl")
    copy = shutil.copytree(out, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    values = tensors[f"{QKV}.{part}"].numpy()  # shares the memory of the tensor
    if part == "weight_scale":
        values[3, 1] = np.nextafter(values[3, 1], np.float16(np.inf))
    else:
        values[3, 1] ^= 1 << 16
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    for row in rows_of(copy, artifact):
        assert row.status == "failed" and row.worst.startswith(f"{QKV}.weight"), row
        assert row.worst.count("(") == 1


def tower_group(q: dict) -> dict:
    return q["config_groups"]["group_1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q["ignore"].append(r"re:.*visual\..*"),
        lambda q: q["ignore"].append(r"re:.*visual\.(.*\.)?blocks\.(1)\.attn\.qkv$"),
        lambda q: tower_group(q)["targets"].pop(0),
        lambda q: tower_group(q)["weights"].update(num_bits=4),
        lambda q: tower_group(q)["weights"].update(group_size=64),
        lambda q: tower_group(q)["weights"].update(symmetric=False),
    ],
    ids=["all ignored", "one ignored", "not named", "other bits", "other groups", "zero-points"],
)
def test_a_config_that_is_wrong_about_a_tower_fails_in_both_decoders(change, written, tmp_path):
    _, artifact, out = written("qwen2_5_vl")
    copy = shutil.copytree(out, tmp_path / "copy")
    edit(copy / "config.json", lambda c: change(c["quantization_config"]))
    for row in rows_of(copy, artifact):
        assert row.status == "failed", row
    with pytest.raises(FormatError) as error:
        CompressedFolder(copy).array(f"{QKV}.weight")
    assert "visual" in str(error.value) and "\n" not in str(error.value)


def test_an_ignore_that_is_no_expression_of_ours_fails_in_the_library(written, tmp_path):
    """Ours never runs an expression. The library does."""
    _, artifact, out = written("qwen2_5_vl")
    copy = shutil.copytree(out, tmp_path / "copy")
    edit(copy / "config.json", lambda c: c["quantization_config"]["ignore"].append("re:.*attn.qkv"))
    _, row = rows_of(copy, artifact)
    assert row.status == "failed" and "config.json ignores visual.blocks" in row.detail


def test_a_tower_on_another_grid_than_the_config_states_is_refused(written, tmp_path):
    _, artifact, _ = written("qwen2_5_vl")
    copy = shutil.copytree(artifact.path, tmp_path / "copy")

    def change(manifest):
        (record,) = (m for m in manifest["modules"] if m["name"] == QKV)
        record["bits"] = 4

    edit(copy / "manifest.json", change)
    (tmp_path / "out").mkdir()
    with pytest.raises(FormatError, match=f"{QKV}: its grid differs"):
        FORMATS["compressed-tensors"].write(Artifact(copy), tmp_path / "out", OPTIONS)
    assert not list((tmp_path / "out").iterdir())
