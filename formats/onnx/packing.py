"""Integers of a linear → the inputs of com.microsoft::MatMulNBits (version 1).

    Y = A @ Wᵀ,   W[n, k] = scales[n, k // block] · (B[n, k] − zero_points[n, k // block])

B and zero_points are LSB-first bit streams, B along the columns of one block, zero_points along the blocks of one row,
each row padded to a whole byte. The CPU kernels take 2, 4 and 8 bits and blocks of 16 to 256 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class NBits:
    """One MatMulNBits node's attributes and constant inputs."""

    bits: int
    block_size: int
    weight: np.ndarray  # uint8 [out, blocks, block_size·bits/8]
    scales: np.ndarray  # float32 [out, blocks]
    zero_points: np.ndarray  # uint8 [out, ceil(blocks·bits/8)]
    order: np.ndarray | None  # int64 [in]: columns of A in the order of the groups; None: as they are


def container_bits(bits: int) -> int:
    """3-bit codes live in the 4-bit container: no runtime decodes three."""
    return 4 if bits == 3 else bits


def block_size_for(group_size: int) -> int | None:
    """The block that a group is written as: itself, or the largest that divides it; −1: blocks of 256. None: no block."""
    if group_size == -1:
        return BLOCKS[0]
    return next((b for b in BLOCKS if group_size > 0 and group_size % b == 0), None)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., M] → uint8 [..., ceil(M·bits/8)], LSB first."""
    per_byte = 8 // bits
    pad = -values.shape[-1] % per_byte
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)])
    values = values.reshape(*values.shape[:-1], -1, per_byte)
    shifted = values << (np.arange(per_byte, dtype=np.uint8) * np.uint8(bits))
    return np.bitwise_or.reduce(shifted, axis=-1).astype(np.uint8)


def pack_linear(
    codes: np.ndarray,  # uint8 [out, in]
    scales: np.ndarray,  # float16 [out, groups]
    zero_points: np.ndarray,  # uint8 [out, groups]
    g_idx: np.ndarray,  # int [in]
    bits: int,
    group_size: int,
) -> NBits:
    """Exact for every grid: float16 scales widen to float32, groups longer than a block repeat their scale and zero."""
    block = block_size_for(group_size)
    assert block is not None, f"plan() refuses group size {group_size}"
    width = container_bits(bits)
    order = np.argsort(g_idx, kind="stable")
    natural = bool((order == np.arange(len(order))).all())
    codes = codes if natural else codes[:, order]
    out_features, in_features = codes.shape
    blocks = -(-in_features // block)
    codes = np.pad(codes, [(0, 0), (0, blocks * block - in_features)])
    group_of_block = g_idx[order][np.arange(blocks) * block]
    return NBits(
        width,
        block,
        pack_bits(codes.reshape(out_features, blocks, block), width),
        np.ascontiguousarray(scales[:, group_of_block], np.float32),
        pack_bits(zero_points[:, group_of_block], width),
        None if natural else order.astype(np.int64),
    )
