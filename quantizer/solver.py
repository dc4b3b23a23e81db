"""The column loop: (weights, Hessian, grid) → integers. Pure functions of tensors.

GPTQ (arXiv 2210.17323) rounds one input column at a time and spreads its error over the columns that are still free:

    A⁻¹ = UᵀU, U upper            e_q = (w_q − ŵ_q) / U_qq            w_j ← w_j − e_q·U_qj   for j > q

GPTAQ (arXiv 2504.02692) also corrects for the drift between the streams, column by column (methods.md §2.2):

    P = α·triu(D·L, 1)·Lᵀ, L = Uᵀ        w_j ← w_j + w_q·P_qj   for j > q   (beyond the lazy block: ŵ_q·P_qj)

The exact solution of the same problem is plain GPTQ on W' = W + α·W·D·A⁻¹ (`exact_target`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.kquants import BlockGrid, Params

_BAND = 512  # rows or columns worked on together
DAMP_STEPS = (1, 10, 100)  # times the recipe's damping, tried in turn before falling back to plain rounding


@dataclass(frozen=True)
class Hessian:
    """A Hessian made ready: damped, ordered and factorized once for all linears that share it."""

    matrix: torch.Tensor  # A as accumulated, float32 [in, in], original order
    dead: torch.Tensor  # bool [in], original order: inputs that calibration never excites
    order: torch.Tensor  # int64 [in]: column of the original order that the loop takes at each step
    upper: torch.Tensor | None  # U of the damped inverse, float32 [in, in], loop order; None: factorization failed
    damp: float  # share of mean(diag A) that was added

    @property
    def fallback(self) -> bool:
        """Whether no damping made the matrix definite, so that weights are rounded to nearest."""
        return self.upper is None


@dataclass(frozen=True)
class Solution:
    """Integers of one linear, or of several stacked by rows, in the original column order."""

    codes: torch.Tensor  # uint8 [out, in]
    scales: torch.Tensor  # float16 [out, groups]
    zero_points: torch.Tensor  # uint8 [out, groups]
    g_idx: torch.Tensor  # int32 [in]

    def decode(self) -> torch.Tensor:
        """float32 [out, in]."""
        group = self.g_idx.long()
        return self.scales.float()[:, group] * (self.codes.float() - self.zero_points.float()[:, group])

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

    The factorization is done in float64: the loop's integers then depend little on the device that made them.
    """
    dead = diagonal == 0
    weights = matrix.diagonal()
    order = column_order(weights, group, act_order)
    live = weights[~dead].double()
    mean = float(live.mean()) if len(live) else 0.0
    for step in DAMP_STEPS if mean > 0 else ():
        permuted = _permuted(matrix, order.flip(0))
        dead_steps = dead[order.flip(0)]
        permuted.diagonal()[dead_steps] = mean  # dead rows and columns are zero elsewhere: any positive value will do
        permuted.diagonal().add_(step * damp * mean)
        upper = _upper_inverse(permuted)
        if upper is not None:
            return Hessian(matrix, dead, order, upper, step * damp)
    return Hessian(matrix, dead, order, None, 0.0)


def _permuted(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """float64 copy of the matrix with rows and columns in `order`, made in bands so that nothing else has its size."""
    permuted = torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device)
    for band, rows in zip(permuted.split(_BAND), order.split(_BAND)):
        band.copy_(matrix[rows][:, order])
    return permuted


def _upper_inverse(matrix: torch.Tensor) -> torch.Tensor | None:
    """float32 U, upper with UᵀU = (JMJ)⁻¹ for a float64 matrix M and J the reversal; None where M is not positive
    definite. M is overwritten, and nothing else of its size is made but U.

    With M = L·Lᵀ, JMJ = (JLJ)(JLJ)ᵀ where JLJ is upper, and U = (JLJ)⁻¹ = J·L⁻¹·J.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))  # LAPACK's column order: in place
    if int(info) != 0 or not bool(torch.isfinite(matrix.diagonal()).all()):
        return None
    lower = matrix.mT
    _invert_lower(lower)
    upper = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device)
    for start in range(0, len(matrix), _BAND):
        stop = min(start + _BAND, len(matrix))
        upper[len(matrix) - stop : len(matrix) - start] = lower[start:stop].flip(0, 1)
    return upper


def _invert_lower(lower: torch.Tensor) -> None:
    """L ← L⁻¹ in place, block column after block column from the last, with a third of n³ multiplications.

    Below the diagonal block L₁₁ the inverse is −L₂₂⁻¹·L₂₁·L₁₁⁻¹, where L₂₂⁻¹ is there already.
    """
    n = len(lower)
    starts = range(0, n, _BAND)
    for start in reversed(starts):
        stop = min(start + _BAND, n)
        eye = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[start:stop, start:stop], eye, upper=False)
        lower[start:stop, start:stop] = corner
        for row in reversed([r for r in starts if r >= stop]):  # from below: a row needs those above it as they were
            end = min(row + _BAND, n)
            lower[row:end, start:stop] = -(lower[row:end, stop:end] @ lower[stop:end, start:stop]) @ corner


def column_term(hessian: Hessian, drift: torch.Tensor, alpha: float) -> torch.Tensor:
    """P = α·triu(D·L, 1)·Lᵀ in loop order, float32 [in, in]; row q is α·D_q,>q·(A_>q)⁻¹.

    Both factors are triangular: only blocks on and above the diagonal are multiplied, a sixth of two full products.
    """
    order, upper, n = hessian.order, hessian.upper, len(drift)
    term = torch.zeros_like(drift)
    for start in range(0, n, _BAND):
        stop = min(start + _BAND, n)
        rows = drift[order[start:stop]][:, order]  # [band, in], loop order
        shifted = torch.zeros_like(rows)
        for first in range(start, n, _BAND):
            last = min(first + _BAND, n)
            shifted[:, first:last] = rows[:, first:] @ upper[first:last, first:].T
        shifted = shifted[:, start:]
        shifted.copy_(shifted.triu(1))
        for first in range(start, n, _BAND):
            last = min(first + _BAND, n)
            term[start:stop, first:last] = alpha * (shifted[:, : last - start] @ upper[start:last, first:last])
    return term


def exact_target(weights: torch.Tensor, hessian: Hessian, drift: torch.Tensor, alpha: float) -> torch.Tensor:
    """W' = W + α·W·D·(A+λI)⁻¹, float32 [out, in], original order. Damping leans toward W, not toward zero."""
    shift = (weights @ drift)[:, hessian.order] @ hessian.upper.T @ hessian.upper
    target = weights.clone()
    target[:, hessian.order] += alpha * shift
    return target


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
    block: int,  # lazy-update block
    columns: torch.Tensor | None = None,  # GPTAQ's P, loop order
) -> Solution:
    """Codes for `target` under the prepared Hessian, the one loop of every method.

    Rows never see each other, so linears that share a Hessian may be stacked. Groups are fitted on the compensated
    weights when the loop reaches them (`off`, `gar`, `dynamic`) or on the target before the loop (`static`).
    """
    if hessian.fallback:
        return round_to_nearest(target, grid, group=group)
    order, upper, (out_features, in_features) = hessian.order, hessian.upper, target.shape
    target = target.float().masked_fill(hessian.dead, 0)
    w = target.T[order].contiguous()  # [in, out], loop order: a column of the weights is one contiguous row
    codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=target.device)
    natural = order // group  # natural group of each step
    group_of = torch.arange(in_features, device=order.device) // group if act_order == "dynamic" else natural
    scales = torch.empty(in_features // group, out_features, device=target.device)
    zeros = torch.empty_like(scales)
    if act_order == "static":
        scales, zeros = (p.T.contiguous() for p in grid.fit(target.view(out_features, -1, group)))
    groups = group_of.tolist()
    pivots = upper.diagonal().tolist()

    for start, stop in _blocks(in_features, group, block):
        errors = torch.empty(stop - start, out_features, device=target.device)
        added = torch.empty_like(errors) if columns is not None else None
        for i in range(start, stop):
            if act_order != "static" and i % group == 0:
                scales[groups[i]], zeros[groups[i]] = grid.fit(w[i : i + group], dim=0)
            scale, zero = scales[groups[i]], zeros[groups[i]]
            code = grid.encode(w[i], scale, zero)
            codes[i] = code
            rounded = grid.decode(code, scale, zero)
            error = (w[i] - rounded) / pivots[i]
            w[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
            if columns is not None:
                w[i + 1 : stop].addr_(columns[i, i + 1 : stop], w[i])
                added[i - start] = rounded  # as the authors' code has it, docs/methods.md
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        if columns is not None:
            w[stop:].addmm_(columns[start:stop, stop:].T, added)

    back = order.argsort()
    return Solution(
        codes[back].T.contiguous(), scales.T.half().contiguous(), zeros.T.to(torch.uint8).contiguous(),
        group_of[back].to(torch.int32),
    )  # fmt: skip


def _blocks(in_features: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """Lazy-update blocks of at most `block` columns, placed so that no group begins inside a block it does not fit in.

    A group is fitted on weights that carry every earlier update; updates from the same block are already there, those
    beyond the block are not.
    """
    span = group if group >= block else block // group * group
    for first in range(0, in_features, span):
        last = min(first + span, in_features)
        for start in range(first, last, block):
            yield start, min(start + block, last)


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
    block: int,  # lazy-update block
    columns: torch.Tensor | None = None,  # GPTAQ's P, loop order
) -> BlockSolution:
    """`solve` on a block type: when the loop reaches a block, all its parameters are fitted on the compensated weights.

    A column's weight in that fit is 1/U_qq², what an error there costs once later columns have made up for it.
    """
    target = target.float().masked_fill(hessian.dead, 0)
    if hessian.fallback:
        return nearest_in_blocks(target, grid)
    order, upper, (out_features, in_features) = hessian.order, hessian.upper, target.shape
    w = target.T[order].contiguous()  # [in, out], loop order
    codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=target.device)
    pivots = upper.diagonal()
    fitted: list[Params] = [None] * (in_features // grid.block)  # type: ignore[list-item]
    for start, stop in _blocks(in_features, grid.block, block):
        if start % grid.block == 0:
            span = order[start : start + grid.block]
            natural = span.argsort()
            params = grid.fit(
                w[start : start + grid.block][natural].T, pivots[start : start + grid.block][natural] ** -2
            )
            fitted[int(span.min()) // grid.block] = params
            sub = (span - span.min()) // grid.sub_block
            scales, minima = (p.T[sub].contiguous() for p in params.decoded())  # [block, out], loop order
        errors = torch.empty(stop - start, out_features, device=target.device)
        added = torch.empty_like(errors) if columns is not None else None
        for i in range(start, stop):
            scale, minimum = scales[i % grid.block], minima[i % grid.block]
            code = grid.encode(w[i], scale, minimum)
            codes[i] = code
            rounded = grid.decode(code, scale, minimum)
            error = (w[i] - rounded) / pivots[i]
            w[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
            if columns is not None:
                w[i + 1 : stop].addr_(columns[i, i + 1 : stop], w[i])
                added[i - start] = rounded
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        if columns is not None:
            w[stop:].addmm_(columns[start:stop, stop:].T, added)
    return BlockSolution(grid, codes[order.argsort()].T.contiguous(), Params.joined(fitted))
