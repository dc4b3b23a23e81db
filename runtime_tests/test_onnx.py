"""ONNX Runtime against the fake-quantized reference, and changed files that must be caught."""

import random
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from tests.artifacts import GRIDS, rtn_artifact
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.bundled import HELDOUT, REFERENCE_VLM
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.onnx.passes.packing import pack_linear
from vlmq_export.formats.onnx.proof.nodes import linear_gate, node_session
from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.onnx.proof.whole_model import FORMAT_GATE, _at_most
from vlmq_export.formats.onnx.read import Linear
from vlmq_export.formats.proof.checks import CheckSettings, relative_error
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.rows import read_rows

SETTINGS = CheckSettings(images=4, questions=4, threads=1)


def export(folder, config, source=REFERENCE_VLM, options=None, rows=8):
    """(reference with some held-out rows, ONNX folder) of a model that is rounded to nearest."""
    artifact = rtn_artifact(folder / "artifact", config, source)
    (folder / "onnx").mkdir()
    FORMATS["onnx"].write(artifact, folder / "onnx", options or FormatOptions())
    return Reference(artifact.path, read_rows(HELDOUT)[:rows]), folder / "onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("w4"), GRIDS["w4g128"])


def run_check(reference, folder, options=None, settings=SETTINGS, **changes):
    """The rows of the proof, with `changes` of the settings."""
    settings = replace(settings, **changes)
    return FORMATS["onnx"].check(folder, reference, options or FormatOptions(), settings)


def assert_all_pass(rows):
    wrong = [c for c in rows if c.status not in ("passed", "info")]
    assert not wrong, wrong
    assert {c.level for c in rows if c.status == "passed"} == {"L1", "L2", "L3"}


@pytest.mark.parametrize(
    "tag", ["w4g128", "w4", "w4g128-dynamic", "w3g128", "w2g128", "w2", "w8g128"]
)
def test_every_grid_passes_every_gate(tag, tmp_path):
    assert_all_pass(run_check(*export(tmp_path, GRIDS[tag])))


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_vl_passes_every_gate(tied, tmp_path):
    make_random_checkpoint(tmp_path / "model", arch="qwen2_vl", tied=tied)
    assert_all_pass(run_check(*export(tmp_path, GRIDS["w4g128"], tmp_path / "model")))


def test_level_4_is_shipped_only_on_request_and_has_a_gate_of_its_own(tmp_path):
    options = FormatOptions(onnx_accuracy_level=4)
    rows = run_check(*export(tmp_path, GRIDS["w4g128"], options=options))
    assert_all_pass(rows)
    kernel = next(c for c in rows if c.name == "logits at accuracy_level 4")
    # inputs rounded to 8 bits cost at least this much: the level was really used
    assert 1e-4 < kernel.value <= kernel.gate


# -- changed files ---------------------------------------------------------------------------------


def damage(folder, graph, name, kind, rng):
    """Change one random value of a constant by the least that can matter.

    kind: "ulp" (a float by one unit in the last place) or "bit" (one bit of a byte, the lower of
        its first or second half).
    """
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    entry = {e.key: e.value for e in tensor.external_data}
    file = folder / entry["location"] if entry else None
    data = bytearray(file.read_bytes() if file else tensor.raw_data)
    offset, length = int(entry.get("offset", 0)), int(entry.get("length", len(data)))
    if kind == "ulp":
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        at = offset + dtype.itemsize * rng.randrange(length // dtype.itemsize)
        value = np.frombuffer(data, dtype, 1, at)
        data[at : at + dtype.itemsize] = np.nextafter(value, dtype.type(np.inf)).tobytes()
    else:
        data[offset + rng.randrange(length)] ^= 1 << rng.randrange(0, 8, 4)
    if file:
        file.write_bytes(data)
    else:
        tensor.raw_data = bytes(data)
        (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())


def weight_rows(rows):
    """The two rows that compare every weight: by our reader and by the runtime's."""
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
    for row in weight_rows(run_check(reference, tmp_path / "onnx", images=1)):
        assert row.status == "failed" and f"{module}.weight" in row.worst


def test_one_changed_vision_weight_is_caught_and_named(exported, tmp_path):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    name = "visual.blocks.2.mlp.up_proj.weight"
    damage(tmp_path / "onnx", "vision", name, "bit", random.Random(1))
    for row in weight_rows(run_check(reference, tmp_path / "onnx", images=1)):
        assert row.status == "failed" and name in row.worst


def test_what_the_runtime_refuses_is_a_failed_row(exported, tmp_path):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "text.onnx", load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    (tmp_path / "onnx" / "text.onnx").write_bytes(model.SerializeToString())
    rows = run_check(reference, tmp_path / "onnx", images=1)
    failed = [r for r in rows if r.level == "L3" and r.status == "failed"]
    assert any("NoSuchOperator" in r.detail for r in failed)


def overwrite(folder, graph, name, change):
    """Apply `change` to the values of one constant in the data file."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    entry = {e.key: e.value for e in tensor.external_data}
    file, offset = folder / entry["location"], int(entry["offset"])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = np.memmap(file, dtype, "r+", offset, tuple(tensor.dims))
    change(values)
    values.flush()


@pytest.mark.parametrize(
    ("graph", "name"),
    [
        ("text", "decoder.model.rotary_emb.cos_cache"),
        ("text", "decoder.model.rotary_emb.sin_cache"),
        ("vision", "vision_encoder.visual.rotary_pos_emb.freq_table"),
    ],
)
def test_a_rotary_table_is_checked_beyond_the_prompts(graph, name, exported, tmp_path):
    """No prompt is 400 tokens long, so that only the check of the whole table can see this."""
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")

    def change(values):
        values[400, 0] += 0.01

    overwrite(tmp_path / "onnx", graph, name, change)
    failed = [r for r in run_check(reference, tmp_path / "onnx", images=1) if r.status == "failed"]
    assert [r.name for r in failed] == ["rotary tables at every position"]
    assert f"{name} at position 400" in failed[0].worst


def test_nan_is_worse_than_any_number(exported, tmp_path):
    """max() may pass over NaN. A linear that computes it must fail L2 and L3 all the same."""
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")

    def change(scales):
        scales[7, 0] = np.nan

    overwrite(tmp_path / "onnx", "text", "model.layers.3.mlp.up_proj.scales", change)
    rows = run_check(reference, tmp_path / "onnx")
    status = {r.name: r.status for r in rows}
    assert status["each MatMulNBits at level 0"] == status["logits at accuracy_level 0"] == "failed"
    assert next(r for r in rows if r.level == "L2").worst == "model.layers.3.mlp.up_proj"


def test_nan_of_a_later_prompt_is_not_lost():
    errors = [(1e-7, "first"), (float("nan"), "second"), (2e-7, "third")]
    row = _at_most("logits", errors, FORMAT_GATE, "")
    assert row.status == "failed" and row.worst == "second"


@pytest.mark.parametrize(("columns", "group"), [(512, 128), (4304, -1), (18944, 128), (29568, 128)])
def test_a_right_kernel_passes_the_gate_at_the_widths_of_real_models(columns, group):
    """down_proj has 18944 inputs in the 7B model and 29568 in the 72B model.

    There a gate that is right for small widths would be too narrow.
    """
    rng = np.random.default_rng(0)
    groups = 1 if group == -1 else columns // group
    codes = rng.integers(0, 16, (32, columns), dtype=np.uint8)
    scales = rng.uniform(1e-3, 1e-2, (32, groups)).astype(np.float16)
    g_idx = np.arange(columns) // (columns // groups)
    p = pack_linear(codes, scales, np.full((32, groups), 8, np.uint8), g_idx, 4, group)
    wide = p.scales.astype(np.float32)  # as the Cast of a file leaves them
    linear = Linear("x", p.bits, p.block_size, p.weight, wide, p.zero_points, p.order, columns, 0)
    x = rng.standard_normal((16, columns)).astype(np.float32)
    exact = x.astype(np.float64) @ linear.decode().astype(np.float64).T
    y = node_session(linear, accuracy_level=0, threads=1).run(["y"], {"a": x})[0]
    assert relative_error(y, exact) <= linear_gate(columns)
    # a product that is 2e-5 too large is seen
    assert relative_error(y * np.float32(1.00002), exact) > linear_gate(columns)


def test_prompts_without_images_are_compared_and_the_image_row_says_that_it_was_not_run(exported):
    reference, folder = exported
    row = reference.rows[0]
    text = tuple(
        {**m, "content": [p for p in m["content"] if p["type"] != "image"]} for m in row.messages
    )
    words = Reference(reference.artifact, [replace(row, id="words", images=(), messages=text)])
    rows = {r.name: r for r in run_check(words, folder)}
    assert rows["image features"].status == "not run"
    assert rows["logits at accuracy_level 0"].status == "passed"
    assert rows["cached decode against one forward"].status == "passed"


# -- two images, two prompts -----------------------------------------------------------------------


def two_images(reference):
    """A prompt with the images of two rows, and words between them."""
    one, two = reference.rows[0], reference.rows[2]
    words = {"type": "text", "text": "Read the text. "}
    content = [{"type": "image"}, words, *two.messages[0]["content"]]
    turns = ({"role": "user", "content": content},)
    both = replace(one, id="two", images=one.images + two.images, messages=turns)
    return reference.preprocessor.sample(both, prompt_only=True)


def test_two_images_in_one_prompt(exported):
    reference, folder = exported
    prompt = two_images(reference)
    got = OnnxRunner(folder).logits(prompt, reference.position_ids(prompt))
    assert relative_error(got[:, : reference.vocabulary], reference.logits(prompt)) <= FORMAT_GATE


def left_padded(reference, runner, fill=0.0):
    """Two prompts of unequal length in one batch, the shorter one padded on the left with `fill`.

    Returns embeddings [2, S, hidden], mask [2, S], positions [3, 2, S], and the two prompts.
    """
    pair = (reference.prompts[0], reference.prompts[2])
    prompts = short, long = sorted(pair, key=lambda p: len(p.input_ids))
    assert len(long.input_ids) > len(short.input_ids)
    embeds, masks, positions = [], [], []
    for p in prompts:
        pad = (len(long.input_ids) - len(p.input_ids), 0)
        embedded = runner._embed_prompt(p)  # [1, tokens, hidden]
        embeds.append(np.pad(embedded, ((0, 0), pad, (0, 0)), constant_values=fill))
        masks.append(np.pad(np.ones(len(p.input_ids), np.int64), pad))
        at = reference.position_ids(p)
        positions.append(np.pad(at, ((0, 0), (0, 0), pad), constant_values=1))
    return np.concatenate(embeds), np.stack(masks), np.concatenate(positions, axis=1), prompts


def test_a_left_padded_batch_gives_each_prompt_its_own_logits(exported):
    reference, folder = exported
    runner = OnnxRunner(folder)
    embeds, mask, positions, prompts = left_padded(reference, runner)
    logits, _ = runner.step(embeds, mask, positions, None)
    for row, p in zip(logits, prompts):
        got = row[-len(p.input_ids) :, : reference.vocabulary]
        assert relative_error(got, reference.logits(p)) <= FORMAT_GATE
