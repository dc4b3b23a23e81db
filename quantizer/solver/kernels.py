"""The innermost part of the column loop and of the descent in one launch, for CUDA.

On a GPU one launch per column would take most of the time. The kernels are in triton_kernels.py:
Triton comes with PyTorch's CUDA builds. The plain loops, `ColumnLoop._leaf_of_columns` and
`Descent._columns`, are the reference and the only path on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid

BLOCK = 128  # the most columns of one launch, a power of two
_ROWS = 32  # rows of the weights that one program holds in registers


def usable(device: torch.device, grid: Affine | BlockGrid) -> bool:
    """Whether the kernels can take the innermost part: on CUDA, to levels evenly spaced."""
    uneven = isinstance(grid, BlockGrid) and bool(grid.levels)
    return device.type == "cuda" and not uneven and _kernels() is not None


@cache
def _kernels() -> Any:
    """The module of the kernels, or None where Triton is not installed."""
    try:
        from vlmq_export.quantizer.solver import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def round_block(
    target: torch.Tensor,  # t, float32 [columns, out], contiguous; see below
    shift: torch.Tensor,  # Σ (t_q − ŵ_q)·K_qj of the columns before, same shape; becomes t_j − ŵ_j
    codes: torch.Tensor,  # uint8, same shape: filled
    scales: torch.Tensor,  # float32 [groups, out]
    offsets: torch.Tensor,  # float32 [groups, out]: zero-points, or minima of a block type
    group_of: torch.Tensor,  # int32 [columns]: the group of each column
    factor: torch.Tensor,  # K of the block, [columns, columns], its rows apart by the stride
    term: torch.Tensor | None,  # P of the block, of the same layout
    grid: Affine | BlockGrid,
) -> None:
    """Round at most BLOCK columns one after the other, all rows at once. Ask `usable` first.

    With a term, `target` becomes the weights before rounding, which is what the term multiplies.
    """
    columns, rows = _sizes(target)
    kernel = _kernels().round_block[_programs(rows)]
    kernel(
        target, shift, codes, scales, offsets, group_of, factor, factor if term is None else term,
        columns, rows, factor.stride(0), *_ends(grid), BLOCKS=isinstance(grid, BlockGrid),
        HAS_TERM=term is not None, COLUMNS=_padded(columns), ROWS=_ROWS,
    )  # fmt: skip


def descend_block(
    weights: torch.Tensor,  # ŵ, float32 [columns, out], contiguous
    gradient: torch.Tensor,  # A·(ŵ − t) there, same shape and layout
    codes: torch.Tensor,  # uint8, same shape: filled
    steps: torch.Tensor,  # float32, same shape: filled with what each weight moved by
    scales: torch.Tensor,  # float32 [groups, out]
    offsets: torch.Tensor,  # float32 [groups, out]: zero-points, or minima of a block type
    group_of: torch.Tensor,  # int32 [columns]: the group of each column
    matrix: torch.Tensor,  # A of the block, [columns, columns], its rows apart by the stride
    grid: Affine | BlockGrid,
) -> None:
    """Choose the codes of at most BLOCK columns again, one after the other, all rows at once.

    Ask `usable` first.
    """
    columns, rows = _sizes(weights)
    kernel = _kernels().descend_block[_programs(rows)]
    kernel(
        weights, gradient, codes, steps, scales, offsets, group_of, matrix,
        columns, rows, matrix.stride(0), *_ends(grid), BLOCKS=isinstance(grid, BlockGrid),
        COLUMNS=_padded(columns), ROWS=_ROWS,
    )  # fmt: skip


def _sizes(block: torch.Tensor) -> tuple[int, int]:
    """Columns and rows of a block. Raises ValueError where it has too many columns."""
    columns, rows = block.shape
    if columns > BLOCK:
        raise ValueError(f"a block has at most {BLOCK} columns, this one {columns}")
    return columns, rows


def _programs(rows: int) -> tuple[int]:
    return (-(-rows // _ROWS),)


def _padded(columns: int) -> int:
    """The next power of two, which Triton wants, and 16 at least."""
    return max(16, 1 << (columns - 1).bit_length())


def _ends(grid: Affine | BlockGrid) -> tuple[float, float]:
    """The code of zero in a block type, and the largest code."""
    return float(grid.centre if isinstance(grid, BlockGrid) else 0), float(grid.top)
