"""After the loop: better integers and scales for the same target, under the whole Hessian.

The loop never looks back. Coordinate descent does. With everything else fixed, the best weight for
column j of a row is

    ŵ_j − [A·(ŵ − t)]_j / A_jj

    t   the target
    ŵ   the weights that the codes decode to
    A   the damped Hessian

and is then rounded to the grid. Sweeps over the columns lower (ŵ − t)·A·(ŵ − t)ᵀ until no code
moves (QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542). Between two sweeps each scale can
take the value that is best for its codes, rounded to storage, where that lowers the loss
(docs/methods.md §5.2). Matrices are transposed here, [in, out], as in the loop.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid
from vlmq_export.quantizer.grids.solutions import BlockSolution, Solution
from vlmq_export.quantizer.solver.hessian import Hessian

_LEAF = 64  # columns between two matrix products
Solved = TypeVar("Solved", Solution, BlockSolution)


def descend(
    solution: Solved,
    target: torch.Tensor,  # float32 [out, in], original order
    hessian: Hessian,
    grid: Affine | None = None,  # that of a Solution; a BlockSolution names its own
    *,
    sweeps: int,
    refit: bool = False,  # a Solution's scales, before each sweep but the first
) -> Solved:
    """The solution after at most `sweeps` sweeps.

    Where the Hessian could not be factorized, the solution is returned as it was.
    """
    if hessian.fallback or not sweeps:
        return solution
    target = target.float().masked_fill(hessian.dead, 0)
    state = Descent(solution, target, damped(hessian), grid)
    for sweep in range(sweeps):
        if refit and sweep and isinstance(solution, Solution):
            state.refit()
        if not state.sweep():
            break
    codes = state.codes.T.contiguous()
    if isinstance(solution, Solution):
        return replace(solution, codes=codes, scales=state.scales.T.half().contiguous())
    return replace(solution, codes=codes)


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
            self.scales = solution.scales.T.float()  # [groups, out]
            self.offsets = solution.zero_points.T.float()
            self.index = solution.g_idx.long()  # [in]: row of `scales` of each column
        else:
            self.grid = solution.grid
            self.scales, self.offsets = (p.T.contiguous() for p in solution.params.decoded())
            columns = torch.arange(len(self.codes), device=target.device)
            self.index = columns // self.grid.sub_block
        self.error = self._decoded(slice(None)).sub_(target.T)  # ŵ − t
        self.gradient = self.matrix @ self.error

    def _decoded(self, columns: slice | torch.Tensor) -> torch.Tensor:
        group = self.index[columns]
        return self.grid.decode(
            self.codes[columns].float(), self.scales[group], self.offsets[group]
        )

    def sweep(self) -> int:
        """Choose every code again, in order. Returns how many codes moved."""
        moved = 0
        for start in range(0, len(self.codes), _LEAF):
            here = slice(start, start + _LEAF)
            codes, weights = self.codes[here].float(), self._decoded(here)
            own, gradient = self.matrix[here, here].contiguous(), self.gradient[here]
            steps = torch.zeros_like(weights)  # change of each weight
            turned, curvature = steps.T, own.diagonal()
            for i, group in enumerate(self.index[here].tolist()):
                slope = gradient[i]
                if i:
                    slope = torch.addmv(slope, turned[:, :i], own[i, :i])
                scale, offset = self.scales[group], self.offsets[group]
                best = torch.addcdiv(weights[i], slope, curvature[i], value=-1)
                code = self.grid.encode(best, scale, offset)
                torch.sub(self.grid.decode(code, scale, offset), weights[i], out=steps[i])
                codes[i] = code
            moved += int((codes != self.codes[here]).sum())
            self.codes[here] = codes.to(torch.uint8)
            self.gradient.addmm_(self.matrix[:, here], steps)
            self.error[here] += steps
        return moved

    def refit(self) -> None:
        """Give each affine scale its best value for the codes, in the rows where the loss falls."""
        assert isinstance(self.grid, Affine)
        for group in range(len(self.scales)):
            columns = (self.index == group).nonzero().squeeze(1)
            steps = self.codes[columns].float() - self.offsets[group]  # [group, out]
            slope = (self.gradient[columns] * steps).sum(0)
            curve = (self.matrix[columns][:, columns] @ steps * steps).sum(0)
            best = self.scales[group] - slope / curve.clamp_min(torch.finfo(torch.float32).tiny)
            change = self.grid.storable(best.clamp_min(0)) - self.scales[group]
            falls = 2 * change * slope + change.square() * curve < 0
            change = torch.where((best > 0) & falls, change, 0.0)
            self.scales[group] += change
            steps *= change
            self.error[columns] += steps
            self.gradient.addmm_(self.matrix[:, columns], steps)
