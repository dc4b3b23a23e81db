"""After the column loop: better integers and scales for the same target, under the whole Hessian.

The loop never looks back. Coordinate descent does: with everything else fixed, the best weight for column j of a row is

    ŵ_j − [A·(ŵ − t)]_j / A_jj                        t the target, A the damped Hessian

rounded to the grid; sweeping over the columns lowers (ŵ − t)·A·(ŵ − t)ᵀ until no code moves (QuantEase, arXiv 2309.01885;
CDQuant, arXiv 2406.17542). Between the sweeps each scale takes the value that is best for its codes, rounded to what will
be stored, where that lowers the loss (methods.md §5.2). Everything here is transposed, [in, out], as in the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch

from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.ranges import narrowed
from vlmq_export.quantizer.solver import BlockSolution, Fit, Hessian, Solution

_LEAF = 64  # columns between two matrix products
AT_ONCE = 2**24  # weights that are solved at once, over all ranges: more are no faster, and take memory in proportion


def descend(
    solution: Solution | BlockSolution,
    target: torch.Tensor,  # float32 [out, in], original order
    hessian: Hessian,
    grid: Affine | None = None,  # of a Solution
    *,
    sweeps: int,
    refit: bool = False,  # of a Solution's scales, before each sweep but the first
) -> Solution | BlockSolution:
    """The solution after at most `sweeps` of coordinate descent; as it was where the Hessian could not be factorized."""
    if hessian.fallback or not sweeps:
        return solution
    state = Descent(solution, target.float().masked_fill(hessian.dead, 0), damped(hessian), grid)
    for sweep in range(sweeps):
        if refit and sweep and state.affine:
            state.refit()
        if not state.sweep():
            break
    return state.solution()


def best_range(
    solve: Callable[[torch.Tensor, Fit], Solution],
    target: torch.Tensor,  # float32 [out, in]
    hessian: Hessian,
    grid: Affine,
    shares: Sequence[float],
    moves: Sequence[int] = (0,),  # of the zero-points
) -> Solution:
    """`solve(target, fit)` with each row's ranges a share of min-max: that share whose solution errs least under A.

    Judged after the loop, which makes up for what a range clips: the error before it misleads (methods.md §5.4). All
    shares, each with all moves of the zero-points, are solved at once, as rows.
    """
    tries = list(product(shares, moves))
    kept = []
    for part in target.split(max(1, AT_ONCE // (len(tries) * target.shape[1]))):
        rows = len(part)
        each = [torch.tensor(x, device=target.device).repeat_interleave(rows) for x in zip(*tries)]
        many = part.repeat(len(tries), 1)
        tried = solve(many, lambda weights, _columns, each=each: narrowed(grid, weights, *each))
        error = tried.decode() - many.masked_fill(hessian.dead, 0)
        best = ((error @ hessian.matrix) * error).sum(1).view(len(tries), rows).argmin(0)
        chosen = best * rows + torch.arange(rows, device=target.device)
        kept.append((tried.codes[chosen], tried.scales[chosen], tried.zero_points[chosen]))
    return Solution(*(torch.cat(parts) for parts in zip(*kept)), tried.g_idx)


def damped(hessian: Hessian) -> torch.Tensor:
    """A + λI [in, in], the matrix that was factorized."""
    matrix = hessian.matrix.clone()
    live = matrix.diagonal()[~hessian.dead]
    mean = float(live.double().mean())
    matrix.diagonal().masked_fill_(hessian.dead, mean).add_(hessian.damp * mean)
    return matrix


class Descent:
    def __init__(self, solution, target: torch.Tensor, matrix: torch.Tensor, grid: Affine | None):
        self.held, self.matrix, self.affine = solution, matrix, isinstance(solution, Solution)
        self.grid = grid if self.affine else solution.grid
        self.codes = solution.codes.T.contiguous()  # uint8 [in, out]
        if self.affine:
            self.scales, self.offsets = solution.scales.T.float(), solution.zero_points.T.float()  # [groups, out]
            self.index = solution.g_idx.long()
        else:
            self.scales, self.offsets = (p.T.contiguous() for p in solution.params.decoded())
            self.index = torch.arange(len(self.codes), device=target.device) // self.grid.sub_block
        self.error = self._decoded(slice(None)).sub_(target.T)  # ŵ − t
        self.gradient = self.matrix @ self.error

    def _decoded(self, columns: slice | torch.Tensor) -> torch.Tensor:
        group = self.index[columns]
        return self.grid.decode(self.codes[columns].float(), self.scales[group], self.offsets[group])

    def sweep(self) -> int:
        """Choose every code again, in order; how many moved."""
        moved = 0
        for start in range(0, len(self.codes), _LEAF):
            here = slice(start, start + _LEAF)
            codes, weights = self.codes[here].float(), self._decoded(here)
            own, gradient = self.matrix[here, here].contiguous(), self.gradient[here]
            steps = torch.zeros_like(weights)
            turned = steps.T
            step = own.diagonal()
            for i, group in enumerate(self.index[here].tolist()):
                slope = gradient[i]
                if i:
                    slope = torch.addmv(slope, turned[:, :i], own[i, :i])
                scale, offset = self.scales[group], self.offsets[group]
                code = self.grid.encode(torch.addcdiv(weights[i], slope, step[i], value=-1), scale, offset)
                torch.sub(self.grid.decode(code, scale, offset), weights[i], out=steps[i])
                codes[i] = code
            moved += int((codes != self.codes[here]).sum())
            self.codes[here] = codes.to(torch.uint8)
            self.gradient.addmm_(self.matrix[:, here], steps)
            self.error[here] += steps
        return moved

    def refit(self) -> None:
        """Each scale's best value for its codes, rounded to storage, kept in the rows where the loss falls."""
        for group in range(len(self.scales)):
            columns = (self.index == group).nonzero().squeeze(1)
            steps = self.codes[columns].float() - self.offsets[group]  # [group, out]
            slope = (self.gradient[columns] * steps).sum(0)
            curve = (self.matrix[columns][:, columns] @ steps * steps).sum(0)
            best = self.scales[group] - slope / curve.clamp_min(torch.finfo(torch.float32).tiny)
            change = self.grid.storable(best.clamp_min(0)) - self.scales[group]
            change = torch.where((best > 0) & (2 * change * slope + change.square() * curve < 0), change, 0.0)
            self.scales[group] += change
            steps *= change
            self.error[columns] += steps
            self.gradient.addmm_(self.matrix[:, columns], steps)

    def solution(self):
        codes = self.codes.T.contiguous()
        if not self.affine:
            return replace(self.held, codes=codes)
        return replace(self.held, codes=codes, scales=self.scales.T.half().contiguous())
