"""llama.cpp's block types as grids: decode and bytes against gguf-py and libggml, the fit against ggml's own."""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.formats.gguf.decode import decode
from vlmq_export.formats.gguf.homes import pack_linear
from vlmq_export.formats.gguf.llama import library_path
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.artifact import BlockLinear
from vlmq_export.quantizer.kquants import GRIDS, BlockGrid, Params


def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


def round_to_grid(weights: torch.Tensor, grid: BlockGrid, importance: torch.Tensor) -> BlockLinear:
    params = grid.fit(weights, importance)
    scale, minimum = (p.repeat_interleave(grid.sub_block, 1) for p in params.decoded())
    codes = grid.encode(weights, scale, minimum).to(torch.uint8)
    return BlockLinear("x", codes, params, None, grid.name)


def random_linear(name: str, seed: int, *, extreme: bool) -> BlockLinear:
    """Any codes and parameters that the type can hold, at its limits where `extreme`."""
    grid, rng = GRIDS[name], np.random.default_rng(seed)
    rows, columns = 3, 512
    blocks, subs = columns // grid.block, columns // grid.sub_block
    low, high = grid.scale_limits

    def half() -> torch.Tensor:
        bits = rng.integers(0, 0x7C00, (rows, blocks)) if extreme else rng.integers(0x1000, 0x3000, (rows, blocks))
        return torch.from_numpy((bits | rng.integers(0, 2, bits.shape) << 15).astype(np.uint16).view(np.float16))

    def whole(a: int, b: int) -> torch.Tensor:
        values = rng.choice([a, b], (rows, subs)) if extreme else rng.integers(a, b, (rows, subs), endpoint=True)
        return torch.from_numpy(values.astype(np.int16))

    minimum = (half(), whole(0, high) if high > 1 else torch.ones(rows, subs, dtype=torch.int16)) if grid.affine else ()
    codes = torch.from_numpy(rng.integers(0, grid.top, (rows, columns), endpoint=True).astype(np.uint8))
    return BlockLinear("x", codes, Params(half(), whole(low, high), *minimum), None, name)


def by_libggml(raw: np.ndarray, name: str, shape: tuple[int, int]) -> np.ndarray:
    function = getattr(library(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    out = np.empty(shape, np.float32)
    function(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    return out


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("extreme", [False, True])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_reader_decodes_the_bytes_alike(name, extreme, seed):
    linear = random_linear(name, seed, extreme=extreme)
    raw, want = pack_linear(linear, name), linear.decode().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        readers = {
            "ours": decode(raw.reshape(-1), TYPES[name], want.shape),
            "gguf-py": gguf.dequantize(raw, gguf.GGMLQuantizationType(TYPES[name].id)),
            "libggml": by_libggml(raw, name, want.shape),
        }
    for who, got in readers.items():
        assert np.array_equal(got, want, equal_nan=True), who


def peer(weights: torch.Tensor, name: str, importance: torch.Tensor) -> torch.Tensor:
    """ggml's own fit with these column weights as its importance matrix."""
    t, (rows, columns) = TYPES[name], weights.shape
    source, weight = weights.numpy().copy(), importance.numpy().copy()
    raw = np.zeros((rows, t.row_bytes(columns)), np.uint8)
    quantize = library().ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointers = (ctypes.c_void_p(x.ctypes.data) for x in (source, raw))
    counts = (ctypes.c_int64(n) for n in (0, rows, columns))
    assert quantize(ctypes.c_int(t.id), *pointers, *counts, ctypes.c_void_p(weight.ctypes.data)) == raw.nbytes
    return torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType(t.id)).copy())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("tail", ["normal", "heavy", "positive"])
def test_the_fit_is_no_worse_than_ggmls_own(name, tail):
    draw = torch.Generator().manual_seed(7)
    weights = torch.randn(64, 512, generator=draw) * 0.02
    if tail == "heavy":
        weights = weights * torch.randn(64, 512, generator=draw).abs() ** 2
    if tail == "positive":
        weights = weights.abs() + 0.01
    importance = torch.randn(512, generator=draw).exp()

    def error(found: torch.Tensor) -> float:
        return float(((found - weights).square() * importance).sum())

    ours = round_to_grid(weights, GRIDS[name], importance)
    assert error(ours.decode()) <= 1.002 * error(peer(weights, name, importance))


@pytest.mark.parametrize("name", GRIDS)
def test_weights_on_the_grid_come_back(name):
    """Idempotence: what the type can hold exactly is found again, to the rounding of a refit."""
    weights = random_linear(name, 3, extreme=False).decode()
    again = round_to_grid(weights, GRIDS[name], torch.ones(weights.shape[1])).decode()
    assert (again - weights).norm() <= (0.02 if GRIDS[name].bits > 2 else 0.06) * weights.norm()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("value", [0.0, 3e-8, 70000.0])
def test_constant_blocks_stay_finite(name, value):
    weights = torch.full((2, 512), value)
    weights[1] *= -1
    found = round_to_grid(weights, GRIDS[name], torch.ones(512)).decode()
    assert torch.isfinite(found).all()
    if value == 0:
        assert (found == 0).all()
