"""Activations rounded as llama.cpp rounds them: bit for bit the library's own, and what that costs a model."""

from __future__ import annotations

import ctypes
import importlib
import shutil

import numpy as np
import pytest

from runtime_tests.test_gguf import export, row, run_check
from tests.artifacts import GRIDS
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.formats.gguf import emulate, llama
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.types import TYPES


class Traits(ctypes.Structure):
    """ggml_type_traits_cpu."""

    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


@pytest.mark.parametrize(("home", "kind", "size", "block"), [("Q4_0", "Q8_0", 34, 32), ("Q4_1", "Q8_1", 36, 32), ("Q4_K", "Q8_K", 292, 256)])  # fmt: skip
def test_the_emulated_rounding_is_the_librarys_own_bit_for_bit(home, kind, size, block):
    lib = ctypes.CDLL(str(llama.library_path()))
    lib.ggml_cpu_init()
    traits = lib.ggml_get_type_traits_cpu
    traits.restype, traits.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    activation = traits(TYPES[home].id).contents.vec_dot_type
    assert activation == TYPES[kind].id
    round_row = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
        traits(activation).contents.from_float
    )
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 1024)) * np.exp(2 * rng.standard_normal((64, 1024)))).astype(np.float32)
    x[3, :256] = 0
    raw = np.zeros((64, 1024 // block * size), np.uint8)
    for r, out in zip(x, raw):
        round_row(r.ctypes.data, out.ctypes.data, 1024)
    blocks = raw.reshape(-1, size)
    if kind == "Q8_K":
        codes, scale = emulate.q8_k(x)
        stored = blocks[:, :4].copy().view("<f4")[:, 0]
        np.testing.assert_array_equal(stored, scale.reshape(-1))
        np.testing.assert_array_equal(blocks[:, 4:260].view(np.int8), codes.reshape(-1, 256))
        return
    codes, scale = emulate.q8_0(x)
    head = blocks[:, : size - 32].copy().view("<f2")
    np.testing.assert_array_equal(head[:, 0], scale.astype(np.float16).reshape(-1))
    np.testing.assert_array_equal(blocks[:, size - 32 :].view(np.int8), codes.reshape(-1, 32))
    if kind == "Q8_1":
        np.testing.assert_array_equal(
            head[:, 1], (scale * codes.sum(-1, dtype=np.float32)).astype(np.float16).reshape(-1)
        )


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory):
    """A random model whom 8-bit activations cost more than the usual bound: all of its linears in TQ2_0 or Q2_K."""
    folder = tmp_path_factory.mktemp("two_bits")
    source = make_random_checkpoint(folder / "model", "qwen2_5_vl", layers=4, depth=4)
    return export(folder, GRIDS["w2"], source)


def test_a_model_is_held_to_what_rounding_costs_itself(two_bits):
    reference, folder = two_bits
    found = row(run_check(reference, folder), "shipped file through mtmd")
    assert found.status == "passed" and found.value > 5e-2 and "costs this model" in found.detail
    assert found.value < found.gate < 1.4 * found.value  # no wider than it must be


def test_a_shipped_file_twice_as_far_off_as_rounding_explains_fails(two_bits):
    checks = importlib.import_module("vlmq_export.formats.gguf.check")
    reference, folder = two_bits
    files, samples = checks._Files.open(folder, reference), reference.prompts[:3]
    before = {s.id: reference.logits(s).copy() for s in samples}
    cost = checks.rounding.cost(reference, files.hub, files.types, samples)
    assert all(np.array_equal(before[s.id], reference.logits(s)) for s in samples)  # nothing stays rounded
    assert checks.shipped_row(files, reference, samples, cost).status == "passed"
    assert checks.shipped_row(files, reference, samples, {k: 2 * v for k, v in cost.items()}).status == "failed"


def test_a_changed_weight_of_it_fails_by_name(two_bits, tmp_path):
    """What the wider bound lets pass, the readers and each product do not."""
    reference, folder = two_bits
    shutil.copytree(folder, tmp_path / "gguf")
    text, _ = find_files(tmp_path / "gguf")
    tensor = GGUFFile(text).tensors["blk.1.ffn_up.weight"]
    data = bytearray(text.read_bytes())
    data[tensor.offset + 3] ^= 1
    text.write_bytes(data)
    rows = run_check(reference, tmp_path / "gguf")
    failed = {r.level for r in rows if r.status == "failed"}
    assert {"L1", "L2"} <= failed
    assert all("layers.1.mlp.up_proj" in r.worst for r in rows if r.name.startswith("weights by"))
