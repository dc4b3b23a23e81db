"""Ranges of an affine grid that are narrower than min-max, chosen by the error that they leave.

A narrower range clips the largest weights and resolves the others more finely. `search` judges a
range by the rounding error before the loop. `best_range` judges it by the error after the loop,
which makes up for much of what a range clips; the error before it misleads (docs/methods.md §5.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.solver.column_loop import Fit
from vlmq_export.quantizer.solver.hessian import Hessian

SHRINK = tuple(1 - i / 100 for i in range(80))  # GPTQ's own search: down to a fifth of min-max
# Zero-points beside a range's own. With few codes, one step is much of the range.
NEIGHBOURS = (0, -1, 1)
# Weights that are solved at once, counted over all candidate ranges, by type of device. More are no
# faster on a CPU, and take memory in proportion. A GPU works on 32 rows in each of its parts, and
# has more than a hundred of them.
AT_ONCE = {"cpu": 2**24, "cuda": 2**27}
Number = float | torch.Tensor  # one for all rows, or one per row [rows]


def narrowed(
    grid: Affine, weights: torch.Tensor, share: Number, move: Number
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point [rows] for `share` of the min-max range of weights [group, rows].

    The zero-point is then moved by `move` codes.
    """
    scale, zero = grid.fit(weights * share, dim=0)
    return scale, (zero + move).clamp(1, grid.top)


def search(
    grid: Affine,
    weights: torch.Tensor,  # float32 [group, rows]
    importance: torch.Tensor,  # [group] or [group, rows]
    shrink: Sequence[float] = SHRINK,
    moves: Sequence[int] = (0,),  # of the zero-point
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point [rows] of the range with the least weighted rounding error.

    Of two ranges with the same error the wider one is taken.
    """
    importance = importance if importance.dim() == 2 else importance[:, None]
    least = torch.full(weights.shape[1:], torch.inf, device=weights.device)
    scale, zero = grid.fit(weights, dim=0)
    for share, move in product(shrink, moves):
        tried = narrowed(grid, weights, share, move)
        error = grid.decode(grid.encode(weights, *tried), *tried) - weights
        error = error.square_().mul_(importance).sum(0)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return scale, zero


def best_range(
    solve: Callable[[torch.Tensor, Fit], Solution],
    target: torch.Tensor,  # float32 [out, in]
    hessian: Hessian,
    grid: Affine,
    shares: Sequence[float],
    moves: Sequence[int] = (0,),  # of the zero-points
) -> Solution:
    """The solution whose rows each have the range that leaves the least error under A.

    `solve(target, fit)` runs the loop with the ranges of `fit`. Rows are independent, so all
    candidate ranges of a row are solved at once, as rows of one matrix.
    """
    tries = list(product(shares, moves))
    kept, g_idx = [], None
    rows = AT_ONCE[target.device.type] // (len(tries) * target.shape[1])
    for part in target.split(max(1, rows)):
        rows = len(part)
        share, move = (
            torch.tensor(x, device=target.device).repeat_interleave(rows) for x in zip(*tries)
        )
        many = part.repeat(len(tries), 1)  # [tries · rows, in]
        tried = solve(many, lambda w, _columns, s=share, m=move: narrowed(grid, w, s, m))
        error = tried.decode() - many.masked_fill(hessian.dead, 0)
        error = ((error @ hessian.matrix) * error).sum(1).view(len(tries), rows)
        chosen = error.argmin(0) * rows + torch.arange(rows, device=target.device)
        kept.append((tried.codes[chosen], tried.scales[chosen], tried.zero_points[chosen]))
        g_idx = tried.g_idx
    assert g_idx is not None
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*kept))
    return Solution(codes, scales, zeros, g_idx)
