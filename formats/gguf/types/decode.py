"""Decodes tensors to float32 by the per-element formulas of GGML's types.

`encode.py` has the layouts. This module is written apart from the packers there, and from the other
end: a packer moves whole runs of codes, while a decoder says in which byte and at which shift
element e of a block lies.

    code(e) = bytes[byte(e)] >> shift(e) & mask

Every product here is exact in float32. At most one rounding remains, that of the sum, and the
result is therefore equal to that of ggml and gguf-py bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.types.table import GGMLType

_CHUNK = 2**16  # elements decoded at once, so that the intermediate arrays stay in the cache
E = np.arange(256)  # the elements of a super-block
J = E[:32]  # the elements of a block of 32

# In all functions, b is uint8 [n, nbytes]: n blocks.


def _bits(b: np.ndarray, byte: np.ndarray, shift: np.ndarray, mask: int) -> np.ndarray:
    """Some bits of some bytes, uint8 [n, len(byte)]."""
    return b[:, byte] >> shift.astype(np.uint8) & np.uint8(mask)


def _half(b: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at`, float32 [n, 1]."""
    return np.ascontiguousarray(b[:, at : at + 2]).view("<f2").astype(np.float32)


def _f32(x: np.ndarray, minus: int = 0) -> np.ndarray:
    """Integers as float32, less `minus`."""
    return x.astype(np.float32) - np.float32(minus)


def _nibbles(b: np.ndarray, start: int) -> np.ndarray:
    """The 4-bit codes of a block of 32, [n, 32], from 16 bytes."""
    return _bits(b, start + J % 16, J // 16 * 4, 15)


def _five(b: np.ndarray, high: int, low: int) -> np.ndarray:
    """The 5-bit codes of a block of 32, [n, 32]: fourth bits at byte `high`, the rest at `low`."""
    return _nibbles(b, low) | _bits(b, high + J // 8, J % 8, 1) << 4


def _crumbs(b: np.ndarray, start: int) -> np.ndarray:
    """The 2-bit codes of a super-block, [n, 256], from 64 bytes."""
    return _bits(b, start + 32 * (E // 128) + E % 32, E % 128 // 32 * 2, 3)


def _wide_nibbles(b: np.ndarray, start: int) -> np.ndarray:
    """The 4-bit codes of a super-block, [n, 256], from 128 bytes."""
    return _bits(b, start + 32 * (E // 64) + E % 32, E % 64 // 32 * 4, 15)


def _top_bit(b: np.ndarray, start: int) -> np.ndarray:
    """The highest bits of the codes of a super-block, [n, 256], from 32 bytes."""
    return _bits(b, start + E % 32, E // 32, 1)


def _pairs(b: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, [n, 8] each, from 12 bytes."""
    s = b[:, start : start + 12]
    scales, mins = [], []
    for j in range(8):
        if j < 4:
            scales.append(s[:, j] & 63)
            mins.append(s[:, j + 4] & 63)
        else:
            scales.append(s[:, j + 4] & 15 | s[:, j - 4] >> 6 << 4)
            mins.append(s[:, j + 4] >> 4 | s[:, j] >> 6 << 4)
    return np.stack(scales, 1), np.stack(mins, 1)


def _affine_k(
    b: np.ndarray, d: int, dmin: int, scales: np.ndarray, mins: np.ndarray, q: np.ndarray
) -> np.ndarray:
    """(d · scale) · q − dmin · min, [n, 256].

    d, dmin: bytes where the two float16 lie.
    scales, mins: [n, sub-blocks].
    """
    each = 256 // scales.shape[1]
    factor = np.repeat(_half(b, d) * _f32(scales), each, axis=1)
    return factor * _f32(q) - np.repeat(_half(b, dmin) * _f32(mins), each, axis=1)


def _q2_k(b: np.ndarray) -> np.ndarray:
    return _affine_k(b, 80, 82, b[:, :16] & 15, b[:, :16] >> 4, _crumbs(b, 16))


def _q3_k(b: np.ndarray) -> np.ndarray:
    i = np.arange(16)
    scales = _bits(b, 96 + i % 8, i // 8 * 4, 15) | _bits(b, 104 + i % 4, i // 4 * 2, 3) << 4
    q = _crumbs(b, 32) | _top_bit(b, 0) << 2
    return np.repeat(_half(b, 108) * _f32(scales, 32), 16, axis=1) * _f32(q, 4)


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _affine_k(b, 0, 2, *_pairs(b, 4), _wide_nibbles(b, 16))


def _q5_k(b: np.ndarray) -> np.ndarray:
    return _affine_k(b, 0, 2, *_pairs(b, 4), _wide_nibbles(b, 48) | _top_bit(b, 16) << 4)


def _q6_k(b: np.ndarray) -> np.ndarray:
    n, k, l = E // 128, E % 128 // 32, E % 32
    low = _bits(b, 64 * n + 32 * (k % 2) + l, k // 2 * 4, 15)
    q = low | _bits(b, 128 + 32 * n + l, 2 * k, 3) << 4
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return np.repeat(_half(b, 208) * _f32(scales), 16, axis=1) * _f32(q, 32)


def _q2_0(b: np.ndarray) -> np.ndarray:
    e = E[:64]
    return _half(b, 0) * _f32(_bits(b, 2 + e // 4, e % 4 * 2, 3), 1)


def _iq4_level(q: np.ndarray) -> np.ndarray:
    """What the codes of IQ4_NL and IQ4_XS stand for, float32, from gguf-py's table."""
    import gguf

    return np.array(gguf.quants.IQ4_NL.kvalues, np.float32)[q]


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    i = np.arange(8)
    scales = _bits(b, 4 + i // 2, i % 2 * 4, 15) | _bits(b, 2 + i // 4, i % 4 * 2, 3) << 4
    q = _bits(b, 8 + 16 * (E // 32) + E % 16, E % 32 // 16 * 4, 15)
    return np.repeat(_half(b, 0) * _f32(scales, 32), 32, axis=1) * _iq4_level(q)


def _lattice(
    name: str, scale: np.ndarray, numbers: np.ndarray, signs: np.ndarray, sub_block: int
) -> np.ndarray:
    """scale · magnitude · sign, [n, 256].

    scale: float32 [n, sub-blocks].
    numbers: those of the points in gguf-py's table, [n, points].
    signs: 1 for a negative weight, [n, 256].
    """
    import gguf

    quants = getattr(gguf.quants, name)
    quants.init_grid()
    points = np.asarray(quants.grid, np.float32).reshape(quants.grid_shape)
    magnitudes = points[numbers].reshape(len(scale), 256)
    return np.repeat(scale, sub_block, axis=1) * magnitudes * (1 - 2 * _f32(signs))


def _step(b: np.ndarray, scales: np.ndarray, share: float) -> np.ndarray:
    """d · (scale + ½) · share, float32 [n, sub-blocks]."""
    return _half(b, 0) * (_f32(scales) + np.float32(0.5)) * np.float32(share)


def _nibble_scales(b: np.ndarray, start: int, sub_blocks: int) -> np.ndarray:
    i = np.arange(sub_blocks)
    return _bits(b, start + i // 2, i % 2 * 4, 15)


def _seven_signs(b: np.ndarray, start: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Signs [n, 256] and scales [n, 8] from eight u32, `stride` bytes apart.

    Bits 7l … 7l + 6 are the signs of columns 8l … 8l + 6, whose parity is the sign of the next.
    """
    at = start + stride * np.arange(8)[:, None] + np.arange(4)
    words = np.ascontiguousarray(b[:, at]).view("<u4")[..., 0]  # [n, 8]
    return _with_parity(words[..., None] >> 7 * np.arange(4, dtype=np.uint32)), words >> 28


def _with_parity(bits: np.ndarray) -> np.ndarray:
    """Runs of seven bits → signs of eight columns, [n, 256]."""
    seven = bits.reshape(len(bits), -1, 1) >> np.arange(7, dtype=bits.dtype) & 1
    eighth = seven.sum(2, keepdims=True, dtype=bits.dtype) & 1
    return np.concatenate([seven, eighth], axis=2).reshape(len(bits), 256)


def _iq2_xxs(b: np.ndarray) -> np.ndarray:
    i = np.arange(32)
    signs, scales = _seven_signs(b, 6, 8)
    numbers = b[:, 2 + 8 * (i // 4) + i % 4]
    return _lattice("IQ2_XXS", _step(b, scales, 0.25), numbers, signs, 32)


def _iq2_xs(b: np.ndarray) -> np.ndarray:
    both = np.ascontiguousarray(b[:, 2:66]).view("<u2")
    scale = _step(b, _nibble_scales(b, 66, 16), 0.25)
    return _lattice("IQ2_XS", scale, both & 511, _with_parity(both >> 9), 16)


def _iq2_s(b: np.ndarray) -> np.ndarray:
    i = np.arange(32)
    numbers = b[:, 2:34] | _bits(b, 66 + i // 4, i % 4 * 2, 3).astype(np.uint16) << 8
    scale = _step(b, _nibble_scales(b, 74, 16), 0.25)
    return _lattice("IQ2_S", scale, numbers, _bits(b, 34 + E // 8, E % 8, 1), 16)


def _iq3_xxs(b: np.ndarray) -> np.ndarray:
    signs, scales = _seven_signs(b, 66, 4)
    return _lattice("IQ3_XXS", _step(b, scales, 0.5), b[:, 2:66], signs, 32)


def _iq3_s(b: np.ndarray) -> np.ndarray:
    i = np.arange(64)
    numbers = b[:, 2:66] | _bits(b, 66 + i // 8, i % 8, 1).astype(np.uint16) << 8
    scale = _step(b, _nibble_scales(b, 106, 8), 2)
    return _lattice("IQ3_S", scale, numbers, _bits(b, 74 + E // 8, E % 8, 1), 32)


# Block type → its decoder: uint8 [n, nbytes] → float32 [n, block].
DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": lambda b: _half(b, 0) * _f32(_nibbles(b, 2), 8),
    "Q4_1": lambda b: _half(b, 0) * _f32(_nibbles(b, 4)) + _half(b, 2),
    "Q5_0": lambda b: _half(b, 0) * _f32(_five(b, 2, 6), 16),
    "Q5_1": lambda b: _half(b, 0) * _f32(_five(b, 4, 8)) + _half(b, 2),
    "Q8_0": lambda b: _half(b, 0) * _f32(np.ascontiguousarray(b[:, 2:]).view(np.int8)),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ2_0": lambda b: _half(b, 64) * _f32(_crumbs(b, 0), 1),
    "Q2_0": _q2_0,
    "IQ4_NL": lambda b: _half(b, 0) * _iq4_level(_nibbles(b, 2)),
    "IQ4_XS": _iq4_xs,
    "IQ3_S": _iq3_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ2_S": _iq2_s,
    "IQ2_XS": _iq2_xs,
    "IQ2_XXS": _iq2_xxs,
}
# Types whose elements stand on their own → numpy's dtype.
_PLAIN = {
    "F32": "<f4",
    "F16": "<f2",
    "F64": "<f8",
    "I8": "|i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}


def decode(raw: np.ndarray, kind: GGMLType, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor as float32.

    raw: its bytes, uint8 [nbytes].
    shape: that of the result.

    Raises FormatError for a block type that is not in DECODERS.
    """
    if kind.name in _PLAIN:
        return raw.view(_PLAIN[kind.name]).astype(np.float32).reshape(shape)
    if kind.name == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if kind.name not in DECODERS:
        raise FormatError(
            f"tensors of type {kind.name} are not decoded here; of block types only"
            f" {', '.join(DECODERS)} are"
        )
    blocks = raw.reshape(-1, kind.nbytes)
    out = np.empty((len(blocks), kind.block), np.float32)
    step = _CHUNK // kind.block
    # The scales of a damaged file may be infinite or NaN. The caller sees what comes of them.
    with np.errstate(all="ignore"):
        for i in range(0, len(blocks), step):
            out[i : i + step] = DECODERS[kind.name](blocks[i : i + step])
    return out.reshape(shape)
