"""The column loop on GGUF's block types. A block is fitted when the loop reaches it."""

from __future__ import annotations

import torch

from vlmq_export.quantizer.grids.block_fit import fit_blocks
from vlmq_export.quantizer.grids.blocks import BlockGrid, Params
from vlmq_export.quantizer.grids.solutions import BlockSolution
from vlmq_export.quantizer.solver.column_loop import ColumnLoop
from vlmq_export.quantizer.solver.hessian import Hessian
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks


def solve_blocks(
    target: torch.Tensor,  # float32 [out, in]
    hessian: Hessian,  # whose order keeps the columns of each block together
    grid: BlockGrid,
    *,
    block: int,  # columns of a lazy block
    column_term: torch.Tensor | None = None,  # GPTAQ's P, [in, in], loop order
    own_term: torch.Tensor | None = None,  # VLM-PTQ's C, [in], loop order
) -> BlockSolution:
    """`column_loop.solve` on a block type.

    All parameters of a block are fitted together, on its compensated weights. In this fit a column
    weighs as much as its pivot: that is what an error there costs once later columns have made up
    for it. The order of the loop may scatter the columns of a sub-block. Raises ValueError where it
    scatters those of a point.
    """
    target = target.float().masked_fill(hessian.dead, 0)
    if hessian.fallback:
        return nearest_in_blocks(target, grid)
    order, pivots = hessian.order, hessian.pivots
    runs = order.view(-1, grid.together)
    if not bool((runs - runs[:, :1] == runs[0] - runs[0, 0]).all()):
        raise ValueError(f"the order does not keep {grid.together} columns of {grid.name} together")
    found: dict[int, Params] = {}  # by the block's place among the columns

    def fit(here: slice, weights: torch.Tensor) -> tuple[slice, torch.Tensor, torch.Tensor]:
        columns = order[here]
        natural, index = columns.argsort(), int(columns.min()) // grid.block
        params = fit_blocks(grid, weights[natural].T.contiguous(), pivots[here][natural])
        found[index] = params
        scales, minima = (p.T for p in params.decoded())  # [sub-blocks, out]
        first = index * grid.block // grid.sub_block
        return slice(first, first + len(scales)), scales, minima

    in_features = target.shape[1]
    loop = ColumnLoop(
        target.T[order].contiguous(),
        hessian.factor,
        grid,
        group=grid.block,
        scale_of=order // grid.sub_block,
        scales=in_features // grid.sub_block,
        block=block,
        fit=fit,
        column_term=column_term,
        own_term=own_term,
        pivots=pivots,
    )
    loop.run(0, in_features)
    codes = loop.codes[order.argsort()].T.contiguous()
    return BlockSolution(grid, codes, Params.joined([found[i] for i in sorted(found)]))
