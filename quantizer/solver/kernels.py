"""The innermost part of the column loop as one Triton kernel, for CUDA.

On a GPU one launch per column would take most of the time. Triton comes with PyTorch's CUDA builds.
The plain loop, `ColumnLoop._leaf` in `column_loop.py`, is the reference and the only path on a CPU.
Under Triton's interpreter (TRITON_INTERPRET=1) the kernel also runs on a CPU: tests use that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from vlmq_export.quantizer.grids.affine import Affine

BLOCK = 128  # the most columns of one launch, a power of two
_ROWS = 32  # rows of the weights that one program holds in registers


def usable(device: torch.device, grid: object) -> bool:
    """Whether `round_block` can take the innermost part of the loop."""
    return device.type == "cuda" and isinstance(grid, Affine) and _kernel() is not None


@cache
def _kernel() -> Any:
    """The compiled kernel, or None where Triton is not installed."""
    try:
        import triton  # pyright: ignore[reportMissingImports]
        import triton.language as tl  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    @triton.jit
    def kernel(
        target, shift, codes, scales, zeros, group_of, factor, term, columns, rows, stride, top,
        HAS_TERM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        inside = row < rows
        tile = column[:, None] * rows + row[None, :]
        both = (column[:, None] < columns) & inside[None, :]
        t = tl.load(target + tile, mask=both, other=0.0)  # [COLUMNS, ROWS]
        s = tl.load(shift + tile, mask=both, other=0.0)
        for j in range(columns):
            here = column[:, None] == j
            own = tl.sum(tl.where(here, t, 0.0), 0)
            weight = own + tl.sum(tl.where(here, s, 0.0), 0)
            group = tl.load(group_of + j)
            scale = tl.load(scales + group * rows + row, mask=inside, other=1.0)
            zero = tl.load(zeros + group * rows + row, mask=inside, other=0.0)
            level = tl.minimum(tl.maximum(tl.div_rn(weight, scale), -1024.0), 1024.0)
            level = (level + 12582912.0) - 12582912.0  # 1.5 · 2²³: to nearest, ties to even
            code = tl.minimum(tl.maximum(level + zero, 0.0), top)
            tl.store(codes + j * rows + row, code.to(tl.uint8), mask=inside)
            error = own - scale * (code - zero)
            tl.store(shift + j * rows + row, error, mask=inside)
            later = (column > j) & (column < columns)
            k = tl.load(factor + j * stride + column, mask=later, other=0.0)
            s += k[:, None] * error[None, :]
            if HAS_TERM:
                tl.store(target + j * rows + row, weight, mask=inside)
                p = tl.load(term + j * stride + column, mask=later, other=0.0)
                t += p[:, None] * weight[None, :]

    return kernel


def round_block(
    target: torch.Tensor,  # t, float32 [columns, out], contiguous; see below
    shift: torch.Tensor,  # Σ (t_q − ŵ_q)·K_qj of the columns before, same shape; becomes t_j − ŵ_j
    codes: torch.Tensor,  # uint8, same shape: filled
    scales: torch.Tensor,  # float32 [groups, out]
    zeros: torch.Tensor,  # float32 [groups, out]
    group_of: torch.Tensor,  # int32 [columns]: the group of each column
    factor: torch.Tensor,  # K of the block, [columns, columns], its rows apart by the stride
    term: torch.Tensor | None,  # P of the block, of the same layout
    top: int,  # the largest code
) -> None:
    """Round at most BLOCK columns one after the other, all rows at once.

    With a term, `target` becomes the weights before rounding, which is what the term multiplies.
    """
    columns, rows = target.shape
    if columns > BLOCK:
        raise ValueError(f"a block has at most {BLOCK} columns, this one {columns}")
    kernel = _kernel()
    assert kernel is not None, "ask `usable` first"
    size = max(16, 1 << (columns - 1).bit_length())
    programs = (-(-rows // _ROWS),)
    kernel[programs](
        target, shift, codes, scales, zeros, group_of, factor, factor if term is None else term,
        columns, rows, factor.stride(0), float(top),
        HAS_TERM=term is not None, COLUMNS=size, ROWS=_ROWS,
    )  # fmt: skip
