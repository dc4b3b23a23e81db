"""Columns that become a point of a lattice together, under a matrix that couples them.

With u the best weights and S the matrix, a point p errs by (p − u)·S·(p − u)ᵀ. The search for the
nearest point knows a weight for each column, and no coupling. It is therefore asked again: from a
point p, for the one nearest to

    p + (u − p)·S / diag(S)

which is where each column alone would want to go. An answer is taken in the rows where the error
falls, so that none is worse than the point that the search began with.
"""

from __future__ import annotations

import numpy as np
import torch

from vlmq_export.quantizer.grids.lattices import (
    Array,
    Lattice,
    Search,
    as_tensor,
    on_host,
    product,
)

ROUNDS = 1  # searches after the first; a second would better the loss by .3 % or less


def best_points(
    lattice: Lattice,
    wanted: torch.Tensor,  # u, float32 [out, columns]
    scale: torch.Tensor,  # float32 [out]
    matrix: torch.Tensor,  # S, float32 [columns, columns]
    start: torch.Tensor | None = None,  # levels to better, [out, columns]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, and the weights that they decode to, float32 [out, columns] each."""
    wanted, scale, matrix = map(on_host, (wanted, scale[:, None], matrix))
    weight, where = matrix.diagonal(), np.where if isinstance(matrix, np.ndarray) else torch.where

    def decoded(levels: Array) -> tuple[Array, Array, Array]:
        points = levels * scale
        away = points - wanted
        return levels, points, (product(away, matrix) * away).sum(axis=1, keepdims=True)

    search = Search(lattice, scale[:, 0], weight)
    best = decoded(search(wanted))
    trials = [] if start is None else [decoded(on_host(start))]
    for _ in range(ROUNDS + len(trials)):
        _, points, least = best
        if trials:
            trial = trials.pop()
        else:
            trial = decoded(search(points + product(wanted - points, matrix) / weight))
        best = tuple(where(trial[2] < least, b, a) for a, b in zip(best, trial))
    return as_tensor(best[0]), as_tensor(best[1])
