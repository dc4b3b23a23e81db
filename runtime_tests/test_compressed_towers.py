"""A quantized vision tower in compressed-tensors folders, which transformers runs.

The library decodes each linear by its own grid into a folder of floats, and transformers loads it.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from runtime_tests.test_compressed_tensors import ALL_PASS, by_level, exported, request_for, rows_of
from tests.artifacts import edit
from tools.reference_vlm import random_checkpoint
from tools.reference_vlm.tiny_checkpoints import make_tiny
from tools.reference_vlm.tiny_families import ARCHES, SPARSE
from vlmq_export.bundled import CALIBRATION
from vlmq_export.formats.compressed_tensors.proof.check import NAME, check
from vlmq_export.formats.compressed_tensors.requirements import missing
from vlmq_export.formats.compressed_tensors.write import write
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.in_transformers.proof.runtime import RuntimeFailed, Worker
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.proving.parity import required_runtimes
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.skipif(
    bool(missing()) and NAME not in required_runtimes(),
    reason=f"{missing()} not installed and not declared present",
)

CONFIG = QuantConfig("gptq", 4, 64, vision_bits=8)  # a decoder with zero-points, as by default
SYMMETRIC = QuantConfig("gptq", 4, 32, symmetric=True, vision_bits=4)
ODD = "llava_onevision, odd"  # rows of 500 columns, as SigLIP has some of 4304
GATED = "qwen2_5_vl, odd"  # the 3B's shape divided by 8: its gated MLP has rows of 427 columns
CASES: dict[str, QuantConfig] = {
    "qwen2_5_vl": CONFIG,
    "qwen3_vl": replace(CONFIG, vision_bits=4),
    "internvl": replace(CONFIG, head_bits=8),
    "idefics3": replace(CONFIG, bits=3, vision_bits=2),
    ODD: CONFIG,
    "llava_onevision": SYMMETRIC,  # one grid for all, which transformers decodes by itself
}
QKV, UP = "visual.blocks.1.attn.qkv", "visual.blocks.1.mlp.up_proj"


def solved(folder: Path, case: str, config: QuantConfig) -> Artifact:
    """An artifact of a tiny model, calibrated on three rows."""
    odd = {"shape": {"vision_config": {"intermediate_size": 500}}} if case == ODD else {}
    if case == GATED:
        source = random_checkpoint.make(folder / "source", layers=2, scale=8)
    else:
        source = make_tiny(folder / "source", case.partition(",")[0], **odd)
    preprocessor = Preprocessor(source)
    samples = [preprocessor.sample(row) for row in read_rows(CALIBRATION)[:3]]
    given = {"name": "tiny-vlm", "calibration": {}, "device": "cpu"}
    quantize(Checkpoint(source), samples, config, folder / "artifact", **given)
    return Artifact(folder / "artifact")


def changed_tensor(folder: Path, copy: Path, name: str) -> Path:
    """A copy in which one bit of a tensor is another."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name].numpy().view(np.uint8)[5, 2] ^= 1  # shares the memory of the tensor
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def changed_config(folder: Path, copy: Path, change) -> Path:
    """A copy whose quantization_config is changed."""
    shutil.copytree(folder, copy)
    edit(copy / "config.json", lambda c: change(c["quantization_config"]))
    return copy


def test_families_widths_and_faults_in_one_process(tmp_path):
    cases = {}
    for number, (case, config) in enumerate(CASES.items()):
        top = tmp_path / f"{number}"
        cases[case] = exported(top / NAME, solved(top, case, config))
    folder, reference = cases["qwen2_5_vl"]
    faults = {
        "code": changed_tensor(folder, tmp_path / "code", f"{QKV}.weight_packed"),
        "scale": changed_tensor(folder, tmp_path / "scale", f"{UP}.weight_scale"),
        "ignored": changed_config(
            folder, tmp_path / "ignored", lambda q: q["ignore"].append("re:.*attn.qkv")
        ),
        "unnamed": changed_config(
            folder,
            tmp_path / "unnamed",
            lambda q: q["config_groups"]["group_1"]["targets"].pop(),
        ),
    }
    requests = [request_for(f, tmp_path / f"{i}-out", r) for i, (f, r) in enumerate(cases.values())]
    # The linears that are tried are those of the whole folder, as ours refuses some of the faults.
    linears = requests[0].loading["linears"]
    requests += [
        request_for(f, tmp_path / f"{name}-out", reference, linears=linears)
        for name, f in faults.items()
    ]
    with Worker(requests) as worker:
        for case, (out, expected) in cases.items():
            rows = rows_of(out, worker.outcome(), expected)
            assert by_level(rows) == ALL_PASS[2:6], (case, rows)
            assert rows[0].compared == expected.weights.count
            assert rows[1].compared == len(expected.weights.linears)
            is_vision = expected.architecture.family.is_vision
            assert any(is_vision(name) for name in expected.weights.linears)
        for name, module in (("code", QKV), ("scale", UP)):
            weights, linears, *_ = rows_of(faults[name], worker.outcome(), reference)
            assert weights.status == linears.status == "failed", name
            assert weights.worst.startswith(f"{module}.weight") and weights.worst.count("(") == 1
            assert linears.worst == module
        # Without a scheme, the integers of a linear find no place in the model.
        for said in ("could not place", "residual quantization param"):
            with pytest.raises(RuntimeFailed, match=said):
                worker.outcome()


def test_every_level_of_a_tower_beside_zero_points(tmp_path):
    out, reference = exported(tmp_path / NAME, solved(tmp_path, "qwen2_5_vl", CONFIG))
    rows = check(out, reference, FormatOptions(), CheckSettings(images=2, threads=1))
    assert by_level(rows) == ALL_PASS, rows
    assert rows[0].compared == rows[2].compared == reference.weights.count
    assert rows[3].compared == len(reference.weights.linears)
    # The claims of plan.py about transformers 5.24, which has no other way to such a folder.
    from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageTextToText.from_pretrained(out)
    by_one = CompressedTensorsConfig(dequantize=True)
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        AutoModelForImageTextToText.from_pretrained(out, quantization_config=by_one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [GATED, *(arch for arch in ARCHES if arch not in (*CASES, *SPARSE))]
)
def test_every_level_of_the_other_families(case, tmp_path):
    out, reference = exported(tmp_path / NAME, solved(tmp_path, case, CONFIG))
    rows = check(out, reference, FormatOptions(), CheckSettings(images=2, threads=1))
    assert by_level(rows) == ALL_PASS, rows


@pytest.mark.slow
def test_a_folder_of_several_shards(tmp_path):
    """The parts of a linear may lie in two of them."""
    artifact = solved(tmp_path, "qwen2_5_vl", CONFIG)
    _, reference = exported(tmp_path / "whole", artifact)
    out = tmp_path / NAME
    out.mkdir()
    write(artifact, out, FormatOptions(shard_bytes=250_000))
    index = json.loads((out / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    apart = [n for n in index if n.endswith("weight_packed")
             and index[n] != index[n.replace("_packed", "_scale")]]  # fmt: skip
    assert len({*index.values()}) > 5 and apart
    rows = check(out, reference, FormatOptions(), CheckSettings(images=2, threads=1))
    assert by_level(rows) == ALL_PASS, rows
