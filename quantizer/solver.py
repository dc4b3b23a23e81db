"""The column loop: (weights, Hessian, grid) → integers. Pure functions of tensors.

GPTQ (arXiv 2210.17323) rounds one input column at a time and spreads its error over the columns that are still free.
Written with the factor of A itself, A = K·diag(d)·Kᵀ with K unit upper triangular, the weight that is rounded at step j is

    v_j = t_j + Σ_{q<j} (t_q − ŵ_q)·K_qj        t the target, ŵ what was chosen

the same numbers as the papers' update with the Cholesky factor of A⁻¹ (LDLQ and GPTQ are one algorithm, arXiv 2307.13304), without
the inverse: one factorization of A and matrix products are all that is left.

GPTAQ (arXiv 2504.02692) also corrects for the drift between the streams, column by column (methods.md §2.2):

    P = α·triu(D·L, 1)·Lᵀ, A⁻¹ = L·Lᵀ        t_j ← w_j + Σ_{q<j} v_q·P_qj   (beyond the lazy block: ŵ_q·P_qj)

The exact solution of the same problem is plain GPTQ on W' = W + α·W·D·A⁻¹ (`exact_target`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlmq_export.quantizer import kernels
from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.kquants import BlockGrid, Params

PRECISION = torch.float64  # of the factorization
# Weights [group, out] as the columns before them leave them, and those columns [group] → scale and zero-point [out].
Fit = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
_BAND = 512  # rows or columns worked on together
DAMP_STEPS = (1, 10, 100)  # times the recipe's damping, tried in turn before falling back to plain rounding
FAINTEST = 1e-30  # mean(diag A) of inputs that float32 can still divide by; nothing that a model computes is so small
LEAF = 32  # columns that are rounded one by one between two matrix products, where no kernel takes more


@dataclass(frozen=True)
class Hessian:
    """A Hessian made ready: damped, ordered and factorized once for all linears that share it."""

    matrix: torch.Tensor  # A as accumulated, float32 [in, in], original order
    dead: torch.Tensor  # bool [in], original order: inputs that calibration never excites
    order: torch.Tensor  # int64 [in]: column of the original order that the loop takes at each step
    factor: torch.Tensor | None  # K, unit upper triangular, float32 [in, in], loop order; None: factorization failed
    pivots: torch.Tensor | None  # d, float32 [in], loop order: what is left of A_jj once the columns after j are known
    damp: float  # share of mean(diag A) that was added

    @property
    def fallback(self) -> bool:
        """Whether no damping made the matrix definite, so that weights are rounded to nearest."""
        return self.factor is None


@dataclass(frozen=True)
class Solution:
    """Integers of one linear, or of several stacked by rows, in the original column order."""

    codes: torch.Tensor  # uint8 [out, in]
    scales: torch.Tensor  # float16 [out, groups]
    zero_points: torch.Tensor  # uint8 [out, groups]
    g_idx: torch.Tensor  # int32 [in]

    def decode(self) -> torch.Tensor:
        """float32 [out, in]."""
        codes, scales, zeros = self.codes.float(), self.scales.float(), self.zero_points.float()
        group = self.codes.shape[1] // scales.shape[1]
        if bool((self.g_idx.view(-1, group) == self.g_idx.view(-1, group)[:, :1]).all()):  # groups lie together
            first = self.g_idx[::group].long()
            grouped = codes.view(len(codes), -1, group)
            return grouped.sub_(zeros[:, first, None]).mul_(scales[:, first, None]).view_as(codes)
        index = self.g_idx.long()
        return codes.sub_(zeros[:, index]).mul_(scales[:, index])

    def rows(self, start: int, stop: int) -> Solution:
        return Solution(self.codes[start:stop], self.scales[start:stop], self.zero_points[start:stop], self.g_idx)


def column_order(diagonal: torch.Tensor, group: int, act_order: str) -> torch.Tensor:
    """int64 [in]: the order of the loop, largest diag(A) first; ties keep the original order.

    `gar` keeps each natural group of `group` columns together: groups by their largest entry, columns inside by theirs.
    """
    if act_order == "off":
        return torch.arange(len(diagonal), device=diagonal.device)
    if act_order != "gar":
        return diagonal.argsort(descending=True, stable=True)
    inside = diagonal.view(-1, group).argsort(dim=1, descending=True, stable=True)  # [groups, group]
    groups = diagonal.view(-1, group).amax(1).argsort(descending=True, stable=True)
    return (groups[:, None] * group + inside[groups]).flatten()


def prepare(matrix: torch.Tensor, diagonal: torch.Tensor, *, group: int, act_order: str, damp: float) -> Hessian:
    """Damp, order and factorize A [in, in]; `diagonal` [in] is the unweighted Σx² that tells dead inputs (D9).

    At most two matrices of the factorization's precision are alive at a time, besides A.
    """
    dead = diagonal == 0
    weights = matrix.diagonal()
    order = column_order(weights, group, act_order)
    live = weights[~dead].double()
    mean = float(live.mean()) if len(live) else 0.0
    for step in DAMP_STEPS if mean > FAINTEST else ():
        backwards = order.flip(0)  # LAPACK's lower factor of the reversed matrix is the upper one that the loop needs
        permuted = _permuted(matrix, backwards)
        own = permuted.diagonal()
        own.masked_fill_(dead[backwards], mean).add_(
            step * damp * mean
        )  # dead: zero elsewhere, any positive value does
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(permuted.mT, out=(permuted.mT, info))  # LAPACK's column order: in place
        if int(info) == 0 and bool(torch.isfinite(own).all()):
            return Hessian(matrix, dead, order, *_unit_upper(permuted), step * damp)
    return Hessian(matrix, dead, order, None, None, 0.0)


def _permuted(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A copy with rows and columns in `order`, made in bands so that nothing else has its size."""
    permuted = torch.empty(matrix.shape, dtype=PRECISION, device=matrix.device)
    for band, rows in zip(permuted.split(_BAND), order.split(_BAND)):
        band.copy_(matrix[rows].index_select(1, order))
    return permuted


def _unit_upper(transposed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, d), float32, with K·diag(d)·Kᵀ the reversal of L·Lᵀ, from Lᵀ, whose lower triangle is not read."""
    roots = transposed.diagonal().clone()
    factor = torch.empty(transposed.shape, dtype=torch.float32, device=transposed.device)
    for start in range(0, len(roots), _BAND):  # rows of Lᵀ are columns of L, and columns of K from the last on
        rows = transposed[start : start + _BAND].triu(start).div_(roots[start : start + _BAND, None])
        factor[:, len(roots) - start - len(rows) : len(roots) - start] = rows.flip(0, 1).T
    return factor, roots.flip(0).square().float()


def column_term(hessian: Hessian, drift: torch.Tensor, alpha: float) -> torch.Tensor:
    """P = α·triu(D·L, 1)·Lᵀ in loop order, float32 [in, in]; row q is α·D_q,>q·(A_>q)⁻¹.

    L·Lᵀ = K⁻ᵀ·d⁻¹·K⁻¹, so two triangular solves; a band of rows needs only the columns from its own diagonal on.
    """
    order, factor, term = hessian.order, hessian.factor, torch.zeros_like(drift)
    for start in range(0, len(drift), _BAND):
        rows = drift[order[start : start + _BAND]].index_select(1, order[start:])
        half = _times_inverse(rows, factor[start:, start:].T, upper=False).triu_(1)
        half.mul_(alpha / hessian.pivots[start:])
        term[start : start + _BAND, start:] = _times_inverse(half, factor[start:, start:], upper=True)
    return term


def own_term(hessian: Hessian, drift: torch.Tensor, alpha: float) -> torch.Tensor:
    """VLM-PTQ's C = α·diag(D·L)⊙diag(L) in loop order, float32 [in]; C_q is α·D_q,≥q·[(A_≥q)⁻¹]_:,q.

    What a column would add to itself if it were still free: it is rounded as v·(1 + C), its error still counts from v.
    """
    order, factor, term = hessian.order, hessian.factor, torch.empty_like(hessian.pivots)
    for start in range(0, len(drift), _BAND):
        rows = drift[order[start : start + _BAND]].index_select(1, order[start:])
        term[start : start + _BAND] = _times_inverse(rows, factor[start:, start:].T, upper=False).diagonal()
    return term.mul_(alpha).div_(hessian.pivots)


def exact_target(weights: torch.Tensor, hessian: Hessian, drift: torch.Tensor, alpha: float) -> torch.Tensor:
    """W' = W + α·W·D·(A+λI)⁻¹, float32 [out, in], original order. Damping leans toward W, not toward zero."""
    return weights + alpha * regression(weights @ drift, hessian)


def regression(products: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """products·(A+λI)⁻¹, float32 [out, in], original order."""
    shift = _times_inverse(products[:, hessian.order], hessian.factor.T, upper=False).div_(hessian.pivots)
    shift = _times_inverse(shift, hessian.factor, upper=True)
    return shift[:, hessian.order.argsort()]


def _times_inverse(matrix: torch.Tensor, triangle: torch.Tensor, *, upper: bool) -> torch.Tensor:
    """matrix · triangle⁻¹ for a unit triangle."""
    return torch.linalg.solve_triangular(triangle, matrix, upper=upper, left=False, unitriangular=True)


def round_to_nearest(weights: torch.Tensor, grid: Affine, *, group: int) -> Solution:
    """Each weight [out, in] on its own, natural groups."""
    out_features, in_features = weights.shape
    grouped = weights.float().view(out_features, -1, group)
    scale, zero = grid.fit(grouped)
    codes = grid.encode(grouped, scale[..., None], zero[..., None]).view(out_features, in_features)
    g_idx = torch.arange(in_features, dtype=torch.int32, device=weights.device) // group
    return Solution(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), g_idx)


def solve(
    target: torch.Tensor,  # float32 [out, in]
    hessian: Hessian,
    grid: Affine,
    *,
    group: int,  # columns that share a scale
    act_order: str,
    block: int,  # within it GPTAQ's term takes the weights before rounding, beyond it those after
    columns: torch.Tensor | None = None,  # GPTAQ's P, loop order
    own: torch.Tensor | None = None,  # VLM-PTQ's C, loop order
    fit: Fit | None = None,  # of ranges, in place of the grid's own
) -> Solution:
    """Codes for `target` under the prepared Hessian, the one loop of every method.

    Rows never see each other, so linears that share a Hessian may be stacked. Groups are fitted on the compensated
    weights when the loop reaches them (`off`, `gar`, `dynamic`) or on the target before the loop (`static`).
    """
    if hessian.fallback:
        return round_to_nearest(target, grid, group=group)
    order, in_features = hessian.order, target.shape[1]
    target = target.float()
    if bool(hessian.dead.any()):
        target = target.masked_fill(hessian.dead, 0)
    natural = order // group  # natural group of each step
    group_of = torch.arange(in_features, device=order.device) // group if act_order == "dynamic" else natural
    loop = _Loop(target.T.contiguous()[order], hessian.factor, columns, grid, group, group, block, group_of)
    loop.own, loop.fit, loop.order = own, fit, order
    if act_order == "static":
        for columns_of in torch.arange(in_features, device=order.device).split(group):
            index = int(columns_of[0]) // group
            loop.scales[index], loop.zeros[index] = loop.fitted_to(target.T[columns_of], columns_of)
        loop.fitted = True
    loop.run(0, in_features)
    back = order.argsort()
    return Solution(
        loop.codes[back].T.contiguous(), loop.scales.T.half().contiguous(), loop.zeros.T.to(torch.uint8).contiguous(),
        group_of[back].to(torch.int32),
    )  # fmt: skip


class _Loop:
    """One run of the column loop, in loop order; a column of the weights is one contiguous row here."""

    def __init__(
        self, target: torch.Tensor, factor: torch.Tensor, columns: torch.Tensor | None, grid: Affine | BlockGrid, group: int,
        shared: int, block: int, group_of: torch.Tensor,
    ):  # fmt: skip
        """`group` columns are fitted together, `shared` of them have one scale: the `group_of` of their step."""
        in_features, out_features = target.shape
        self.target = target  # t, [in, out]; once rounded: what P multiplies
        self.shift = torch.zeros_like(target)  # Σ (t_q − ŵ_q)·K_qj so far, [in, out]; once rounded: t_j − ŵ_j
        self.codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=target.device)
        self.scales = torch.empty(in_features // shared, out_features, device=target.device)
        self.zeros = torch.empty_like(self.scales)
        self.factor, self.columns, self.grid, self.group = factor, columns, grid, group
        self.group_of, self.group_index = group_of.tolist(), group_of.to(torch.int32)
        self.fitted = False  # whether the groups were fitted before the loop
        self.own = self.fit = self.order = None  # as in `solve`
        # A group is fitted on weights that carry every earlier update: no range but whole groups may straddle two.
        self.lazy = block if group >= block else block // group * group
        self.kernel = kernels.usable(target.device, grid)
        leaf = min(kernels.BLOCK if self.kernel else LEAF, group, self.lazy)
        self.units = sorted({group, self.lazy, leaf}, reverse=True)

    def run(self, start: int, stop: int, *, inside: bool = False) -> None:
        """Round columns start … stop, which already carry the updates of all before them; `inside` a lazy block or not.

        By halves, so that the work is matrix products as large as can be: parted between lazy blocks or groups,
        whichever is larger, then between the smaller ones, then between leaves.
        """
        size = stop - start
        if size == self.group and start % size == 0 and not self.fitted:
            self._fit(start, stop)
        lazy = not inside and size <= self.lazy
        unit = next((u for u in self.units if u < size), None)
        if unit is None:
            (self._fused if self.kernel and self.own is None else self._leaf)(start, stop)
        else:
            middle = start + -(-size // unit) // 2 * unit
            self.run(start, middle, inside=inside or lazy)
            self.shift[middle:stop].addmm_(self.factor[start:middle, middle:stop].T, self.shift[start:middle])
            if self.columns is not None:
                self.target[middle:stop].addmm_(self.columns[start:middle, middle:stop].T, self.target[start:middle])
            self.run(middle, stop, inside=inside or lazy)
        if lazy and self.columns is not None:  # as the authors' code has it, docs/methods.md
            groups = self.group_of[start:stop]
            self.target[start:stop] = self.grid.decode(self.codes[start:stop], self.scales[groups], self.zeros[groups])

    def _fit(self, start: int, stop: int) -> None:
        """Fit a group on its weights as the columns before it leave them: with E their errors, t + E·K_<≥·(K_≥≥)⁻¹."""
        own = self.factor[start:stop, start:stop].T
        shift = torch.linalg.solve_triangular(own, self.shift[start:stop], upper=False, unitriangular=True)
        self._fit_to(start, stop, self.target[start:stop] + shift)

    def _fit_to(self, start: int, stop: int, weights: torch.Tensor) -> None:
        """weights: [group, out], in loop order."""
        group = self.group_of[start]
        self.scales[group], self.zeros[group] = self.fitted_to(weights, self.order[start:stop])

    def fitted_to(self, weights: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero-point [out] of one group [group, out]."""
        return self.grid.fit(weights, dim=0) if self.fit is None else self.fit(weights, columns)

    def _leaf(self, start: int, stop: int) -> None:
        """One column after the other. The tensors are small here: what counts is the number of calls."""
        factor = self.factor[start:stop, start:stop].T.contiguous()  # [to, from]
        term = None if self.columns is None else self.columns[start:stop, start:stop].T.contiguous()
        target, shift = self.target[start:stop], self.shift[start:stop]
        codes, before, current = torch.empty_like(target), shift.T, None
        for i, (t, s, code, k) in enumerate(zip(target.unbind(), shift.unbind(), codes.unbind(), factor.unbind())):
            if i:
                s.addmv_(before.narrow(1, 0, i), k.narrow(0, 0, i))
                if term is not None:
                    t.addmv_(target[:i].T, term[i, :i])
            if current != (current := self.group_of[start + i]):
                scale, zero = self.scales[current], self.zeros[current]
            weights = t + s
            aim = weights if self.own is None else weights * (1 + self.own[start + i])
            code.copy_(self.grid.encode(aim, scale, zero))
            torch.sub(t, self.grid.decode(code, scale, zero), out=s)
            if term is not None:
                t.copy_(weights)
        self.codes[start:stop] = codes

    def _fused(self, start: int, stop: int) -> None:
        """`_leaf` as one kernel."""
        here = slice(start, stop)
        kernels.round_block(
            self.target[here], self.shift[here], self.codes[here], self.scales, self.zeros, self.group_index[here],
            self.factor[here, here], None if self.columns is None else self.columns[here, here], self.grid.top,
        )  # fmt: skip


def weighted_loss(rounded: torch.Tensor, target: torch.Tensor, matrix: torch.Tensor) -> float:
    """tr((Ŵ − W')·A·(Ŵ − W')ᵀ), undamped: the squared output error over the calibration tokens, weighted by g²."""
    difference = rounded - target
    return float(((difference @ matrix) * difference).sum(dtype=torch.float64))


# -- block types -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockSolution:
    """Codes and stored parameters on the grid of a GGUF block type, natural column order."""

    grid: BlockGrid
    codes: torch.Tensor  # uint8 [out, in]
    params: Params

    def decode(self) -> torch.Tensor:
        """float32 [out, in]."""
        scale, minimum = (p.repeat_interleave(self.grid.sub_block, 1) for p in self.params.decoded())
        return self.grid.decode(self.codes.float(), scale, minimum)

    def rows(self, start: int, stop: int) -> BlockSolution:
        return BlockSolution(self.grid, self.codes[start:stop], self.params.rows(slice(start, stop)))


def nearest_in_blocks(weights: torch.Tensor, grid: BlockGrid, importance: torch.Tensor | None = None) -> BlockSolution:
    """Fit and round each block [out, in] on its own; `importance` [in] weighs the columns in the fit."""
    weights = weights.float()
    weigh = torch.ones(weights.shape[1], device=weights.device) if importance is None else importance
    params = grid.fit(weights, weigh)
    scale, minimum = (p.repeat_interleave(grid.sub_block, 1) for p in params.decoded())
    return BlockSolution(grid, grid.encode(weights, scale, minimum).to(torch.uint8), params)


def solve_blocks(
    target: torch.Tensor,  # float32 [out, in]
    hessian: Hessian,  # prepared with group = grid.block, its order keeping each block of columns together
    grid: BlockGrid,
    *,
    block: int,  # as in `solve`
    columns: torch.Tensor | None = None,  # GPTAQ's P, loop order
    own: torch.Tensor | None = None,  # VLM-PTQ's C, loop order
) -> BlockSolution:
    """`solve` on a block type: when the loop reaches a block, all its parameters are fitted on the compensated weights."""
    target = target.float().masked_fill(hessian.dead, 0)
    if hessian.fallback:
        return nearest_in_blocks(target, grid)
    order = hessian.order
    loop = _BlockLoop(target.T[order].contiguous(), hessian, columns, grid, block)
    loop.own = own
    loop.run(0, len(order))
    return BlockSolution(grid, loop.codes[order.argsort()].T.contiguous(), Params.joined(loop.params))


class _BlockLoop(_Loop):
    """The loop on a block type. A scale and minimum belong to a sub-block, whose columns the order may scatter."""

    def __init__(
        self, target: torch.Tensor, hessian: Hessian, columns: torch.Tensor | None, grid: BlockGrid, block: int
    ):
        sub_block_of = hessian.order // grid.sub_block
        super().__init__(target, hessian.factor, columns, grid, grid.block, grid.sub_block, block, sub_block_of)
        self.order, self.pivots = hessian.order, hessian.pivots
        self.params: list[Params] = [None] * (len(target) // grid.block)  # type: ignore[list-item]

    def _fit_to(self, start: int, stop: int, weights: torch.Tensor) -> None:
        """A column's weight in the fit is its pivot: what an error there costs once later columns have made up for it."""
        span = self.order[start:stop]
        natural, index = span.argsort(), int(span.min()) // self.group
        params = self.grid.fit(weights[natural].T.contiguous(), self.pivots[start:stop][natural])
        self.params[index] = params
        first = index * self.group // self.grid.sub_block
        for held, found in zip((self.scales, self.zeros), params.decoded()):
            held[first : first + found.shape[1]] = found.T
