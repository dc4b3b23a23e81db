"""Packs scales, minima and codes into the bytes of GGML's block types.

The layouts are those of ggml's ggml-common.h. B is a byte, h a little-endian float16, q the codes,
and e the place of an element in its block.

    type   bytes of a block, in order                      decodes to
    Q4_0   h d, 16 B                                       d·(q−8)
    Q4_1   h d, h m, 16 B                                  d·q + m
    Q5_0   h d, 4 B, 16 B                                  d·(q−16)
    Q5_1   h d, h m, 4 B, 16 B                             d·q + m
    Q8_0   h d, 32 int8                                    d·q
    Q2_0   h d, 16 B                                       d·(q−1)
    Q2_K   16 B, 64 B, h d, h dmin                         (d·scale)·q − dmin·min, per 16
    Q3_K   32 B, 64 B, 12 B of 6-bit scales, h d           (d·(scale−32))·(q−4), per 16
    Q4_K   h d, h dmin, 12 B of 6-bit pairs, 128 B         (d·scale)·q − dmin·min, per 32
    Q5_K   h d, h dmin, 12 B of 6-bit pairs, 32 B, 128 B   (d·scale)·q − dmin·min, per 32
    Q6_K   128 B, 64 B, 16 int8 scales, h d                (d·scale)·(q−32), per 16
    TQ2_0  64 B, h d                                       d·(q−1)
    IQ4_NL h d, 16 B                                       d·level[q]
    IQ4_XS h d, 2 B and 4 B of 6-bit scales, 128 B         (d·(scale−32))·level[q], per 32
    IQ2_…  h d, and what `lattices.py` says                (d·(2·scale+1))·level[q], per 16 or 32
    IQ3_…  h d, likewise                                   likewise, per 32

Where the bits of the codes are:

    Q4_0 Q4_1   byte j of the 16 is q[j] | q[j+16] << 4; IQ4_NL too, IQ4_XS for each 32 columns
    Q5_0 Q5_1   the low four bits as in Q4_0; the fourth bit of q[j] is bit j of the 4 B as a u32
    Q2_0        byte j is q[4j] | q[4j+1] << 2 | q[4j+2] << 4 | q[4j+3] << 6
    Q2_K        the 16 B are scale | min << 4; q as in `_crumbs`
    Q3_K        bits 0 and 1 of q as in `_crumbs`, bit 2 as in `_top_bits`
    Q4_K Q5_K   bits 0 to 3 of q as in `_wide_nibbles`, bit 4 as in `_top_bits`
    Q6_K        bits 0 to 3 first, bits 4 and 5 as in `_crumbs`
    TQ2_0       q as in `_crumbs`

`decode.py` reads all of them by per-element formulas, and shares nothing with this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlmq_export.formats.gguf.types import lattices
from vlmq_export.formats.gguf.types.table import TYPES


@dataclass(frozen=True)
class Blocks:
    """The fields of n blocks before packing. Optional ones are there if the type needs them."""

    d: np.ndarray  # float16 [n]
    codes: np.ndarray  # uint8 [n, block], as stored; int8 for Q8_0
    m: np.ndarray | None = None  # float16 [n]: m of Q4_1 and Q5_1, dmin of the affine K types
    scales: np.ndarray | None = None  # uint8 [n, sub-blocks], as stored
    mins: np.ndarray | None = None  # uint8 [n, sub-blocks]


def _held(field: np.ndarray | None) -> np.ndarray:
    """An optional field of a type that needs it."""
    assert field is not None, "pack_blocks refuses blocks that lack a field"
    return field


def _bytes(half: np.ndarray) -> np.ndarray:
    """float16 [n] → uint8 [n, 2], little-endian."""
    return np.ascontiguousarray(half, "<f2").view(np.uint8).reshape(-1, 2)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """[n, 32] → [n, 16]: the first half of the block is in the low nibbles."""
    return codes[:, :16] | codes[:, 16:] << 4


def _crumbs(codes: np.ndarray) -> np.ndarray:
    """[n, 256] → [n, 64]: each half of 128 codes is in 32 bytes.

    The four quarters of a half are in the bit pairs of its bytes, from low to high.
    """
    q = codes.reshape(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)


def _wide_nibbles(codes: np.ndarray) -> np.ndarray:
    """[n, 256] → [n, 128]: 64 codes are in 32 bytes, the first 32 in the low nibbles."""
    q = codes.reshape(-1, 4, 2, 32)
    return (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)


def _top_bits(bits: np.ndarray) -> np.ndarray:
    """[n, 256] of 0 or 1 → [n, 32]: element e is bit e/32 of byte e%32."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


# Packers: the byte fields of a block in the order of the file, each uint8 [n, bytes].


def _q4_0(b: Blocks) -> list[np.ndarray]:
    return [_bytes(b.d), _nibbles(b.codes)]


def _q4_1(b: Blocks) -> list[np.ndarray]:
    return [_bytes(b.d), _bytes(_held(b.m)), _nibbles(b.codes)]


def _q5_0(b: Blocks) -> list[np.ndarray]:
    high = np.packbits(b.codes >> 4, axis=1, bitorder="little")
    return [_bytes(b.d), high, _nibbles(b.codes & 15)]


def _q5_1(b: Blocks) -> list[np.ndarray]:
    d, *codes = _q5_0(b)
    return [d, _bytes(_held(b.m)), *codes]


def _q8_0(b: Blocks) -> list[np.ndarray]:
    return [_bytes(b.d), b.codes.view(np.uint8)]


def _q2_k(b: Blocks) -> list[np.ndarray]:
    pairs = _held(b.scales) | _held(b.mins) << 4
    return [pairs, _crumbs(b.codes), _bytes(b.d), _bytes(_held(b.m))]


def _q3_k(b: Blocks) -> list[np.ndarray]:
    # Of the 12 bytes with scales, byte i < 8 has the low four bits of scales i and i + 8. Byte
    # j + 8 has the upper two bits of scales j, j + 4, j + 8 and j + 12.
    scales = _held(b.scales)
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    top = np.zeros((len(b.codes), 4), np.uint8)
    for i, quarter in enumerate(np.moveaxis(scales.reshape(-1, 4, 4) >> 4, 1, 0)):
        top |= quarter << 2 * i
    return [_top_bits(b.codes >> 2), _crumbs(b.codes & 3), low, top, _bytes(b.d)]


def _affine_head(b: Blocks) -> list[np.ndarray]:
    """d, dmin, and twelve bytes with the eight 6-bit pairs of Q4_K and Q5_K.

    For j < 4, byte j has scale j in its low six bits, and byte j + 4 has minimum j there. Byte
    j + 8 has the low four bits of scale j + 4 and of minimum j + 4. The upper two bits of these are
    the upper two bits of bytes j and j + 4.
    """
    scales, mins = _held(b.scales), _held(b.mins)
    pairs = [
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        mins[:, :4] | mins[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4,
    ]
    return [_bytes(b.d), _bytes(_held(b.m)), *pairs]


def _q4_k(b: Blocks) -> list[np.ndarray]:
    return [*_affine_head(b), _wide_nibbles(b.codes)]


def _q5_k(b: Blocks) -> list[np.ndarray]:
    return [*_affine_head(b), _top_bits(b.codes >> 4), _wide_nibbles(b.codes & 15)]


def _q6_k(b: Blocks) -> list[np.ndarray]:
    # [n, half of the block, whether the high nibble, which 32 bytes, 32]
    q = (b.codes & 15).reshape(-1, 2, 2, 2, 32)
    low = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)
    return [low, _crumbs(b.codes >> 4), _held(b.scales), _bytes(b.d)]


def _tq2_0(b: Blocks) -> list[np.ndarray]:
    return [_crumbs(b.codes), _bytes(b.d)]


def _q2_0(b: Blocks) -> list[np.ndarray]:
    q = b.codes.reshape(-1, 16, 4)
    return [_bytes(b.d), q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6]


def _iq4_xs(b: Blocks) -> list[np.ndarray]:
    # The upper two bits of the eight scales are a u16, from low to high, and the lower four bits of
    # each two scales are a byte.
    scales = _held(b.scales).astype(np.uint16)
    top = (scales >> 4 << 2 * np.arange(8, dtype=np.uint16)).sum(1, dtype=np.uint16)
    low = (scales[:, ::2] & 15 | (scales[:, 1::2] & 15) << 4).astype(np.uint8)
    high = np.ascontiguousarray(top, "<u2").view(np.uint8).reshape(-1, 2)
    return [_bytes(b.d), high, low, _nibbles(b.codes.reshape(-1, 32)).reshape(-1, 128)]


def _points(
    pack: Callable[[np.ndarray, np.ndarray], list[np.ndarray]],
) -> Callable[[Blocks], list[np.ndarray]]:
    """A packer of `lattices.py` with d before its fields."""
    return lambda b: [_bytes(b.d), *pack(b.codes, _held(b.scales))]


@dataclass(frozen=True)
class Packer:
    """How a block type is packed, and what its fields may be."""

    fields: Callable[[Blocks], list[np.ndarray]]  # byte fields in the order of the file
    limit: int  # codes must be below it
    sub_blocks: int = 0  # of a block; 0 where the type has no scales of its own for them
    scale_limit: int = 0  # stored scales and minima must be below it
    offset: bool = False  # whether there is a second float16, and minima where there are scales


PACKERS = {
    "Q4_0": Packer(_q4_0, 16),
    "Q4_1": Packer(_q4_1, 16, offset=True),
    "Q5_0": Packer(_q5_0, 32),
    "Q5_1": Packer(_q5_1, 32, offset=True),
    "Q8_0": Packer(_q8_0, 128),
    "Q2_K": Packer(_q2_k, 4, 16, 16, offset=True),
    "Q3_K": Packer(_q3_k, 8, 16, 64),
    "Q4_K": Packer(_q4_k, 16, 8, 64, offset=True),
    "Q5_K": Packer(_q5_k, 32, 8, 64, offset=True),
    "Q6_K": Packer(_q6_k, 64, 16, 256),
    "TQ2_0": Packer(_tq2_0, 4),
    "Q2_0": Packer(_q2_0, 4),
    "IQ4_NL": Packer(_q4_0, 16),
    "IQ4_XS": Packer(_iq4_xs, 16, 8, 64),
    "IQ3_S": Packer(_points(lattices.iq3_s), 16, 8, 16),
    "IQ3_XXS": Packer(_points(lattices.iq3_xxs), 16, 8, 16),
    "IQ2_S": Packer(_points(lattices.iq2_s), 6, 16, 16),
    "IQ2_XS": Packer(_points(lattices.iq2_xs), 6, 16, 16),
    "IQ2_XXS": Packer(_points(lattices.iq2_xxs), 6, 8, 16),
}


def pack_blocks(name: str, blocks: Blocks) -> np.ndarray:
    """Blocks of the type `name` as they are in a file, uint8 [n, bytes of a block].

    Raises ValueError for a field that is missing, superfluous or of another shape, that does not
    fit its bits, or that is not finite, and for codes that are no point of the type's lattice.
    """
    packer = PACKERS[name]
    _check_codes(name, packer, blocks)
    for half, wanted in ((blocks.d, True), (blocks.m, packer.offset)):
        if (half is not None) != wanted or (half is not None and not np.isfinite(half).all()):
            raise ValueError(
                f"{name} with a scale or offset that is missing, superfluous or not finite"
            )
    _check_sub_blocks(name, packer, blocks.scales, len(blocks.codes), packer.sub_blocks)
    mins = packer.sub_blocks if packer.offset else 0
    _check_sub_blocks(name, packer, blocks.mins, len(blocks.codes), mins)
    return np.concatenate(packer.fields(blocks), axis=1)


def _check_codes(name: str, packer: Packer, blocks: Blocks) -> None:
    """Raises ValueError for codes of another dtype or shape, and for those that are too large."""
    codes, shape = blocks.codes, (len(blocks.d), TYPES[name].block)
    if codes.dtype != (np.int8 if name == "Q8_0" else np.uint8) or codes.shape != shape:
        raise ValueError(f"{name} cannot hold codes of {codes.dtype} {codes.shape}")
    if codes.size and codes.max() >= packer.limit:
        raise ValueError(f"{name} holds codes below {packer.limit}, got {codes.max()}")


def _check_sub_blocks(
    name: str, packer: Packer, field: np.ndarray | None, n: int, sub_blocks: int
) -> None:
    """Raises ValueError for scales or minima that are not uint8 [n, sub_blocks], or too large.

    With 0 sub-blocks there must be none.
    """
    shape = None if field is None else (field.dtype, field.shape)
    if shape != ((np.dtype(np.uint8), (n, sub_blocks)) if sub_blocks else None):
        raise ValueError(f"{name} cannot hold sub-block fields {shape}")
    if field is not None and field.size and field.max() >= packer.scale_limit:
        raise ValueError(
            f"{name} holds sub-block fields below {packer.scale_limit}, got {field.max()}"
        )
