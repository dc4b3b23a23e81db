"""VLM-PTQ's ranges, chosen by how much each modality excites a column (CVPR 2026).

    M = μ·diag(A_v)/N_v + (1 − μ)·diag(A_l)/N_l

    v   image tokens        A   Σ g² x xᵀ over the tokens of the modality
    l   text tokens         N   Σ g² over them

A group gets the scale and zero-point that minimize Σ_n M_n·(w_n − ŵ_n)². Each linear gets the μ
whose rounded weights leave the least ‖W·X̃ − Ŵ·X‖². Up to a constant that is
tr(Ŵ·A·Ŵᵀ) − 2·tr(W·(A + D)·Ŵᵀ), which needs A and D alone. docs/methods.md §3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.layers.stack import Stack
from vlmq_export.quantizer.solver.column_loop import Fit
from vlmq_export.quantizer.solver.ranges import search

MIXES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # values of μ that are tried


def modality_fit(
    stack: Stack, grid: Affine, sums: Statistics, moves: Sequence[int]
) -> tuple[Fit, list[float]]:
    """The range search for a stack, each matrix under its own μ, and these μ."""
    mixes = [best_mix(part, sums, grid, stack.choice.group) for part in stack.split(stack.weights)]
    weigh = [mixed(sums, m)[:, None].expand(-1, n) for m, n in zip(mixes, stack.sizes)]
    importance = torch.cat(weigh, 1)  # [in, out]

    def fit(weights: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return search(grid, weights, importance[columns], moves=moves)

    return fit, mixes


def mixed(sums: Statistics, mix: float) -> torch.Tensor:
    """M for μ = `mix`, float32 [in]. A modality without tokens has no say."""
    assert sums.modal is not None and sums.modal_weight is not None
    share = sums.modal / sums.modal_weight.clamp_min(1e-30)[:, None]  # [2, in]: image, text
    return (mix * share[0] + (1 - mix) * share[1]).float()


def best_mix(weights: torch.Tensor, sums: Statistics, grid: Affine, group: int) -> float:
    """μ of one linear [out, in], judged on weights that are rounded to nearest."""
    assert sums.drift is not None
    wanted = weights @ (sums.hessian + sums.drift)
    losses = []
    for mix in MIXES:
        rounded = nearest_in_ranges(weights, grid, group, mixed(sums, mix))
        slope = rounded @ sums.hessian - 2 * wanted
        losses.append(float((slope * rounded).sum(dtype=torch.float64)))
    return MIXES[losses.index(min(losses))]


def nearest_in_ranges(
    weights: torch.Tensor,  # [out, in]
    grid: Affine,
    group: int,
    importance: torch.Tensor,  # [in]
) -> torch.Tensor:
    """Weights rounded to nearest on searched ranges of natural groups."""
    columns = weights.T.contiguous()
    parts = []
    for part, weigh in zip(columns.split(group), importance.split(group)):
        scale, zero = search(grid, part, weigh)
        parts.append(grid.decode(grid.encode(part, scale, zero), scale, zero))
    return torch.cat(parts).T
