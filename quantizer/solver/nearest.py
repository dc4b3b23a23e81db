"""Rounding to nearest: each weight on its own, under no Hessian."""

from __future__ import annotations

import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.block_fit import fit_blocks
from vlmq_export.quantizer.grids.blocks import BlockGrid
from vlmq_export.quantizer.grids.solutions import BlockSolution, Solution


def round_to_nearest(weights: torch.Tensor, grid: Affine, *, group: int) -> Solution:
    """Weights [out, in] on an affine grid, in groups of `group` neighbouring columns."""
    out_features, in_features = weights.shape
    grouped = weights.float().view(out_features, -1, group)
    scale, zero = grid.fit(grouped)
    codes = grid.encode(grouped, scale[..., None], zero[..., None]).view(out_features, in_features)
    g_idx = torch.arange(in_features, dtype=torch.int32, device=weights.device) // group
    return Solution(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), g_idx)


def nearest_in_blocks(
    weights: torch.Tensor,  # [out, in]
    grid: BlockGrid,
    importance: torch.Tensor | None = None,  # float32 [in], greater than 0
) -> BlockSolution:
    """Weights on a block type. `importance` weighs the columns where the blocks are fitted."""
    weights = weights.float()
    if importance is None:
        importance = torch.ones(weights.shape[1], device=weights.device)
    params = fit_blocks(grid, weights, importance)
    scale, minimum = (p.repeat_interleave(grid.sub_block, 1) for p in params.decoded())
    values = grid.round(weights, scale, minimum, importance)
    return BlockSolution(grid, grid.codes(values), params)


def nearest_in_groups(weights: torch.Tensor, grid: BlockGrid) -> Solution:
    """The same as integers on a symmetric affine grid whose groups are the blocks of a type.

    It is a type without minima and sub-blocks, such as Q8_0. A scale may be negative: the codes
    reach one step further below zero than above it, and so to the largest weight.
    """
    found = nearest_in_blocks(weights, grid)
    scales, columns = found.params.d, torch.arange(weights.shape[1], device=weights.device)
    zeros = torch.full_like(scales, grid.centre, dtype=torch.uint8)
    return Solution(found.codes, scales, zeros, (columns // grid.block).int())
