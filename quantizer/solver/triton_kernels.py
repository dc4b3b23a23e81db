"""The Triton kernels behind kernels.py. A launch takes a block of columns, a program some rows.

A program holds what it adds to in registers, [columns, rows]. Under Triton's interpreter
(TRITON_INTERPRET=1) the kernels also run on a CPU: tests use that.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def rounded(weight, scale, offset, centre, top, BLOCKS: tl.constexpr):
    """The nearest code, and what it decodes to: `encode` and `decode` of the grid."""
    if BLOCKS:  # the offset is a minimum
        none = scale == 0
        ratio = tl.div_rn(weight + offset, tl.where(none, 1.0, scale))
        ratio, zero = tl.where(none, 0.0, ratio), centre
    else:  # the offset is a zero-point
        ratio, zero = tl.div_rn(weight, scale), offset
    level = tl.minimum(tl.maximum(ratio, -1024.0), 1024.0)
    level = (level + 12582912.0) - 12582912.0  # 1.5 · 2²³: to nearest, ties to even
    code = tl.minimum(tl.maximum(level + zero, 0.0), top)
    value = scale * (code - zero)
    if BLOCKS:
        value -= offset
    return code, value


@triton.jit
def round_block(
    target, shift, codes, scales, offsets, group_of, factor, term, columns, rows, stride,
    centre, top,
    BLOCKS: tl.constexpr, HAS_TERM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
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
        offset = tl.load(offsets + group * rows + row, mask=inside, other=0.0)
        code, value = rounded(weight, scale, offset, centre, top, BLOCKS)
        tl.store(codes + j * rows + row, code.to(tl.uint8), mask=inside)
        error = own - value
        tl.store(shift + j * rows + row, error, mask=inside)
        later = (column > j) & (column < columns)
        k = tl.load(factor + j * stride + column, mask=later, other=0.0)
        s += k[:, None] * error[None, :]
        if HAS_TERM:
            tl.store(target + j * rows + row, weight, mask=inside)
            p = tl.load(term + j * stride + column, mask=later, other=0.0)
            t += p[:, None] * weight[None, :]


@triton.jit
def descend_block(
    weights, gradient, codes, steps, scales, offsets, group_of, matrix, columns, rows, stride,
    centre, top,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    tile = column[:, None] * rows + row[None, :]
    both = (column[:, None] < columns) & inside[None, :]
    g = tl.load(gradient + tile, mask=both, other=0.0)  # [COLUMNS, ROWS]
    for j in range(columns):
        slope = tl.sum(tl.where(column[:, None] == j, g, 0.0), 0)
        weight = tl.load(weights + j * rows + row, mask=inside, other=0.0)
        group = tl.load(group_of + j)
        scale = tl.load(scales + group * rows + row, mask=inside, other=1.0)
        offset = tl.load(offsets + group * rows + row, mask=inside, other=0.0)
        best = weight - slope / tl.load(matrix + j * (stride + 1))
        code, value = rounded(best, scale, offset, centre, top, BLOCKS)
        tl.store(codes + j * rows + row, code.to(tl.uint8), mask=inside)
        step = value - weight
        tl.store(steps + j * rows + row, step, mask=inside)
        later = (column > j) & (column < columns)
        a = tl.load(matrix + j * stride + column, mask=later, other=0.0)
        g += a[:, None] * step[None, :]
