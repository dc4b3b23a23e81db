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
from vlmq_export.formats.onnx.checks import FORMAT_GATE, _at_most, linear_gate, node_session
from vlmq_export.formats.onnx.packing import pack_linear
from vlmq_export.formats.onnx.read import Linear
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


def weight_rows(rows):
    """The two readers of L1: ours and the runtime's."""
    found = [r for r in rows if r.level == "L1" and r.name.startswith("weights by")]
    assert len(found) == 2
    return found


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
    for row in weight_rows(rows):
        assert row.status == "failed" and f"{module}.weight" in row.worst


def test_one_changed_vision_weight_is_caught_and_named(exported, tmp_path):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    damage(tmp_path / "onnx", "vision", "visual.blocks.2.mlp.up_proj.weight", "ulp", random.Random(1))
    rows = onnx_format.check(tmp_path / "onnx", reference, FormatOptions(), replace(SETTINGS, images=1))
    for row in weight_rows(rows):
        assert row.status == "failed" and "visual.blocks.2.mlp.up_proj.weight" in row.worst


def test_what_the_runtime_refuses_is_a_failed_row(exported, tmp_path):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "text.onnx", load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    (tmp_path / "onnx" / "text.onnx").write_bytes(model.SerializeToString())
    rows = onnx_format.check(tmp_path / "onnx", reference, FormatOptions(), replace(SETTINGS, images=1))
    assert any(r.level == "L3" and r.status == "failed" and "NoSuchOperator" in r.detail for r in rows)


def overwrite(folder, graph, name, change):
    """Apply `change` to the float32 values of one constant in the data file."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    entry = {e.key: e.value for e in tensor.external_data}
    values = np.memmap(folder / entry["location"], "<f4", "r+", int(entry["offset"]), tuple(tensor.dims))
    change(values)
    values.flush()


@pytest.mark.parametrize("table", ["text/decoder.model.rotary_emb.cos_cache", "text/decoder.model.rotary_emb.sin_cache",
                                   "vision/vision_encoder.visual.rotary_pos_emb.freq_table"])  # fmt: skip
def test_a_rotary_table_is_checked_beyond_the_prompts(table, exported, tmp_path):
    """No prompt reaches these rows: only the table's own row can see it."""
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    graph, name = table.split("/")

    def change(values):
        values[400, 0] += 0.01

    overwrite(tmp_path / "onnx", graph, name, change)
    rows = onnx_format.check(tmp_path / "onnx", reference, FormatOptions(), replace(SETTINGS, images=1))
    failed = [r for r in rows if r.status == "failed"]
    assert [r.name for r in failed] == ["rotary tables at every position"]
    assert f"{name} at position 400" in failed[0].worst


def test_nan_is_worse_than_any_number(exported, tmp_path):
    """max() passes over NaN: a linear of the middle that computes it must still fail L2 and L3."""
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")

    def change(scales):
        scales[7, 0] = np.nan

    overwrite(tmp_path / "onnx", "text", "model.layers.3.mlp.up_proj.scales", change)
    rows = onnx_format.check(tmp_path / "onnx", reference, FormatOptions(), SETTINGS)
    status = {r.name: r.status for r in rows}
    assert status["each MatMulNBits at level 0"] == status["logits at accuracy_level 0"] == "failed"
    assert next(r for r in rows if r.level == "L2").worst == "model.layers.3.mlp.up_proj"


def test_nan_of_a_later_prompt_is_not_lost():
    row = _at_most("logits", [(1e-7, "first"), (float("nan"), "second"), (2e-7, "third")], FORMAT_GATE, "")
    assert row.status == "failed" and row.worst == "second"


@pytest.mark.parametrize(("columns", "group"), [(512, 128), (4304, -1), (18944, 128), (29568, 128)])
def test_a_right_kernel_passes_the_gate_at_the_widths_of_real_models(columns, group):
    """18944 and 29568: down_proj of the 7B and 72B models, where one gate for every width was too small."""
    rng = np.random.default_rng(0)
    groups = 1 if group == -1 else columns // group
    codes = rng.integers(0, 16, (32, columns), dtype=np.uint8)
    scales = rng.uniform(1e-3, 1e-2, (32, groups)).astype(np.float16)
    g_idx = np.arange(columns) // (columns // groups)
    p = pack_linear(codes, scales, np.full((32, groups), 8, np.uint8), g_idx, 4, group)
    linear = Linear("x", p.bits, p.block_size, p.weight, p.scales, p.zero_points, p.order, columns, 0)
    x = rng.standard_normal((16, columns)).astype(np.float32)
    exact = x.astype(np.float64) @ linear.decode().astype(np.float64).T
    y = node_session(linear, accuracy_level=0, threads=1).run(["y"], {"a": x})[0]
    assert relative_error(y, exact) <= linear_gate(columns)
    assert relative_error(y * np.float32(1.00002), exact) > linear_gate(columns)  # a product 2e-5 too large is seen


def test_prompts_without_images_are_compared_and_the_image_row_says_that_it_was_not_run(exported):
    reference, folder = exported
    row = reference.rows[0]
    text = [{**m, "content": [p for p in m["content"] if p["type"] != "image"]} for m in row.messages]
    words = Reference(reference.artifact, [replace(row, id="words", images=(), messages=tuple(text))])
    rows = {r.name: r for r in onnx_format.check(folder, words, FormatOptions(), SETTINGS)}
    assert rows["image features"].status == "not run"
    assert rows["logits at accuracy_level 0"].status == rows["cached decode against one forward"].status == "passed"


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
