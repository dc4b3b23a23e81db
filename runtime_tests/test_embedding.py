"""A quantized embedding in ONNX Runtime and llama.cpp: a change in it is caught and named."""

import random
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.test_head import check, export
from runtime_tests.test_onnx import assert_all_pass, damage, overwrite, weight_rows
from tests.jobs import tied_and_untied
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.onnx.passes.packing import pack_linear
from vlmq_export.formats.onnx.proof.nodes import table_session
from vlmq_export.formats.onnx.proof.runner import run
from vlmq_export.formats.onnx.read import Linear
from vlmq_export.quantizer.config import QuantConfig

TABLE8 = QuantConfig("rtn", 4, 128, embedding_bits=8)
NAME = "model.embed_tokens"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tied → a random Qwen2-VL of two layers."""
    return tied_and_untied(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """Tied → (reference, ONNX folder)."""
    folder = tmp_path_factory.mktemp("embedding")
    return {t: export(folder / str(t), source=source[t], config=TABLE8) for t in (True, False)}


# --- packing --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    blocks=st.integers(1, 5),
    rows=st.integers(1, 20),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_runtime_decodes_the_rows_that_were_packed(bits, blocks, rows, half, seed):
    """GatherBlockQuantized's own kernel against scale · (code − zero_point) in float64."""
    draw, columns = np.random.default_rng(seed), 32 * blocks
    codes = draw.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    scales = draw.standard_normal((rows, blocks)).astype(np.float16)
    zeros = np.full((rows, blocks), 2 ** (bits - 1), np.uint8)
    packed = pack_linear(codes, scales, zeros, np.arange(columns) // 32, bits, 32)
    dtype = np.float16 if half else np.float32
    table = Linear(
        "table",
        packed.bits,
        packed.block_size,
        packed.weight,
        packed.scales.astype(dtype),
        packed.zero_points,
        None,
        columns,
        0,
        looked_up=True,
    )
    ids = draw.integers(0, rows, 7)
    want = (codes.astype(np.float64) - 2 ** (bits - 1)) * np.repeat(
        scales.astype(np.float64), 32, 1
    )
    got = run(table_session(table, 1), {"ids": ids}, ["y"])[0]
    assert got.dtype == dtype and np.array_equal(got, want[ids].astype(dtype))
    assert np.array_equal(table.decode(), want.astype(np.float32))


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_llama_cpp_passes_every_gate(tied, bits, source, tmp_path):
    reference, folder = export(tmp_path, replace(TABLE8, embedding_bits=bits), source[tied], "gguf")
    assert_all_pass(check(folder, reference, "gguf"))
    types = {name: t.type for name, t in GGUFFile(find_files(folder)[0]).tensors.items()}
    assert types["token_embd.weight"] == {8: "Q8_0", 4: "Q4_0"}[bits]
    assert ("output.weight" in types) == (not tied)


@pytest.mark.parametrize("tied", [True, False])
def test_onnx_runtime_passes_every_gate(tied, exported):
    reference, folder = exported[tied]
    rows = check(folder, reference)
    assert_all_pass(rows)
    by_name = {r.name: r for r in rows}
    assert by_name["each MatMulNBits at level 0"].compared == 14 + tied
    graph = onnx.load(folder / "embedding.onnx", load_external_data=False).graph
    (node,) = (n for n in graph.node if "embed_tokens" in n.name)
    assert node.op_type == "GatherBlockQuantized"


@pytest.mark.parametrize(
    "options", [{"onnx_accuracy_level": 4, "onnx_dtype": "float16"}, {"onnx_graph": "plain"}]
)
def test_four_bits_in_other_packages(options, source, tmp_path):
    config = replace(TABLE8, embedding_bits=4)
    reference, folder = export(tmp_path, config, source[True], options=FormatOptions(**options))
    assert_all_pass(check(folder, reference, **options))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arch", "format"),
    [
        ("qwen2_5_vl", "onnx"),
        slow("smolvlm", "onnx"),
        ("smolvlm", "gguf"),
        ("llava_onevision", "gguf"),
        slow("llava_onevision", "onnx"),
        slow("qwen3_vl", "onnx"),
        slow("internvl", "onnx"),
        slow("internvl", "gguf"),
    ],
)
def test_families(arch, format, tiny, tmp_path):
    reference, folder = export(tmp_path, TABLE8, tiny(arch, tied=True), format)
    assert_all_pass(check(folder, reference, format))


def test_a_head_of_its_own_beside_it(source, tmp_path):
    config = replace(TABLE8, embedding_bits=4, head_bits=8)
    for format in ("onnx", "gguf"):
        reference, folder = export(tmp_path / format, config, source[True], format)
        assert_all_pass(check(folder, reference, format))


def test_genai_answers_as_the_reference(tmp_path, genai):
    reference, folder = export(tmp_path, TABLE8)
    rows = [r for r in check(folder, reference) if "genai: greedy answers" in r.name]
    assert [r.status for r in rows] == ["passed"]


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "kind"), [("scales", "ulp"), ("zero_points", "bit"), ("qweight", "bit")]
)
@pytest.mark.parametrize("tied", [True, False])
def test_one_changed_value_is_caught_and_named(tied, part, kind, exported, tmp_path):
    reference, folder = exported[tied]
    shutil.copytree(folder, tmp_path / "onnx")
    damage(tmp_path / "onnx", "embedding", f"{NAME}.{part}", kind, random.Random(part))
    for row in weight_rows(check(tmp_path / "onnx", reference)):
        assert row.status == "failed" and f"{NAME}.weight" in row.worst


def test_every_level_sees_a_wrong_scale(exported, tmp_path):
    reference, folder = exported[True]
    shutil.copytree(folder, tmp_path / "onnx")

    def change(scales):
        scales[7] *= 1.01

    overwrite(tmp_path / "onnx", "embedding", f"{NAME}.scales", change)
    failed = {r.level: r for r in check(tmp_path / "onnx", reference) if r.status == "failed"}
    assert set(failed) == {"L1", "L2", "L3"} and failed["L2"].worst == "lm_head"


def test_a_head_that_reads_other_integers_than_the_table_is_caught(exported, tmp_path):
    """The decoder's graph points one row of scales too far into the file."""
    reference, folder = exported[True]
    shutil.copytree(folder, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "text.onnx", load_external_data=False)
    (scales,) = (t for t in model.graph.initializer if t.name == "lm_head.scales")
    for entry in scales.external_data:
        if entry.key == "offset":
            entry.value = str(int(entry.value) + 16)
    (tmp_path / "onnx" / "text.onnx").write_bytes(model.SerializeToString())
    for row in weight_rows(check(tmp_path / "onnx", reference)):
        assert row.status == "failed" and f"{NAME}.weight" in row.worst


@pytest.mark.parametrize("at", [0, 40])
def test_llama_cpp_reads_a_changed_table_and_says_so(at, source, tmp_path):
    """A byte of the first scale, or a code of the second block."""
    reference, folder = export(tmp_path, TABLE8, source[True], "gguf")
    text, _ = find_files(folder)
    tensor = GGUFFile(text).tensors["token_embd.weight"]
    data = bytearray(text.read_bytes())
    data[tensor.offset + at] ^= 1
    text.write_bytes(data)
    weights = [r for r in check(folder, reference, "gguf") if r.name.startswith("weights by")]
    assert len(weights) == 3
    assert all(r.status == "failed" and f"{NAME}.weight" in r.worst for r in weights)
