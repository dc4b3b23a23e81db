"""The column loop: a target, a Hessian and a grid in, integers out. Pure functions of tensors.

GPTQ (arXiv 2210.17323) rounds one input column at a time and spreads its error over the columns
that are still free. With the factor of A itself, A = K·diag(d)·Kᵀ and K unit upper triangular, the
weight that is rounded at step j is

    v_j = t_j + Σ_{q<j} (t_q − ŵ_q)·K_qj

    t   the target, [out, in], its columns in the order of the loop
    ŵ   the weights that the codes decode to
    K   the factor, [in, in], in the order of the loop

These are the numbers of the papers' update with the Cholesky factor of A⁻¹ (GPTQ and LDLQ are one
algorithm, arXiv 2307.13304). Without the inverse, one factorization and matrix products are left.

GPTAQ (arXiv 2504.02692) also makes up for the drift between the two streams, column by column:

    t_j ← w_j + Σ_{q<j} v_q·P_qj        beyond the lazy block: ŵ_q·P_qj

with P from `hessian.column_term`. VLM-PTQ adds the own term C (`hessian.own_term`): column j is
rounded as v_j·(1 + C_j), and its error still counts from v_j. docs/methods.md §2 and §3.

On a lattice the columns of a point are one step (docs/methods.md §2.4).

Rows may stand there several times, each time with other ranges. The error of a row under A + λI is
Σ_j d_j·(v_j − ŵ_j)², so that the loop itself tells which of them is best (docs/methods.md §5.4).

Inside the loop every matrix is transposed, [in, out], so that a column of weights is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.solver import host_columns, kernels
from vlmq_export.quantizer.solver.hessian import Hessian
from vlmq_export.quantizer.solver.nearest import round_to_nearest
from vlmq_export.quantizer.solver.points import best_points

# The ranges of one group. Weights [group, out], as the columns before them leave them, and the
# original indices of these columns, int64 [group] → scale and zero-point, [out] each.
Fit = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# The same for the loop: the steps of a group and its weights → the rows of `scales` that it fills,
# and their scales and offsets, [rows, out] each.
FitSteps = Callable[[slice, torch.Tensor], tuple[slice, torch.Tensor, torch.Tensor]]
LEAF = 32  # columns rounded one by one between two matrix products, where no kernel takes more


def solve(
    target: torch.Tensor,  # float32 [out, in]
    hessian: Hessian,
    grid: Affine,
    *,
    group: int,  # columns that share a scale
    act_order: str,
    block: int,  # columns of a lazy block
    column_term: torch.Tensor | None = None,  # GPTAQ's P, [in, in], loop order
    own_term: torch.Tensor | None = None,  # VLM-PTQ's C, [in], loop order
    fit: Fit | None = None,  # in place of the grid's own
    tries: int = 1,  # how often `fit` is given every row, [tries · rows] in turns
) -> Solution:
    """Integers for `target` under the prepared Hessian: the one loop of every method.

    Rows never see each other, so linears that share a Hessian may be stacked by rows. A group is
    fitted on the compensated weights when the loop reaches it (`off`, `gar`, `dynamic`), or on the
    target before the loop begins (`static`). Of several tries of a row the solution has the one
    that leaves the least error under A.
    """
    if hessian.fallback:
        return round_to_nearest(target, grid, group=group)
    order, in_features = hessian.order, target.shape[1]
    target = target.float()
    if bool(hessian.dead.any()):
        target = target.masked_fill(hessian.dead, 0)
    steps = torch.arange(in_features, device=order.device)
    group_of = (steps if act_order == "dynamic" else order) // group  # of each step
    index_of = group_of.tolist()

    def fitted(weights: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grid.fit(weights, dim=0) if fit is None else fit(weights, columns)

    def fit_steps(here: slice, weights: torch.Tensor) -> tuple[slice, torch.Tensor, torch.Tensor]:
        index = index_of[here.start]
        scale, zero = fitted(weights, order[here])
        return slice(index, index + 1), scale[None], zero[None]

    columns = target.T.contiguous()[order]  # [in, out], loop order
    loop = ColumnLoop(
        columns.repeat(1, tries) if tries > 1 else columns,
        hessian.factor,
        grid,
        group=group,
        scale_of=group_of,
        scales=in_features // group,
        block=block,
        fit=None if act_order == "static" else fit_steps,
        column_term=column_term,
        own_term=own_term,
        pivots=hessian.pivots,
        ridge=hessian.ridge if tries > 1 else None,
    )
    if act_order == "static":
        for index, natural in enumerate(steps.split(group)):
            weights = target.T[natural].repeat(1, tries)
            loop.scales[index], loop.offsets[index] = fitted(weights, natural)
    loop.run(0, in_features)
    chosen = _best_tries(loop, columns, hessian) if tries > 1 else slice(None)
    return _solution(loop, chosen, group_of, order.argsort())


def _solution(
    loop: ColumnLoop,
    chosen: torch.Tensor | slice,  # rows
    group_of: torch.Tensor,  # of each step
    back: torch.Tensor,  # the step of each column
) -> Solution:
    """Rows of a finished loop in the original order of the columns."""
    codes, scales, offsets = (x[:, chosen] for x in (loop.codes, loop.scales, loop.offsets))
    return Solution(
        codes[back].T.contiguous(),
        scales.T.half().contiguous(),
        offsets.T.to(torch.uint8).contiguous(),
        group_of[back].to(torch.int32),
    )


def _best_tries(loop: ColumnLoop, target: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """The places of the best try of each row of the target, among all that the loop has had."""
    rows = target.shape[1]
    error = _errors(loop, target, hessian).view(-1, rows)
    return error.argmin(0) * rows + torch.arange(rows, device=error.device)


def _errors(loop: ColumnLoop, target: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """What a finished loop has left of each of its rows under A, float32 [out].

    target: in the loop's order, [in, out], of which the loop has had one or several in turns.
    """
    if loop.left is not None:
        return torch.from_numpy(loop.left.error)
    apart = loop.shift  # t − ŵ, but for a column term, which has moved t
    if loop.column_term is not None:
        scales, offsets = loop.scales[loop.scale_of], loop.offsets[loop.scale_of]
        ours = loop.grid.decode(loop.codes, scales, offsets)
        apart = target.repeat(1, ours.shape[1] // target.shape[1]) - ours
    error = hessian.pivots @ (hessian.factor.T @ apart).square_()
    return error - hessian.ridge * apart.square().sum(0)


class ColumnLoop:
    """One run of the loop. Its `codes`, `scales` and `offsets` are filled by `run`."""

    def __init__(
        self,
        target: torch.Tensor,  # float32 [in, out], loop order; overwritten
        factor: torch.Tensor,  # K
        grid: Affine | BlockGrid,
        *,
        group: int,  # columns whose ranges are fitted together
        scale_of: torch.Tensor,  # int64 [in]: row of `scales` that each step decodes with
        scales: int,  # number of these rows
        block: int,  # columns of a lazy block
        fit: FitSteps | None,  # None: `scales` and `offsets` are filled before `run`
        column_term: torch.Tensor | None = None,
        own_term: torch.Tensor | None = None,
        pivots: torch.Tensor | None = None,  # d, [in]; for a lattice, and where rows are judged
        ridge: float | None = None,  # λ, where rows are judged
    ):
        in_features, out_features = target.shape
        # t, [in, out]. Once its column is rounded, an entry is what the column term multiplies.
        self.target = target
        # Σ (t_q − ŵ_q)·K_qj so far, [in, out]. Once its column is rounded, an entry is t_j − ŵ_j.
        self.shift = torch.zeros_like(target)
        self.codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=target.device)
        self.scales = torch.empty(scales, out_features, device=target.device)
        self.offsets = torch.empty_like(self.scales)  # zero-points, or minima of a block type
        self.factor, self.grid, self.group, self.fit = factor, grid, group, fit
        self.column_term, self.own_term, self.pivots = column_term, own_term, pivots
        self.scale_of, self.scale_index = scale_of.tolist(), scale_of.to(torch.int32)
        # A group is fitted on weights that carry every earlier update. Only ranges of whole groups
        # may therefore straddle two lazy blocks.
        self.lazy = block if group >= block else block // group * group
        # A method that is bound to the loop would hold it, and its tensors with it, until Python
        # next looks for cycles.
        self._leaf = ColumnLoop._leaf_of_columns
        if isinstance(grid, BlockGrid) and grid.lattice is not None:
            self._leaf = ColumnLoop._leaf_of_points
        elif own_term is None and kernels.usable(target.device, grid):
            self._leaf = ColumnLoop._leaf_in_kernel
        elif own_term is None and host_columns.usable(target, grid):
            self._leaf = ColumnLoop._leaf_on_host
        # What is left of each row under A. Elsewhere it is a product (`_errors`).
        self.left: host_columns.Left | None = None
        counts = column_term is None and self._leaf is ColumnLoop._leaf_on_host
        if ridge is not None and pivots is not None and counts:
            self.left = host_columns.Left(out_features, pivots, ridge)
        takes = kernels.BLOCK if kernels.usable(target.device, grid) else LEAF
        self.units = sorted({group, self.lazy, min(takes, group, self.lazy)}, reverse=True)

    def run(self, start: int, stop: int, *, inside: bool = False) -> None:
        """Round the columns start … stop, which carry the updates of all columns before them.

        The range is split into halves, so that the work is matrix products as large as can be: at
        the boundaries of lazy blocks or groups, whichever are larger, then of the smaller ones,
        then of leaves. `inside` says whether the range lies within one lazy block.
        """
        size = stop - start
        if self.fit is not None and size == self.group and start % size == 0:
            self._fit(slice(start, stop))
        lazy = not inside and size <= self.lazy  # this range is a whole lazy block
        unit = next((u for u in self.units if u < size), None)
        if unit is None:
            self._leaf(self, start, stop)
        else:
            middle = start + -(-size // unit) // 2 * unit
            self.run(start, middle, inside=inside or lazy)
            factor = self.factor[start:middle, middle:stop]
            self.shift[middle:stop].addmm_(factor.T, self.shift[start:middle])
            if self.column_term is not None:
                term = self.column_term[start:middle, middle:stop]
                self.target[middle:stop].addmm_(term.T, self.target[start:middle])
            self.run(middle, stop, inside=inside or lazy)
        # As the authors' code has it: docs/methods.md §2.2.
        if lazy and self.column_term is not None:
            rows = self.scale_of[start:stop]
            self.target[start:stop] = self.grid.decode(
                self.codes[start:stop], self.scales[rows], self.offsets[rows]
            )

    def _fit(self, here: slice) -> None:
        """Fit a group on its weights as the columns before it leave them: t + E·K_<≥·(K_≥≥)⁻¹.

        E are the errors t − ŵ of the columns before. The inverse is small, and a product with it
        takes a fraction of a triangular solve with so many right sides.
        """
        assert self.fit is not None
        weights = self.target[here]
        if here.start:
            own = self.factor[here, here].T.double()
            inverse = torch.linalg.solve_triangular(
                own, torch.eye(len(own)).to(own), upper=False, unitriangular=True
            )
            weights = torch.addmm(weights, inverse.float(), self.shift[here])
        rows, scales, offsets = self.fit(here, weights)
        self.scales[rows], self.offsets[rows] = scales, offsets

    def _leaf_of_points(self, start: int, stop: int) -> None:
        """Round one point of a lattice after the other."""
        assert isinstance(self.grid, BlockGrid)
        for first in range(start, stop, self.grid.together):
            self._point(self.grid, start, slice(first, first + self.grid.together))

    def _point(self, grid: BlockGrid, start: int, here: slice) -> None:
        """Round the columns of one point. `start` is the first column of its leaf.

        What their errors cost once later columns have made up for them is K·diag(d)·Kᵀ, with the
        parts of K and d that belong to these columns.
        """
        before, own, term = slice(start, here.start), self.factor[here, here], self.column_term
        target, shift = self.target[here], self.shift[here]  # [columns, out]
        shift.addmm_(self.factor[before, here].T, self.shift[before])
        free = torch.linalg.solve_triangular(own.T, shift, upper=False, unitriangular=True)
        weights = target + free
        if term is not None:  # v_j = t_j + Σ v_q·P_qj, within the point too
            weights.addmm_(term[before, here].T, self.target[before])
            weights = torch.linalg.solve_triangular(
                -term[here, here].T, weights, upper=False, unitriangular=True
            )
            target = weights - free
        assert self.pivots is not None and grid.lattice is not None
        cost = own * self.pivots[here] @ own.T
        wanted = weights if self.own_term is None else weights * (1 + self.own_term[here, None])
        scale = self.scales[self.scale_of[here.start]]
        levels, points = best_points(grid.lattice, wanted.T.contiguous(), scale, cost)
        self.codes[here] = grid.codes(levels).T
        torch.sub(target, points.T, out=shift)
        if term is not None:
            self.target[here] = weights

    def _leaf_of_columns(self, start: int, stop: int) -> None:
        """Round one column after the other.

        The tensors are small here, so that the number of calls is what counts.
        """
        factor = self.factor[start:stop, start:stop].T.contiguous()  # [to, from]
        term = self.column_term
        term = None if term is None else term[start:stop, start:stop].T.contiguous()
        target, shift = self.target[start:stop], self.shift[start:stop]
        codes, before = torch.empty_like(target), shift.T
        current = self.scale_of[start]
        scale, offset = self.scales[current], self.offsets[current]
        rows = zip(target.unbind(), shift.unbind(), codes.unbind(), factor.unbind())
        for i, (t, s, code, k) in enumerate(rows):
            if i:
                s.addmv_(before.narrow(1, 0, i), k.narrow(0, 0, i))
                if term is not None:
                    t.addmv_(target[:i].T, term[i, :i])
            if current != (current := self.scale_of[start + i]):
                scale, offset = self.scales[current], self.offsets[current]
            weights = t + s  # v_j, [out]
            own = self.own_term
            code.copy_(
                self.grid.encode(
                    weights if own is None else weights * (1 + own[start + i]), scale, offset
                )
            )
            torch.sub(t, self.grid.decode(code, scale, offset), out=s)
            if term is not None:
                t.copy_(weights)
        self.codes[start:stop] = codes.to(torch.uint8)

    def _leaf_on_host(self, start: int, stop: int) -> None:
        """`_leaf_of_columns` with NumPy's shorter calls."""
        here = slice(start, stop)
        factor = self.factor[here, here].T.contiguous()
        term = self.column_term
        term = None if term is None else term[here, here].T.contiguous()
        target, shift = self.target[here], self.shift[here]
        codes, before, weights = torch.empty_like(target), shift.T, torch.empty_like(target[0])
        rounding = host_columns.Rounding(self.grid, target.shape[1])
        arrays = zip(target.numpy(), shift.numpy(), codes.numpy(), self.scale_of[here])
        current, sums = None, weights.numpy()
        for i, (t, s, code, group) in enumerate(arrays):
            if i:
                shift[i].addmv_(before.narrow(1, 0, i), factor[i].narrow(0, 0, i))
                if term is not None:
                    target[i].addmv_(target[:i].T, term[i, :i])
            if group != current:
                current = group
                rounding.use(self.scales[group], self.offsets[group])
            np.add(t, s, out=sums)
            ours = rounding(sums, code)
            np.subtract(t, ours, out=s)
            if term is not None:
                t[:] = sums
            elif self.left is not None:
                self.left.add(start + i, np.subtract(sums, ours, out=sums), s)
        self.codes[here] = codes.to(torch.uint8)

    def _leaf_in_kernel(self, start: int, stop: int) -> None:
        """`_leaf_of_columns` as one kernel."""
        here = slice(start, stop)
        term = self.column_term
        kernels.round_block(
            self.target[here],
            self.shift[here],
            self.codes[here],
            self.scales,
            self.offsets,
            self.scale_index[here],
            self.factor[here, here],
            None if term is None else term[here, here],
            self.grid,
        )
