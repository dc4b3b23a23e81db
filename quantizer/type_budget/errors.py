"""The change ΔW = Ŵ − W of one matrix at each block type or width that it may have.

On a block type ΔW is that of the plain column loop. At few bits the range matters most, and so a
width below `likeness.PLAIN` is solved with the ranges and the descent that the recipe's method has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import EMBEDDING_TYPES, QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS, BlockGrid
from vlmq_export.quantizer.grids.choice import grid_choice
from vlmq_export.quantizer.layers.attempt import Prepared, attempt, prepared
from vlmq_export.quantizer.layers.stack import Matrix as Source
from vlmq_export.quantizer.layers.stack import Stack
from vlmq_export.quantizer.methods import Method, method_named
from vlmq_export.quantizer.solver.block_loop import solve_blocks
from vlmq_export.quantizer.solver.hessian import Hessian, prepare
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks
from vlmq_export.quantizer.type_budget import likeness
from vlmq_export.quantizer.type_budget.likeness import Kind

_ROWS = 4096  # rows of an embedding that are rounded at once


@torch.no_grad()
def errors_of(
    weight: torch.Tensor,  # W, [out, in]
    kinds: Iterable[Kind],
    sums: Statistics | None,  # of the inputs, float32; None: W is rounded to nearest
    config: QuantConfig,
) -> dict[Kind, torch.Tensor]:
    """kind → Ŵ − W, bfloat16 [out, in], where Ŵ is W solved on that kind."""
    weight = weight.detach().float()
    types = [kind for kind in kinds if isinstance(kind, str)]
    if sums is None:
        # The embedding's own grid has the numbers of a block type.
        grids = {
            kind: GRIDS[kind if isinstance(kind, str) else EMBEDDING_TYPES[kind]] for kind in kinds
        }
        return {kind: (_rounded(weight, grid) - weight).bfloat16() for kind, grid in grids.items()}
    widths = {
        kind: Method() if kind >= likeness.PLAIN else _refined(config)
        for kind in kinds
        if isinstance(kind, int)
    }
    return _on_types(weight, types, sums, config) | _at_widths(weight, widths, sums, config)


def _refined(config: QuantConfig) -> Method:
    """The column loop with the ranges and the descent of the recipe's method."""
    own = method_named(config.method)
    return Method(refine=own.refine, neighbours=own.neighbours)


def _at_widths(
    weight: torch.Tensor,
    widths: Mapping[int, Method],  # bits → how they are solved
    sums: Statistics,
    config: QuantConfig,
) -> dict[Kind, torch.Tensor]:
    """width → Ŵ − W. All widths have one order of the columns, and so one factorization."""
    found: dict[Kind, torch.Tensor] = {}
    known: Prepared | None = None
    for bits, method in widths.items():
        choice = grid_choice(config.at(bits), "", weight.shape[1])
        stack = Stack.of([Source("", weight)], choice)
        known = known or prepared(stack, sums, config)
        (solved,) = attempt(stack, known, None, method, config)
        found[bits] = (solved.solution.decode() - weight).bfloat16()
    return found


def _on_types(
    weight: torch.Tensor, types: Iterable[str], sums: Statistics, config: QuantConfig
) -> dict[Kind, torch.Tensor]:
    """type → Ŵ − W, where Ŵ is solved by the plain column loop."""
    order = "off" if config.act_order == "off" else "gar"
    found: dict[Kind, torch.Tensor] = {}
    hessians: dict[tuple[int, int], Hessian] = {}  # by the columns of a block and of a point
    for kind in types:
        grid = GRIDS[kind]
        key = grid.block, grid.together
        if key not in hessians:
            hessians[key] = prepare(
                sums.hessian,
                sums.diagonal,
                group=grid.block,
                act_order=order,
                damp=config.damp,
                together=grid.together,
            )
        solution = solve_blocks(weight, hessians[key], grid, block=config.block_size)
        found[kind] = (solution.decode() - weight).bfloat16()
    return found


def ratios_of(
    weight: torch.Tensor, kinds: Iterable[Kind], sums: Statistics, config: QuantConfig
) -> likeness.Ratios:
    """What kinds err on this matrix, over what was measured in their place."""
    kinds = list(kinds)
    lattices = [kind for kind in kinds if isinstance(kind, str) and kind in likeness.LIKE]
    both = dict.fromkeys([*lattices, *(likeness.LIKE[kind] for kind in lattices)])
    found = errors_of(weight, both, sums, config)
    plain = [kind for kind in kinds if isinstance(kind, int) and kind >= likeness.PLAIN]
    whole = _at_widths(
        weight.detach().float(), dict.fromkeys(plain, _refined(config)), sums, config
    )
    quick = errors_of(weight, plain, sums, config)
    return likeness.ratios(found, sums.hessian) | likeness.gains(whole, quick, sums.hessian)


def _rounded(weight: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """The weights rounded to nearest, some rows at a time, float32 [out, in]."""
    return torch.cat([nearest_in_blocks(rows, grid).decode() for rows in weight.split(_ROWS)])
