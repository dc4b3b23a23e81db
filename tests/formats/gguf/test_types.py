"""GGUF's block types.

Packers are compared with bytes written by hand and with scalar loops, decoders with gguf-py and
with llama.cpp's library. The home of an affine grid, the block type that holds it, must be exact: a
packed row decodes to scale · (code − zero_point), to the last bit.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quantizer.grids.test_blocks import random_points
from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.read import _libggml, _to_float
from vlmq_export.formats.gguf.types.decode import DECODERS, decode
from vlmq_export.formats.gguf.types.encode import PACKERS, Blocks, pack_blocks
from vlmq_export.formats.gguf.types.exact import (
    grid_home,
    home_of,
    pack_linear,
    planned_home,
    why_homeless,
)
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.grids.solutions import Solution

AFFINE = sorted(DECODERS)
# sub-blocks of a block
SUBS = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 8, "Q5_K": 8, "Q6_K": 16, "IQ4_XS": 8}
LATTICES = {"IQ3_S": 8, "IQ3_XXS": 8, "IQ2_S": 16, "IQ2_XS": 16, "IQ2_XXS": 8}
SUBS |= LATTICES
# Stored scales of sub-blocks are below this number. Those of Q6_K may be any byte.
SCALE_LIMIT = {"Q2_K": 16, "Q3_K": 64, "Q4_K": 64, "Q5_K": 64, "IQ4_XS": 64}
SCALE_LIMIT |= dict.fromkeys(LATTICES, 16)
OFFSET = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")  # types with an offset, m or dmin


def by_library(raw: np.ndarray, name: str) -> np.ndarray:
    """The values of raw blocks, float32, as llama.cpp's library decodes them."""
    t = TYPES[name]
    return _to_float(_libggml(), t.id, raw.reshape(-1), raw.size // t.nbytes * t.block)


def random_blocks(rng: np.random.Generator, name: str, n: int) -> Blocks:
    limit, t = PACKERS[name].limit, TYPES[name]
    low, dtype = (-limit, np.int8) if name == "Q8_0" else (0, np.uint8)

    def half() -> np.ndarray:
        return rng.standard_normal(n).astype(np.float16)

    def sub_blocks() -> np.ndarray:
        return rng.integers(0, SCALE_LIMIT.get(name, 256), (n, SUBS[name]), dtype=np.uint8)

    codes = rng.integers(low, limit, (n, t.block)).astype(dtype)
    if lattice := GRIDS[name].lattice:
        codes = random_points(lattice, rng, n, t.block)
    return Blocks(
        half(),
        codes,
        half() if name in OFFSET else None,
        sub_blocks() if name in SUBS else None,
        sub_blocks() if name in SUBS and name in OFFSET else None,
    )


# --- the table ------------------------------------------------------------------------------------


def test_table_agrees_with_gguf_py_and_the_library():
    lib = _libggml()
    lib.ggml_type_size.restype, lib.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    for t in TYPES.values():
        size = (t.block, t.nbytes)
        assert (lib.ggml_blck_size(t.id), lib.ggml_type_size(t.id)) == size, t.name
        # gguf-py 0.19 does not know Q2_0, and says that a block of Q8_1 has 40 bytes
        if t.name not in ("Q2_0", "Q8_1"):
            theirs = gguf.GGMLQuantizationType[t.name]
            assert gguf.GGML_QUANT_SIZES[theirs] == size, t.name
            assert theirs == t.id


# --- packers --------------------------------------------------------------------------------------

ONE, MINUS_TWO = struct.pack("<e", 1), struct.pack("<e", -2)  # d and m of every block here
RAMP = bytes(i | (15 - i) << 4 for i in range(16))  # the codes 0, 1, … 15, 15, 14, … 0 in nibbles


@pytest.mark.parametrize(
    "name, fields, expected",
    [
        ("Q4_0", {}, [ONE, RAMP]),
        ("Q4_1", {}, [ONE, MINUS_TWO, RAMP]),
        (
            "Q5_0",
            {"codes": [31] + [0] * 30 + [16]},
            [ONE, bytes([1, 0, 0, 0x80, 15] + [0] * 15)],
        ),
        (
            "Q8_0",
            {"codes": [-128, 127] + [-1] * 30},
            [ONE, bytes([0x80, 0x7F] + [0xFF] * 30)],
        ),
        (
            "Q2_K",
            {
                "codes": [3] + [0] * 31 + [1] + [0] * 95 + [2] + [0] * 127,
                "scales": [15] + [1] * 15,
                "mins": [2] * 15 + [7],
            },
            [
                bytes([0x2F] + [0x21] * 14 + [0x71]),
                bytes([3 | 1 << 2] + [0] * 31 + [2] + [0] * 31),
                ONE,
                MINUS_TWO,
            ],
        ),
        (
            "Q3_K",
            {
                "codes": [7] + [0] * 31 + [4] + [0] * 190 + [5] + [0] * 32,
                "scales": [63] + [0] * 7 + [18] + [0] * 6 + [33],
            },
            [
                bytes([3] + [0] * 30 + [64]),
                bytes([3] + [0] * 31 + [0] * 31 + [1 << 4]),
                bytes([15 | 2 << 4, 0, 0, 0, 0, 0, 0, 1 << 4]),
                bytes([3 | 1 << 4, 0, 0, 2 << 6]),
                ONE,
            ],
        ),
        (
            "Q4_K",
            {
                "codes": [9] + [0] * 31 + [6] + [0] * 222 + [15],
                "scales": [63, 1, 1, 1, 1, 1, 1, 34],
                "mins": [0] * 7 + [51],
            },
            [
                ONE,
                MINUS_TWO,
                bytes([63, 1, 1, 1 | 2 << 6]),
                bytes([0, 0, 0, 3 << 6]),
                bytes([1, 1, 1, 2 | 3 << 4]),
                bytes([9 | 6 << 4] + [0] * 126 + [15 << 4]),
            ],
        ),
        ("IQ4_NL", {}, [ONE, RAMP]),
        (
            "IQ4_XS",
            {
                "codes": [9] + [0] * 15 + [6] + [0] * 238 + [15],
                "scales": [63, 1, 16, 0, 0, 0, 0, 34],
            },
            [
                ONE,
                bytes([3 | 1 << 4, 2 << 6]),
                bytes([15 | 1 << 4, 0, 0, 2 << 4]),
                bytes([9 | 6 << 4] + [0] * 126 + [15 << 4]),
            ],
        ),
        (
            "TQ2_0",
            {"codes": [3] + [0] * 127 + [2] + [0] * 127},
            [bytes([3] + [0] * 31 + [2] + [0] * 31), ONE],
        ),
    ],
)
def test_golden_bytes(name, fields, expected):
    """`fields` without codes has those of RAMP."""
    codes = fields.get("codes", [*range(16), *range(15, -1, -1)])
    scales, mins = (
        np.array([fields[key]], np.uint8) if key in fields else None for key in ("scales", "mins")
    )
    dtype = np.int8 if name == "Q8_0" else np.uint8
    offset = np.array([-2], np.float16) if name in OFFSET else None
    blocks = Blocks(np.array([1], np.float16), np.array([codes], dtype), offset, scales, mins)
    assert pack_blocks(name, blocks).tobytes() == b"".join(expected)


IQ4 = gguf.quants.IQ4_NL.kvalues
CENTRE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0, "TQ2_0": 1, "Q2_0": 1}  # the code that decodes to 0


def slow_decode(name: str, b: Blocks, i: int) -> list[float]:
    """Block `i` by its type's formula, one element at a time, in float32."""
    f = np.float32
    d, m = f(b.d[i]), f(b.m[i]) if b.m is not None else f(0)
    out = []
    for e, q in enumerate(b.codes[i].tolist()):
        if name in CENTRE:
            out.append(d * f(q - CENTRE[name]))
        elif name in ("Q4_1", "Q5_1"):
            out.append(d * f(q) + m)
        elif name == "Q6_K":
            out.append(d * f(b.scales.view(np.int8)[i, e // 16]) * f(q - 32))
        elif name == "IQ4_NL":
            out.append(d * f(IQ4[q]))
        elif name in LATTICES:
            step = 2 * int(b.scales[i, e // (256 // SUBS[name])]) + 1
            out.append(d * f(step) * f(GRIDS[name].levels[q]))
        elif name == "IQ4_XS":
            out.append(d * f(int(b.scales[i, e // 32]) - 32) * f(IQ4[q]))
        elif name == "Q3_K":
            out.append(d * f(int(b.scales[i, e // 16]) - 32) * f(q - 4))
        else:
            each = 256 // SUBS[name]
            out.append(d * f(b.scales[i, e // each]) * f(q) - m * f(b.mins[i, e // each]))
    return out


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(PACKERS)), seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5))
def test_packed_fields_come_back(name, seed, n):
    blocks = random_blocks(np.random.default_rng(seed), name, n)
    raw = pack_blocks(name, blocks)
    assert raw.shape == (n, TYPES[name].nbytes)
    got = decode(raw.reshape(-1), TYPES[name], (n, TYPES[name].block))
    assert got.tolist() == [slow_decode(name, blocks, i) for i in range(n)]


@pytest.mark.parametrize("name", sorted(PACKERS))
def test_packers_refuse_what_does_not_fit(name):
    rng = np.random.default_rng(0)
    good = random_blocks(rng, name, 2)
    bad = [
        {"d": np.array([1, np.inf], np.float16)},
        {"codes": good.codes[:, :-1]},
        {"codes": good.codes.astype(np.int16)},
    ]
    bad += [{"m": None if good.m is not None else good.d}]
    if name != "Q8_0":
        bad.append({"codes": np.full_like(good.codes, PACKERS[name].limit)})
    if good.scales is not None:
        if name in SCALE_LIMIT:
            bad.append({"scales": np.full_like(good.scales, SCALE_LIMIT[name])})
        bad.append({"scales": None})
    for change in bad:
        fields = {k: getattr(good, k) for k in ("d", "codes", "m", "scales", "mins")} | change
        with pytest.raises(ValueError, match=name):
            pack_blocks(name, Blocks(**fields))


@pytest.mark.parametrize("name", LATTICES)
def test_packers_refuse_what_is_no_point(name):
    good = random_blocks(np.random.default_rng(0), name, 2)
    top, lattice = PACKERS[name].limit, GRIDS[name].lattice
    codes = good.codes.copy()
    codes[1, :8] = [0, top - 1, 0, top - 1, 0, top - 1, 0, top - 1]  # the largest magnitude alone
    codes[1, 1] = top // 2  # beside the smallest
    changes = [codes]
    if lattice.even:
        codes = good.codes.copy()
        codes[0, 5] = top - 1 - codes[0, 5]  # the other sign
        changes.append(codes)
    for codes in changes:
        with pytest.raises(ValueError, match=f"{name} holds"):
            pack_blocks(name, replace(good, codes=codes))


# --- decoders -------------------------------------------------------------------------------------


def raw_blocks(name: str) -> np.ndarray:
    """Random bytes and extreme ones: zeros, ones, alternating bits. float16 fields may be NaN."""
    rng = np.random.default_rng(AFFINE.index(name))
    random = rng.integers(0, 256, (400, TYPES[name].nbytes), dtype=np.uint8)
    extremes = np.array([0, 255, 0x55, 0xAA, 0x80, 0x7F, 1], np.uint8)
    return np.concatenate([random, extremes[:, None].repeat(TYPES[name].nbytes, axis=1)])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", AFFINE)
def test_decoders_agree_bit_for_bit(name):
    raw = raw_blocks(name)
    ours = decode(raw.reshape(-1), TYPES[name], (len(raw), TYPES[name].block))
    assert np.array_equal(by_library(raw, name).reshape(ours.shape), ours, equal_nan=True)
    if name != "Q2_0":
        theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
        assert np.array_equal(theirs, ours, equal_nan=True)


def test_decoding_in_chunks_is_decoding_at_once(monkeypatch):
    raw = raw_blocks("Q4_K")
    whole = decode(raw.reshape(-1), TYPES["Q4_K"], (len(raw), 256))
    monkeypatch.setattr("vlmq_export.formats.gguf.types.decode._CHUNK", 256 * 7)
    parts = decode(raw.reshape(-1), TYPES["Q4_K"], (len(raw), 256))
    assert np.array_equal(parts, whole, equal_nan=True)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_floats(name):
    raw = np.random.default_rng(3).integers(0, 256, 4096, dtype=np.uint8)
    n = raw.size // TYPES[name].nbytes
    ours = decode(raw, TYPES[name], (n,))
    assert np.array_equal(by_library(raw, name), ours, equal_nan=True)
    if name == "BF16":
        by_torch = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).float().numpy()
        assert np.array_equal(by_torch, ours, equal_nan=True)


def test_a_type_without_a_decoder_is_named():
    with pytest.raises(FormatError, match="IQ1_M"):
        decode(np.zeros(56, np.uint8), TYPES["IQ1_M"], (1, 256))


# --- homes ----------------------------------------------------------------------------------------


def make_linear(
    rng, *, bits, group_size, symmetric=False, rows=3, columns=512, scales="portable", zeros=None
) -> QuantizedLinear:
    """A linear of random integers.

    scales: "portable" (scale · zero_point is exact in float16), "free" (any float16), "tiny"
        (float16 subnormals) or "huge" (the largest float16).
    zeros: the zero-points to draw from; None: 1 and up. A symmetric grid has its own.
    """
    groups = 1 if group_size == -1 else columns // group_size
    s = rng.lognormal(-3, 2, (rows, groups)).astype(np.float16)
    if scales == "portable":  # significands of 7 bits
        m, e = np.frexp(s.astype(np.float32))
        s = np.ldexp(np.ceil(m * 128) / 128, e).astype(np.float16)
    elif scales == "tiny":
        s = (rng.integers(1, 1024, s.shape) * 2.0**-24).astype(np.float16)
    elif scales == "huge":
        s = np.full(s.shape, 65504, np.float16)
    if symmetric:
        z = np.full((rows, groups), 2 ** (bits - 1), np.uint8)
    else:
        z = rng.choice(zeros or np.arange(1, 2**bits), (rows, groups)).astype(np.uint8)
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    g_idx = (torch.arange(columns) // (columns // groups)).int()
    solution = Solution(*map(torch.from_numpy, (codes, s, z)), g_idx)
    name = "model.layers.0.mlp.down_proj"
    return QuantizedLinear(name, solution, None, bits, group_size, symmetric)


# bits, group_size, symmetric, columns, scales (see make_linear), zero-points; then their home
HOMES = [
    (8, 128, True, 512, "free", None, "Q8_0"),
    (8, -1, True, 96, "free", None, "Q8_0"),
    (4, 128, True, 512, "free", None, "Q4_0"),
    (4, -1, True, 512, "free", None, "Q4_0"),
    (4, 128, False, 512, "portable", None, "Q4_1"),
    (4, 32, False, 512, "portable", None, "Q4_1"),
    (4, 128, False, 512, "free", None, "Q5_0"),
    (4, -1, False, 896, "portable", None, "Q4_1"),
    (4, -1, False, 896, "free", None, "Q5_0"),
    (4, 128, False, 512, "huge", None, "Q5_0"),
    (4, 128, False, 512, "tiny", None, "Q5_0"),
    (4, 256, False, 512, "free", None, "Q4_K"),
    (4, -1, False, 512, "free", None, "Q4_K"),
    (4, 512, False, 1024, "huge", None, "Q4_K"),
    (3, 128, False, 512, "free", None, "Q4_0"),
    (3, 64, True, 512, "free", None, "Q4_0"),
    (3, -1, False, 896, "free", None, "Q4_0"),
    (3, 256, False, 512, "free", None, "Q4_K"),
    (3, -1, True, 512, "free", None, "Q3_K"),
    (3, 256, True, 512, "tiny", None, "Q3_K"),
    (2, 128, False, 512, "free", None, "Q4_0"),
    (2, 32, True, 512, "free", None, "Q4_0"),
    (2, -1, False, 512, "free", [1, 2, 3], "Q2_K"),
    (2, 256, False, 512, "tiny", [3], "Q2_K"),
    (2, -1, False, 512, "free", [1, 2], "TQ2_0"),
    (2, 256, True, 512, "huge", None, "TQ2_0"),
]


@pytest.mark.parametrize("bits, group, symmetric, columns, scales, zeros, home", HOMES)
def test_every_home_is_exact_in_every_decoder(bits, group, symmetric, columns, scales, zeros, home):
    rng = np.random.default_rng(bits + columns)
    grid = {"bits": bits, "group_size": group, "symmetric": symmetric}
    linear = make_linear(rng, **grid, rows=40, columns=columns, scales=scales, zeros=zeros)
    assert home_of(linear) == home
    raw = pack_linear(linear, home)
    want = linear.decode().numpy()
    assert raw.shape == (40, TYPES[home].row_bytes(columns))
    assert np.array_equal(decode(raw.reshape(-1), TYPES[home], want.shape), want)
    assert np.array_equal(gguf.dequantize(raw, gguf.GGMLQuantizationType[home]), want)
    assert np.array_equal(by_library(raw, home).reshape(want.shape), want)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([32, 64, 96, 128, 256, 512, -1]),
    symmetric=st.booleans(),
    blocks=st.sampled_from([1, 2, 6]),
    scales=st.sampled_from(["portable", "free", "tiny"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_has_a_home_is_exact_there(bits, group, symmetric, blocks, scales, seed):
    columns = 256 * blocks if group == -1 else group * blocks
    grid = {"bits": bits, "group_size": group, "symmetric": symmetric or bits == 8}
    linear = make_linear(np.random.default_rng(seed), **grid, columns=columns, scales=scales)
    home = home_of(linear)
    got = decode(pack_linear(linear, home).reshape(-1), TYPES[home], linear.solution.codes.shape)
    assert np.array_equal(got, linear.decode().numpy())
    planned = TYPES[planned_home(QuantConfig(**grid), columns)]
    if scales == "portable":  # what is written never takes more than the plan promises
        assert TYPES[home].bits_per_weight <= planned.bits_per_weight


def test_every_zero_point_and_code_of_every_grid():
    """All pairs of a code and a zero-point: wrong signs would show at the ends of the ranges."""
    for bits, group_size in ((4, 32), (4, 256), (3, 32), (3, 256), (2, 32), (2, 256)):
        top = 2**bits
        zeros = np.arange(1, top, dtype=np.uint8)[:, None].repeat(256 // group_size, 1)
        codes = np.tile(np.arange(top, dtype=np.uint8), (len(zeros), 256 // top))  # [out, 256]
        for s in (0.3, 0.5, 6.1e-5):
            scales = np.full(zeros.shape, s, np.float16)
            g_idx = torch.arange(256).int() // group_size
            solution = Solution(*map(torch.from_numpy, (codes, scales, zeros)), g_idx)
            linear = QuantizedLinear("x", solution, None, bits, group_size, False)
            home = home_of(linear)
            got = decode(pack_linear(linear, home).reshape(-1), TYPES[home], codes.shape)
            assert np.array_equal(got, linear.decode().numpy()), (bits, group_size, s, home)


def changed(linear: QuantizedLinear, **parts: torch.Tensor) -> QuantizedLinear:
    return replace(linear, solution=replace(linear.solution, **parts))


def permuted(linear: QuantizedLinear) -> QuantizedLinear:
    order = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(0))
    return changed(linear, g_idx=linear.solution.g_idx[order])


def test_a_permuted_order_is_refused_unless_there_is_one_group():
    rng = np.random.default_rng(0)
    grouped = permuted(make_linear(rng, bits=4, group_size=128))
    for act in (home_of, lambda q: pack_linear(q, "Q4_1")):
        with pytest.raises(FormatError, match=r"down_proj.*--act-order"):
            act(grouped)
    assert home_of(permuted(make_linear(rng, bits=4, group_size=-1))) == "Q4_K"


def test_a_reversed_or_shifted_order_is_seen():
    """Groups that are contiguous but not in order must not pass for natural."""
    linear = make_linear(np.random.default_rng(0), bits=4, group_size=128)
    with pytest.raises(FormatError, match="act-order"):
        home_of(changed(linear, g_idx=linear.solution.g_idx.flip(0)))
    uneven = torch.arange(4).repeat_interleave(torch.tensor([100, 156, 128, 128])).int()
    with pytest.raises(FormatError, match="act-order"):
        home_of(changed(linear, g_idx=uneven))


def test_integers_that_leave_their_grid_are_refused_by_name():
    linear = make_linear(np.random.default_rng(0), bits=4, group_size=128, symmetric=True)
    wrong = changed(linear, zero_points=torch.full_like(linear.solution.zero_points, 3))
    with pytest.raises(FormatError, match=r"down_proj.*Q4_0"):
        pack_linear(wrong, "Q4_0")
    infinite = changed(linear, scales=torch.full_like(linear.solution.scales, float("inf")))
    with pytest.raises(FormatError, match="finite"):
        pack_linear(infinite, "Q4_0")
    free = make_linear(np.random.default_rng(0), bits=4, group_size=128, scales="free")
    with pytest.raises(FormatError, match="not exact in float16"):
        pack_linear(free, "Q4_1")
    ternary = make_linear(np.random.default_rng(0), bits=2, group_size=256, zeros=[1, 2, 3])
    with pytest.raises(FormatError, match="neither 1 nor 2"):
        pack_linear(ternary, "TQ2_0")


def test_grids_without_a_home_say_what_to_change():
    assert grid_home(8, False, 128, portable=True, ternary=False) is None
    assert "--sym" in why_homeless("x", QuantConfig(bits=8, symmetric=False), 512)
    odd = QuantConfig(bits=4, group_size=48)
    assert planned_home(odd, 480) is None
    assert "--group-size 32, 64 or 128" in why_homeless("x", odd, 480)
    whole = QuantConfig(bits=4, group_size=-1)
    assert planned_home(whole, 3420) is None
    assert "x has rows of 3420" in why_homeless("x", whole, 3420)
    with pytest.raises(FormatError, match="8 bits asymmetric"):
        home_of(make_linear(np.random.default_rng(0), bits=8, group_size=128))
