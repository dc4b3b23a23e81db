"""After the loop: better integers and scales for the same target, under the whole Hessian.

The loop never looks back. Coordinate descent does. With everything else fixed, the best weight for
column j of a row is

    ŵ_j − [A·(ŵ − t)]_j / A_jj

    t   the target
    ŵ   the weights that the codes decode to
    A   the damped Hessian

and is then rounded to the grid. Sweeps over the columns lower (ŵ − t)·A·(ŵ − t)ᵀ until no code
moves (QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542). On a lattice the columns B of a
point move together, toward ŵ_B − [A·(ŵ − t)]_B·A_BB⁻¹, and only where the loss falls. Between two
sweeps each scale can take the value that is best for its codes, rounded to storage, where that
lowers the loss (docs/methods.md §5.2). Matrices are transposed here, [in, out], as in the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid, Params
from vlmq_export.quantizer.grids.solutions import LARGEST, BlockSolution, Solution
from vlmq_export.quantizer.solver import host_columns, kernels
from vlmq_export.quantizer.solver.hessian import Hessian
from vlmq_export.quantizer.solver.points import best_points

_LEAF = 64  # columns between two matrix products
Solved = TypeVar("Solved", Solution, BlockSolution)


def descend(
    solution: Solved,
    target: torch.Tensor,  # float32 [out, in], original order
    hessian: Hessian,
    grid: Affine | None = None,  # that of a Solution; a BlockSolution names its own
    *,
    sweeps: int,
    refit: bool = False,  # scales of an affine grid or a lattice, before each sweep but the first
) -> Solved:
    """The solution after at most `sweeps` sweeps.

    Where the Hessian could not be factorized, the solution is returned as it was.
    """
    if hessian.fallback or not sweeps:
        return solution
    target = target.float().masked_fill(hessian.dead, 0)
    state = Descent(solution, target, damped(hessian), grid)
    for sweep in range(sweeps):
        if refit and sweep:
            state.refit()
        if not state.sweep():
            break
    codes = state.codes.T.contiguous()
    if isinstance(solution, Solution):
        return replace(solution, codes=codes, scales=state.scales.T.half().contiguous())
    return replace(solution, codes=codes, params=state.params())


def damped(hessian: Hessian) -> torch.Tensor:
    """A + λI, [in, in]: the matrix that was factorized, in the original order."""
    matrix = hessian.matrix.clone()
    live = matrix.diagonal()[~hessian.dead]
    mean = float(live.double().mean())
    matrix.diagonal().masked_fill_(hessian.dead, mean).add_(hessian.damp * mean)
    return matrix


class Descent:
    """Codes and scales that are being improved, with their error and its gradient."""

    def __init__(
        self,
        solution: Solution | BlockSolution,
        target: torch.Tensor,  # t, float32 [out, in]
        matrix: torch.Tensor,  # A, float32 [in, in]
        grid: Affine | None,
    ):
        self.matrix = matrix
        self.codes = solution.codes.T.contiguous()  # uint8 [in, out]
        if isinstance(solution, Solution):
            assert grid is not None, "the integers of a Solution do not say which grid they are on"
            self.grid: Affine | BlockGrid = grid
            self.scales = solution.scales.T.float().contiguous()  # [groups, out]
            self.offsets = solution.zero_points.T.float().contiguous()
            self.index = solution.g_idx.long()  # [in]: row of `scales` of each column
        else:
            self.grid, self.stored = solution.grid, solution.params
            self.scales, self.offsets = (p.T.contiguous() for p in solution.params.decoded())
            self.units = solution.params.d.T.float()  # d, [blocks, out]
            self.multiples = solution.params.scales.T.float()  # [sub-blocks, out]
            columns = torch.arange(len(self.codes), device=target.device)
            self.index = columns // self.grid.sub_block
        self.rows = self.index.tolist()
        self.error = self._decoded(slice(None)).sub_(target.T)  # ŵ − t
        self.gradient = self.matrix @ self.error

    def _decoded(self, columns: slice | torch.Tensor) -> torch.Tensor:
        group = self.index[columns]
        return self.grid.decode(
            self.codes[columns].float(), self.scales[group], self.offsets[group]
        )

    def sweep(self) -> int:
        """Choose every code again, in order. Returns how many codes moved."""
        leaf, size = self._columns, _LEAF
        if isinstance(self.grid, BlockGrid) and self.grid.lattice is not None:
            leaf = self._points
        elif kernels.usable(self.codes.device, self.grid):
            leaf, size = self._columns_in_kernel, kernels.BLOCK
        elif host_columns.usable(self.codes, self.grid):
            leaf = self._columns_on_host
        moved = torch.zeros((), dtype=torch.int64, device=self.codes.device)
        for start in range(0, len(self.codes), size):
            here = slice(start, start + size)
            codes, steps = leaf(here)
            moved += (codes != self.codes[here]).sum()
            self.codes[here] = codes.to(torch.uint8)
            self.gradient.addmm_(self.matrix[:, here], steps)
            self.error[here] += steps
        return int(moved)

    def _columns(self, here: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of a leaf, one column after the other, and the change of each weight."""
        codes, weights = self.codes[here].float(), self._decoded(here)
        own, gradient = self.matrix[here, here].contiguous(), self.gradient[here]
        steps = torch.zeros_like(weights)
        turned, curvature = steps.T, own.diagonal()
        for i, group in enumerate(self.rows[here]):
            slope = gradient[i]
            if i:
                slope = torch.addmv(slope, turned[:, :i], own[i, :i])
            scale, offset = self.scales[group], self.offsets[group]
            best = torch.addcdiv(weights[i], slope, curvature[i], value=-1)
            code = self.grid.encode(best, scale, offset)
            torch.sub(self.grid.decode(code, scale, offset), weights[i], out=steps[i])
            codes[i] = code
        return codes, steps

    def _columns_in_kernel(self, here: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """`_columns` as one kernel."""
        weights = self._decoded(here)
        codes, steps = torch.empty_like(self.codes[here]), torch.empty_like(weights)
        kernels.descend_block(
            weights,
            self.gradient[here],
            codes,
            steps,
            self.scales,
            self.offsets,
            self.index[here].to(torch.int32),
            self.matrix[here, here],
            self.grid,
        )
        return codes, steps

    def _columns_on_host(self, here: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """`_columns` with NumPy's shorter calls."""
        codes, weights = self.codes[here].float(), self._decoded(here)
        own, gradient = self.matrix[here, here].contiguous(), self.gradient[here]
        steps, best = torch.zeros_like(weights), torch.empty_like(weights[0])
        turned, curvature, work = steps.T, own.diagonal().numpy(), best.numpy()
        rounding = host_columns.Rounding(self.grid, weights.shape[1])
        arrays = zip(gradient.numpy(), weights.numpy(), codes.numpy(), steps.numpy())
        current = None
        for i, (slope, weight, code, step) in enumerate(arrays):
            if i:
                torch.addmv(gradient[i], turned[:, :i], own[i, :i], out=best)
                slope = work
            if (group := self.rows[here.start + i]) != current:
                current = group
                rounding.use(self.scales[group], self.offsets[group])
            np.divide(slope, curvature[i], out=work)
            np.subtract(weight, work, out=work)
            np.subtract(rounding(work, code), weight, out=step)
        return codes, steps

    def _points(self, here: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The same on a lattice, one point after the other. No row's loss grows."""
        assert isinstance(self.grid, BlockGrid) and self.grid.lattice is not None
        levels, weights = self.grid.values(self.codes[here]), self._decoded(here)
        own, gradient = self.matrix[here, here], self.gradient[here]
        steps, index = torch.zeros_like(weights), self.rows[here]
        for first in range(0, len(levels), self.grid.together):
            point = slice(first, first + self.grid.together)
            slope = gradient[point] + own[point, :first] @ steps[:first]
            matrix, now = own[point, point].contiguous(), weights[point]
            best = now - torch.linalg.solve(matrix, slope)
            level, found = best_points(
                self.grid.lattice,
                best.T.contiguous(),
                self.scales[index[first]],
                matrix,
                levels[point].T.contiguous(),
            )
            levels[point], steps[point] = level.T, found.T - now
        return self.grid.codes(levels), steps

    def params(self) -> Params:
        """What is stored of a block type now."""
        d, scales = (x.T.contiguous() for x in (self.units.half(), self.multiples.to(torch.int16)))
        return replace(self.stored, d=d, scales=scales)

    def refit(self) -> None:
        """Give scales their best values for the codes, in the rows where the loss falls.

        These are the scales of an affine grid. On a lattice they are the multiples of the
        sub-blocks, and then the units. Other block types keep theirs.
        """
        if isinstance(self.grid, Affine):
            for group in range(len(self.scales)):
                columns = (self.index == group).nonzero().squeeze(1)
                steps = self.codes[columns].float() - self.offsets[group]  # [group, out]
                storable = self.grid.storable
                self.scales[group] = self._rescaled(columns, steps, self.scales[group], storable)
        elif self.grid.lattice is not None:
            for block in range(len(self.units)):
                self._refit_block(self.grid, block)

    def _refit_block(self, grid: BlockGrid, block: int) -> None:
        """The multiples of a block on a lattice, one after the other, and its unit."""
        (low, high), step = grid.scale_limits, grid.scale_step
        unit = self.units[block]
        safe = torch.where(unit > 0, unit, 1.0)

        def multiple(scale: torch.Tensor) -> torch.Tensor:
            return (low + step * torch.round((scale / safe - low) / step)).clamp(low, high)

        per = grid.block // grid.sub_block
        subs = range(block * per, (block + 1) * per)
        for sub in subs:
            columns = torch.arange(grid.sub_block, device=unit.device) + sub * grid.sub_block
            values = grid.values(self.codes[columns])
            scale = self._rescaled(
                columns, values, self.scales[sub], lambda best: unit * multiple(best)
            )
            self.multiples[sub] = torch.where(unit > 0, multiple(scale), self.multiples[sub])
        columns = torch.arange(grid.block, device=unit.device) + block * grid.block
        own = self.multiples[subs.start : subs.stop]
        values = grid.values(self.codes[columns]) * own.repeat_interleave(grid.sub_block, 0)
        self.units[block] = self._rescaled(columns, values, unit, lambda best: best.half().float())
        self.scales[subs.start : subs.stop] = self.units[block] * own

    def _rescaled(
        self,
        columns: torch.Tensor,  # int64 [n]: those that share the scale
        steps: torch.Tensor,  # what a scale of 1 would decode to there, [n, out]
        scale: torch.Tensor,  # [out]
        storable: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The storable scales nearest to the best ones, [out], in the rows where the loss falls.

        Error and gradient follow.
        """
        slope = (self.gradient[columns] * steps).sum(0)
        curve = (self.matrix[columns][:, columns] @ steps * steps).sum(0)
        best = scale - slope / curve.clamp_min(torch.finfo(torch.float32).tiny)
        change = storable(best.clamp(0, LARGEST)) - scale
        falls = 2 * change * slope + change.square() * curve < 0
        change = torch.where((best > 0) & falls, change, 0.0)
        steps = steps * change
        self.error[columns] += steps
        self.gradient.addmm_(self.matrix[:, columns], steps)
        return scale + change
