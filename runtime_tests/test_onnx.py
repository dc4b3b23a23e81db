"""ONNX Runtime against the fake-quantized reference, and faults that must be caught by decoding."""

import random
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from tests.artifacts import GRIDS, rtn_artifact
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.bundled import HELDOUT
from vlmq_export.formats import onnx as onnx_format
from vlmq_export.formats.base import CheckSettings, FormatOptions, relative_error
from vlmq_export.formats.onnx.checks import FORMAT_GATE
from vlmq_export.formats.onnx.runner import OnnxRunner
from vlmq_export.quantizer.calibration import read_rows
from vlmq_export.reference import Reference

SETTINGS = CheckSettings(images=4, questions=4, threads=1)


def export(folder, config, source=None, options=None):
    artifact = rtn_artifact(folder / "artifact", config, **({"source": source} if source else {}))
    (folder / "onnx").mkdir()
    onnx_format.write(artifact, folder / "onnx", options or FormatOptions())
    return Reference(artifact.path, read_rows(HELDOUT)[:8]), folder / "onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("w4"), GRIDS["w4g128"])


def assert_all_pass(rows):
    wrong = [c for c in rows if c.status not in ("passed", "info")]
    assert not wrong, wrong
    assert {c.level for c in rows if c.status == "passed"} == {"L1", "L2", "L3"}


@pytest.mark.parametrize("tag", ["w4g128", "w4", "w4g128-dynamic", "w3g128", "w2g128", "w2", "w8g128"])
def test_every_grid_passes_every_gate(tag, tmp_path):
    reference, folder = export(tmp_path, GRIDS[tag])
    assert_all_pass(onnx_format.check(folder, reference, FormatOptions(), SETTINGS))


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_vl_passes_every_gate(tied, tmp_path):
    make_random_checkpoint(tmp_path / "model", arch="qwen2_vl", tied=tied)
    reference, folder = export(tmp_path, GRIDS["w4g128"], tmp_path / "model")
    assert_all_pass(onnx_format.check(folder, reference, FormatOptions(), SETTINGS))


def test_level_4_is_shipped_only_on_request_and_has_a_gate_of_its_own(tmp_path):
    reference, folder = export(tmp_path, GRIDS["w4g128"], options=FormatOptions(onnx_accuracy_level=4))
    rows = onnx_format.check(folder, reference, FormatOptions(), SETTINGS)
    assert_all_pass(rows)
    kernel = next(c for c in rows if c.name == "logits at accuracy_level 4")
    assert 1e-4 < kernel.value <= kernel.gate  # the level was really used


# -- faults: one change in the data file, checksums aside --------------------------------------------------------


def damage(folder, graph, name, kind, rng):
    """Change one value of a constant by the least that can matter, where it lies: data file or protobuf."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    entry = {e.key: e.value for e in tensor.external_data}
    file = folder / entry["location"] if entry else None
    data = bytearray(file.read_bytes() if file else tensor.raw_data)
    offset, length = int(entry.get("offset", 0)), int(entry.get("length", len(data)))
    if kind == "ulp":  # one unit in the last place of a float32
        at = offset + 4 * rng.randrange(length // 4)
        value = np.frombuffer(bytes(data[at : at + 4]), "<f4")
        data[at : at + 4] = np.nextafter(value, np.float32(np.inf)).astype("<f4").tobytes()
    else:  # one integer by one
        data[offset + rng.randrange(length)] ^= 1 << rng.randrange(0, 8, 4)
    if file:
        file.write_bytes(data)
    else:
        tensor.raw_data = bytes(data)
        (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())


FAULTS = [
    (f"model.layers.{layer}.{module}", part, kind)
    for layer, module in ((0, "self_attn.q_proj"), (3, "mlp.down_proj"), (5, "self_attn.o_proj"))
    for part, kind in (("scales", "ulp"), ("zero_points", "bit"), ("qweight", "bit"))
]


@pytest.mark.parametrize(("module", "part", "kind"), FAULTS)
def test_one_changed_value_of_a_linear_is_caught_and_named(exported, tmp_path, module, part, kind):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    damage(tmp_path / "onnx", "text", f"{module}.{part}", kind, random.Random(f"{module}{part}"))
    rows = onnx_format.check(tmp_path / "onnx", reference, FormatOptions(), replace(SETTINGS, images=1))
    for row in (r for r in rows if r.level == "L1"):
        assert row.status == "failed" and f"{module}.weight" in row.worst


def test_one_changed_vision_weight_is_caught_and_named(exported, tmp_path):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    damage(tmp_path / "onnx", "vision", "visual.blocks.2.mlp.up_proj.weight", "ulp", random.Random(1))
    rows = onnx_format.check(tmp_path / "onnx", reference, FormatOptions(), replace(SETTINGS, images=1))
    for row in (r for r in rows if r.level == "L1"):
        assert row.status == "failed" and "visual.blocks.2.mlp.up_proj.weight" in row.worst


def test_what_the_runtime_refuses_is_a_failed_row(exported, tmp_path):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "text.onnx", load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    (tmp_path / "onnx" / "text.onnx").write_bytes(model.SerializeToString())
    rows = onnx_format.check(tmp_path / "onnx", reference, FormatOptions(), replace(SETTINGS, images=1))
    assert any(r.level == "L3" and r.status == "failed" and "NoSuchOperator" in r.detail for r in rows)


# -- more than one prompt at a time -----------------------------------------------------------------------------


def test_two_images_in_one_prompt(exported):
    reference, folder = exported
    one, two = reference.rows[0], reference.rows[2]
    both = replace(one, id="two", images=one.images + two.images, messages=({
        "role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read the text. "}, *two.messages[0]["content"]],
    },))  # fmt: skip
    prompt = reference.preprocessor.sample(both, prompt_only=True)
    got = OnnxRunner(folder).logits(prompt, reference.position_ids(prompt))
    assert relative_error(got[:, : reference.vocabulary], reference.logits(prompt)) <= FORMAT_GATE


def test_a_left_padded_batch(exported):
    """Two prompts of unequal length, the shorter one padded on the left, give each its own logits."""
    reference, folder = exported
    short, long = sorted((reference.prompts[0], reference.prompts[2]), key=lambda p: len(p.input_ids))
    runner, length = OnnxRunner(folder), len(long.input_ids)
    embeds, masks, positions = [], [], []
    for p in (short, long):
        pad = length - len(p.input_ids)
        features = runner.features(p.pixel_values.numpy(), p.image_grid_thw.numpy())
        embeds.append(np.pad(runner.embed(p.input_ids.numpy()[None], features), ((0, 0), (pad, 0), (0, 0))))
        masks.append(torch.nn.functional.pad(torch.ones(len(p.input_ids), dtype=torch.int64), (pad, 0)).numpy())
        positions.append(np.pad(reference.position_ids(p), ((0, 0), (0, 0), (pad, 0)), constant_values=1))
    logits, _ = runner.step(np.concatenate(embeds), np.stack(masks), np.concatenate(positions, axis=1), None)
    for row, p in zip(logits, (short, long)):
        got = row[length - len(p.input_ids) :, : reference.vocabulary]
        assert relative_error(got, reference.logits(p)) <= FORMAT_GATE
