"""The integers of a linear as the constant inputs of com.microsoft::MatMulNBits, version 1.

The operator computes (ONNX Runtime, docs/ContribOperators.md)

    Y = A @ Wᵀ,   W[n, k] = scales[n, k // block] · (B[n, k] − zero_points[n, k // block])

Codes and zero-points are packed into bytes, the first value into the lowest bits. The codes of each
block are padded to a whole byte, and so are the zero-points of each row. The CPU kernels take 2, 4
and 8 bits, and blocks of 16 to 256 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class NBits:
    """Attributes and constant inputs of one MatMulNBits node."""

    bits: int
    block_size: int
    weight: np.ndarray  # uint8 [out, blocks, block_size·bits/8]
    scales: np.ndarray  # float16 [out, blocks]
    zero_points: np.ndarray  # uint8 [out, ceil(blocks·bits/8)]
    # int64 [in]: the columns of A in the order of the groups; None: the groups lie in order.
    order: np.ndarray | None


def container_bits(bits: int) -> int:
    """The width in which codes of `bits` bits are stored.

    3-bit codes are stored in 4 bits, because ONNX Runtime has no decoder for 3.
    """
    return 4 if bits == 3 else bits


def block_size_for(group_size: int) -> int | None:
    """The block as which a group is written: the largest one that divides it.

    Returns 256 for −1, which is one scale per row, and None where no block divides the group.
    """
    if group_size == -1:
        return BLOCKS[0]
    return next((b for b in BLOCKS if group_size > 0 and group_size % b == 0), None)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., M] → uint8 [..., ceil(M·bits/8)]. The first value has the lowest bits."""
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
    g_idx: np.ndarray,  # int [in]: the group of each column
    bits: int,
    group_size: int,
) -> NBits:
    """The inputs of MatMulNBits that decode to the same weights exactly.

    A group that is longer than a block has its scale and its zero-point in each of its blocks.
    """
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
        np.ascontiguousarray(scales[:, group_of_block]),
        pack_bits(zero_points[:, group_of_block], width),
        None if natural else order.astype(np.int64),
    )
