"""GGML's tensor types: one table of sizes, and the packers of the block types that our grids live in.

A block type stores a row in blocks of `block` elements, `nbytes` each. Layouts as in ggml's
ggml-common.h; h is a little-endian float16, q the codes, e an element's place in its block:

    Q4_0  h d, 16 B                       d·(q−8)      byte j = q[j] | q[j+16] << 4
    Q4_1  h d, h m, 16 B                  d·q + m      as Q4_0
    Q5_0  h d, 4 B, 16 B                  d·(q−16)     fourth bit of q[j] = bit j of the u32, the rest as Q4_0
    Q5_1  h d, h m, 4 B, 16 B             d·q + m      bits as Q5_0
    Q8_0  h d, 32 int8                    d·q
    Q2_K  16 B (scale | min << 4), 64 B, h d, h dmin        (d·scale)·q − dmin·min, one scale per 16
    Q3_K  32 B, 64 B, 12 B of 6-bit scales, h d             (d·(scale−32))·(q−4), one scale per 16
    Q4_K  h d, h dmin, 12 B of 6-bit pairs, 128 B           (d·scale)·q − dmin·min, one pair per 32
    Q5_K  h d, h dmin, 12 B, 32 B, 128 B  as Q4_K; fourth bit of q[e] = bit e/32 of byte e%32
    Q6_K  128 B, 64 B, 16 int8 scales, h d                  (d·scale)·(q−32), one scale per 16
    TQ2_0 64 B, h d                       d·(q−1)      two bits as Q2_K's
    Q2_0  h d, 16 B                       d·(q−1)      byte j = q[4j] | q[4j+1] << 2 | q[4j+2] << 4 | q[4j+3] << 6

`decode.py` reads all of them, and more, by the per-element formulas; it shares nothing with this module but the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GGMLType:
    name: str
    id: int
    block: int  # elements
    nbytes: int  # of a block
    file_type: int | None = None  # general.file_type of a file that is mostly of this type: a label, nothing reads it

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; `columns` must be a multiple of the block."""
        return columns // self.block * self.nbytes


TYPES = {
    t.name: t
    for t in (
        GGMLType("F32", 0, 1, 4, 0), GGMLType("F16", 1, 1, 2, 1), GGMLType("BF16", 30, 1, 2, 32), GGMLType("F64", 28, 1, 8),
        GGMLType("I8", 24, 1, 1), GGMLType("I16", 25, 1, 2), GGMLType("I32", 26, 1, 4), GGMLType("I64", 27, 1, 8),
        GGMLType("Q4_0", 2, 32, 18, 2), GGMLType("Q4_1", 3, 32, 20, 3), GGMLType("Q5_0", 6, 32, 22, 8),
        GGMLType("Q5_1", 7, 32, 24, 9), GGMLType("Q8_0", 8, 32, 34, 7), GGMLType("Q8_1", 9, 32, 36),
        GGMLType("Q2_K", 10, 256, 84, 10), GGMLType("Q3_K", 11, 256, 110, 12), GGMLType("Q4_K", 12, 256, 144, 15),
        GGMLType("Q5_K", 13, 256, 176, 17), GGMLType("Q6_K", 14, 256, 210, 18), GGMLType("Q8_K", 15, 256, 292),
        GGMLType("IQ2_XXS", 16, 256, 66), GGMLType("IQ2_XS", 17, 256, 74), GGMLType("IQ3_XXS", 18, 256, 98),
        GGMLType("IQ1_S", 19, 256, 50), GGMLType("IQ4_NL", 20, 32, 18), GGMLType("IQ3_S", 21, 256, 110),
        GGMLType("IQ2_S", 22, 256, 82), GGMLType("IQ4_XS", 23, 256, 136), GGMLType("IQ1_M", 29, 256, 56),
        GGMLType("TQ1_0", 34, 256, 54, 36), GGMLType("TQ2_0", 35, 256, 66, 37), GGMLType("MXFP4", 39, 32, 17),
        GGMLType("NVFP4", 40, 64, 36), GGMLType("Q1_0", 41, 128, 18), GGMLType("Q2_0", 42, 64, 18, 41),
    )
}  # fmt: skip
BY_ID = {t.id: t for t in TYPES.values()}


@dataclass(frozen=True)
class Blocks:
    """The fields of n blocks before packing. Codes are as stored: never negative but for Q8_0."""

    d: np.ndarray  # float16 [n]
    codes: np.ndarray  # uint8 (Q8_0: int8) [n, block]
    m: np.ndarray | None = None  # float16 [n]: m of Q4_1, dmin of the K types
    scales: np.ndarray | None = None  # uint8 [n, sub-blocks], as stored
    mins: np.ndarray | None = None  # uint8 [n, sub-blocks]


def _bytes(half: np.ndarray) -> np.ndarray:
    """[n] float16 → [n, 2] uint8, little-endian."""
    return np.ascontiguousarray(half, "<f2").view(np.uint8).reshape(-1, 2)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """[n, 32] → [n, 16]: the first half of the block in the low nibbles."""
    return codes[:, :16] | codes[:, 16:] << 4


def _crumbs(codes: np.ndarray) -> np.ndarray:
    """[n, 256] → [n, 64]: each half of 128 in 32 bytes, its four quarters in the bit pairs from low to high."""
    q = codes.reshape(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)


def _q4_0(b: Blocks) -> list[np.ndarray]:
    return [_bytes(b.d), _nibbles(b.codes)]


def _q4_1(b: Blocks) -> list[np.ndarray]:
    return [_bytes(b.d), _bytes(b.m), _nibbles(b.codes)]


def _q5_0(b: Blocks) -> list[np.ndarray]:
    high = np.packbits(b.codes >> 4, axis=1, bitorder="little")
    return [_bytes(b.d), high, _nibbles(b.codes & 15)]


def _q5_1(b: Blocks) -> list[np.ndarray]:
    d, *codes = _q5_0(b)
    return [d, _bytes(b.m), *codes]


def _q8_0(b: Blocks) -> list[np.ndarray]:
    return [_bytes(b.d), b.codes.view(np.uint8)]


def _q2_k(b: Blocks) -> list[np.ndarray]:
    return [b.scales | b.mins << 4, _crumbs(b.codes), _bytes(b.d), _bytes(b.m)]


def _top_bits(bits: np.ndarray) -> np.ndarray:
    """[n, 256] of 0 or 1 → [n, 32]: element e in bit e/32 of byte e%32."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _q3_k(b: Blocks) -> list[np.ndarray]:
    high = _top_bits(b.codes >> 2)
    low = b.scales[:, :8] & 15 | (b.scales[:, 8:] & 15) << 4
    top = np.zeros((len(b.codes), 4), np.uint8)
    for i, quarter in enumerate(np.moveaxis(b.scales.reshape(-1, 4, 4) >> 4, 1, 0)):
        top |= quarter << 2 * i
    return [high, _crumbs(b.codes & 3), low, top, _bytes(b.d)]


def _affine_head(b: Blocks) -> list[np.ndarray]:
    """d, dmin and the eight 6-bit pairs of Q4_K and Q5_K."""
    sc, m = b.scales, b.mins
    pairs = [sc[:, :4] | sc[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
    return [_bytes(b.d), _bytes(b.m), *pairs]


def _wide_nibbles(codes: np.ndarray) -> np.ndarray:
    """[n, 256] → [n, 128]: 64 elements in 32 bytes, first half low, second half high."""
    q = codes.reshape(-1, 4, 2, 32)
    return (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)


def _q4_k(b: Blocks) -> list[np.ndarray]:
    return [*_affine_head(b), _wide_nibbles(b.codes)]


def _q5_k(b: Blocks) -> list[np.ndarray]:
    return [*_affine_head(b), _top_bits(b.codes >> 4), _wide_nibbles(b.codes & 15)]


def _q6_k(b: Blocks) -> list[np.ndarray]:
    low = (b.codes & 15).reshape(-1, 2, 2, 2, 32)  # [n, half, high nibble?, which 32 bytes, 32]
    return [(low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128), _crumbs(b.codes >> 4), b.scales, _bytes(b.d)]


def _tq2_0(b: Blocks) -> list[np.ndarray]:
    return [_crumbs(b.codes), _bytes(b.d)]


def _q2_0(b: Blocks) -> list[np.ndarray]:
    q = b.codes.reshape(-1, 16, 4)
    return [_bytes(b.d), q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6]


@dataclass(frozen=True)
class Packer:
    fields: Callable[[Blocks], list[np.ndarray]]  # byte fields in file order
    limit: int  # codes must be below it
    sub_blocks: int = 0
    scale_limit: int = 0
    offset: bool = False  # whether there is a second float16


PACKERS = {
    "Q4_0": Packer(_q4_0, 16), "Q4_1": Packer(_q4_1, 16, offset=True), "Q5_0": Packer(_q5_0, 32), "Q8_0": Packer(_q8_0, 128),
    "Q2_K": Packer(_q2_k, 4, 16, 16, offset=True), "Q3_K": Packer(_q3_k, 8, 16, 64), "Q4_K": Packer(_q4_k, 16, 8, 64, offset=True),
    "Q5_1": Packer(_q5_1, 32, offset=True), "Q5_K": Packer(_q5_k, 32, 8, 64, offset=True), "Q6_K": Packer(_q6_k, 64, 16, 256),
    "TQ2_0": Packer(_tq2_0, 4), "Q2_0": Packer(_q2_0, 4),
}  # fmt: skip


def pack_blocks(name: str, blocks: Blocks) -> np.ndarray:
    """uint8 [n, bytes of a block]. Raises ValueError for a field that does not fit its bits or is not finite."""
    packer, t = PACKERS[name], TYPES[name]
    codes = blocks.codes
    if codes.dtype != (np.int8 if name == "Q8_0" else np.uint8) or codes.shape != (len(blocks.d), t.block):
        raise ValueError(f"{name} cannot hold codes of {codes.dtype} {codes.shape}")
    if codes.size and codes.max() >= packer.limit:
        raise ValueError(f"{name} holds codes below {packer.limit}, got {codes.max()}")
    for half, wanted in ((blocks.d, True), (blocks.m, packer.offset)):
        if (half is not None) != wanted or (wanted and not np.isfinite(half).all()):
            raise ValueError(f"{name} with a scale or offset that is missing, superfluous or not finite")
    for sub, wanted in ((blocks.scales, packer.sub_blocks), (blocks.mins, packer.sub_blocks if packer.offset else 0)):
        shape = None if sub is None else (sub.dtype, sub.shape)
        if shape != ((np.dtype(np.uint8), (len(codes), wanted)) if wanted else None):
            raise ValueError(f"{name} cannot hold sub-block fields {shape}")
        if wanted and sub.size and sub.max() >= packer.scale_limit:
            raise ValueError(f"{name} holds sub-block fields below {packer.scale_limit}, got {sub.max()}")
    return np.concatenate(packer.fields(blocks), axis=1)
