"""The rounding of activations, compared with llama.cpp's library, and what it costs a model."""

from __future__ import annotations

import ctypes
import shutil

import numpy as np
import pytest

from runtime_tests.test_gguf import SETTINGS, export, row, run_check
from tests.artifacts import GRIDS
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.formats.gguf.proof import emulate, shipped
from vlmq_export.formats.gguf.proof.rows import Exported
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.runtime import llama
from vlmq_export.formats.gguf.types.table import TYPES


class Traits(ctypes.Structure):
    """ggml_type_traits_cpu."""

    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


def rounded_by_library(x: np.ndarray, home: str, kind: str) -> np.ndarray:
    """The blocks, uint8 [blocks, bytes], that the kernel of weights of type `home` makes of x."""
    lib = ctypes.CDLL(str(llama.library_path()))
    lib.ggml_cpu_init()
    traits = lib.ggml_get_type_traits_cpu
    traits.restype, traits.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    assert traits(TYPES[home].id).contents.vec_dot_type == TYPES[kind].id
    row_function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    round_row = row_function(traits(TYPES[kind].id).contents.from_float)
    raw = np.zeros((len(x), TYPES[kind].row_bytes(x.shape[1])), np.uint8)
    for values, out in zip(x, raw):
        round_row(values.ctypes.data, out.ctypes.data, x.shape[1])
    return raw.reshape(-1, TYPES[kind].nbytes)


@pytest.mark.parametrize(("home", "kind"), [("Q4_0", "Q8_0"), ("Q4_1", "Q8_1"), ("Q4_K", "Q8_K")])
def test_the_emulated_rounding_is_the_librarys_own_bit_for_bit(home, kind):
    rng = np.random.default_rng(0)
    spread = np.exp(2 * rng.standard_normal((64, 1024)))
    x = (rng.standard_normal((64, 1024)) * spread).astype(np.float32)
    x[3, :256] = 0
    blocks = rounded_by_library(x, home, kind)
    if kind == "Q8_K":
        codes, scale = emulate.q8_k(x)
        stored = blocks[:, :4].copy().view("<f4")[:, 0]
        np.testing.assert_array_equal(stored, scale.reshape(-1))
        np.testing.assert_array_equal(blocks[:, 4:260].view(np.int8), codes.reshape(-1, 256))
        return
    codes, scale = emulate.q8_0(x)
    head = blocks[:, :-32].copy().view("<f2")
    np.testing.assert_array_equal(head[:, 0], scale.astype(np.float16).reshape(-1))
    np.testing.assert_array_equal(blocks[:, -32:].view(np.int8), codes.reshape(-1, 32))
    if kind == "Q8_1":
        sums = (scale * codes.sum(-1, dtype=np.float32)).astype(np.float16)
        np.testing.assert_array_equal(head[:, 1], sums.reshape(-1))


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory):
    """A random model in TQ2_0 and Q2_K, to which rounded inputs cost more than the usual gate."""
    folder = tmp_path_factory.mktemp("two_bits")
    source = make_random_checkpoint(folder / "model", "qwen2_5_vl", layers=4, depth=4)
    return export(folder, GRIDS["w2"], source)


def test_a_model_is_held_to_what_rounding_costs_itself(two_bits):
    reference, folder = two_bits
    found = row(run_check(reference, folder), "shipped file through mtmd")
    assert found.status == "passed" and found.value > 5e-2 and "costs this model" in found.detail
    assert found.value < found.gate < 1.4 * found.value  # the gate is not too wide


def test_a_shipped_file_twice_as_far_off_as_rounding_explains_fails(two_bits):
    reference, folder = two_bits
    export, samples = Exported.open(folder, reference, SETTINGS), reference.prompts[:3]
    before = {s.id: reference.logits(s).copy() for s in samples}
    cost = emulate.cost(reference, export.layout, export.types, samples)
    # the reference no longer rounds its activations afterwards
    assert all(np.array_equal(before[s.id], reference.logits(s)) for s in samples)
    assert shipped.shipped_row(export, samples, cost).status == "passed"
    twice = {name: 2 * error for name, error in cost.items()}
    assert shipped.shipped_row(export, samples, twice).status == "failed"


def test_a_changed_weight_of_it_fails_by_name(two_bits, tmp_path):
    """The readers and the products catch a change that the wider gate lets pass."""
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
