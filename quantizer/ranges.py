"""Ranges of an affine grid that are narrower than min-max, chosen by the error that they leave.

VLM-PTQ (CVPR 2026; methods.md §3.2) weighs the columns of a group by how much each modality excites them,

    M = μ·diag(A_v)/N_v + (1 − μ)·diag(A_l)/N_l        v image tokens, l text tokens

takes the scale and zero-point that minimize Σ_n M_n (w_n − ŵ_n)², and for each linear the μ whose rounded weights give
the least ‖W·X̃ − Ŵ·X‖², which needs A and D alone: tr(Ŵ·A·Ŵᵀ) − 2·tr(W·(A + D)·Ŵᵀ) but for a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch

from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.statistics import Statistics

MIXES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of μ
SHRINK = tuple(1 - i / 100 for i in range(80))  # GPTQ's own search: 80 ranges, down to a fifth of min-max
NEIGHBOURS = (0, -1, 1)  # zero-points beside a range's own: a step is much of the range where there are few


def search(
    grid: Affine,
    weights: torch.Tensor,  # float32 [group, rows]
    importance: torch.Tensor,  # [group] or [group, rows]
    shrink: Sequence[float] = SHRINK,
    moves: Sequence[int] = (0,),  # of the zero-point
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point [rows] of the range with the least weighted error; the wider one of two that are equal."""
    importance = importance if importance.dim() == 2 else importance[:, None]
    least = torch.full(weights.shape[1:], torch.inf, device=weights.device)
    scale, zero = grid.fit(weights, dim=0)
    for share, move in product(shrink, moves):
        tried = narrowed(grid, weights, share, move)
        error = (grid.decode(grid.encode(weights, *tried), *tried) - weights).square_().mul_(importance).sum(0)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return scale, zero


def narrowed(grid: Affine, weights: torch.Tensor, share, move) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point of a share of min-max, the zero-point moved; one of each for all rows, or one a row."""
    scale, zero = grid.fit(weights * share, dim=0)
    return scale, (zero + move).clamp(1, grid.top)


def mixed(sums: Statistics, mix: float) -> torch.Tensor:
    """M [in]; a modality without tokens has no say."""
    share = sums.modal / sums.modal_weight.clamp_min(1e-30)[:, None]  # [2, in]: image, text
    return (mix * share[0] + (1 - mix) * share[1]).float()


def best_mix(weights: torch.Tensor, sums: Statistics, grid: Affine, group: int) -> float:
    """μ of one linear [out, in], judged on weights that are rounded to nearest (methods.md §3.2)."""
    wanted = weights @ (sums.hessian + sums.drift)
    losses = []
    for mix in MIXES:
        rounded = nearest(weights, grid, group, mixed(sums, mix))
        losses.append(float(((rounded @ sums.hessian - 2 * wanted) * rounded).sum(dtype=torch.float64)))
    return MIXES[losses.index(min(losses))]


def nearest(weights: torch.Tensor, grid: Affine, group: int, importance: torch.Tensor) -> torch.Tensor:
    """Weights [out, in] rounded to nearest on searched ranges of natural groups."""
    columns = weights.T.contiguous()
    parts = []
    for part, weigh in zip(columns.split(group), importance.split(group)):
        scale, zero = search(grid, part, weigh)
        parts.append(grid.decode(grid.encode(part, scale, zero), scale, zero))
    return torch.cat(parts).T
