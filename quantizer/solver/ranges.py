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
from vlmq_export.quantizer.solver.host_columns import LONGEST

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
    solve: Callable[[torch.Tensor, Fit, int], Solution],
    target: torch.Tensor,  # float32 [out, in]
    grid: Affine,
    shares: Sequence[float],
    moves: Sequence[int] = (0,),  # of the zero-points
) -> Solution:
    """The solution whose rows each have the range that leaves the least error under A.

    `solve(target, fit, tries)` runs the loop on every row several times, each time with another
    range of `fit`, and takes the best. Rows are independent, so that many are solved at once.
    """
    tries, device = list(product(shares, moves)), target.device
    found = []
    for part in target.split(rows_at_once(device.type, len(tries), target.shape[1])):
        share, move = (
            torch.tensor(x, device=device).repeat_interleave(len(part)) for x in zip(*tries)
        )
        fit = lambda w, _columns, s=share, m=move: narrowed(grid, w, s, m)  # noqa: E731
        found.append(solve(part, fit, len(tries)))
    parts = zip(*((s.codes, s.scales, s.zero_points) for s in found))
    codes, scales, zeros = (torch.cat(each) for each in parts)
    return Solution(codes, scales, zeros, found[0].g_idx)


def rows_at_once(device: str, tries: int, columns: int) -> int:
    """How many rows are solved at once under so many ranges each. device: its type."""
    most = AT_ONCE[device] // columns
    if device == "cpu":
        most = min(most, LONGEST)
    return max(1, most // tries)
