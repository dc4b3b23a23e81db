"""A Hessian made ready for the column loop, and what is computed with its factor.

A = Σ g² x xᵀ is damped, put into the order of the loop and factorized once for all linears that
share it:

    A + λI = K·diag(d)·Kᵀ        K unit upper triangular, d > 0 the pivots

A pivot d_j is what is left of A_jj once the columns after j are known.

The other functions answer what the methods ask of a factorized A: GPTAQ's column term P, VLM-PTQ's
own term C, and the exact target W'. W is [out, in], D = Σ g² (x̃ − x) xᵀ is the drift between the
two streams, [in, in]. docs/methods.md §1.5, §2.2 and §3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PRECISION = torch.float64  # of the factorization
DAMP_STEPS = (1, 10, 100)  # multiples of the recipe's damping, tried in turn
FAINTEST = 1e-30  # the least mean(diag A) that float32 can still divide by; no model comes near it
_BAND = 512  # rows or columns that are worked on together


@dataclass(frozen=True)
class Hessian:
    """A, and its factor if it could be factorized."""

    matrix: torch.Tensor  # A as accumulated, float32 [in, in], original order
    dead: torch.Tensor  # bool [in], original order: inputs that calibration never excites
    order: torch.Tensor  # int64 [in]: the original index of the column that each step takes
    factor: torch.Tensor  # K, float32 [in, in], loop order; [0, 0] where no factorization succeeded
    pivots: torch.Tensor  # d, float32 [in], loop order; [0] likewise
    damp: float  # share of mean(diag A) that was added to the diagonal

    @property
    def ridge(self) -> float:
        """λ: what was added to each entry of the diagonal."""
        return self.damp * _mean(self.matrix.diagonal(), self.dead)

    @property
    def fallback(self) -> bool:
        """Whether no damping made A definite, so that weights are rounded to nearest."""
        return self.factor.numel() == 0


def column_order(
    diagonal: torch.Tensor, group: int, act_order: str, together: int = 1
) -> torch.Tensor:
    """The order of the loop, int64 [in]: the largest diag(A) first, ties in the original order.

    `gar` keeps each natural group of `group` columns together. It orders the groups by their
    largest entry and the columns inside a group by their own. Inside a group, runs of `together`
    columns stay as they are, and are ordered by their largest entry.
    """
    if act_order == "off":
        return torch.arange(len(diagonal), device=diagonal.device)
    if act_order != "gar":
        return diagonal.argsort(descending=True, stable=True)
    runs = diagonal.view(-1, group // together, together).amax(2)  # [groups, runs]
    inside = runs.argsort(dim=1, descending=True, stable=True)
    groups = runs.amax(1).argsort(descending=True, stable=True)
    first = groups[:, None] * group + inside[groups] * together
    return (first[..., None] + torch.arange(together, device=first.device)).flatten()


def prepare(
    matrix: torch.Tensor,  # A, float32 [in, in]
    diagonal: torch.Tensor,  # Σ x² without weights, [in]: 0 tells a dead input
    *,
    group: int,
    act_order: str,
    damp: float,
    together: int = 1,  # columns that the loop rounds at once
) -> Hessian:
    """Damp, order and factorize A.

    Besides A, at most two matrices of the factorization's precision are alive at a time. A dead
    input gets the mean of the diagonal: its row and column are zero elsewhere, so that any positive
    value does.
    """
    dead = diagonal == 0
    order = column_order(matrix.diagonal(), group, act_order, together)
    if found := _factorized(matrix, dead, order, damp, PRECISION):
        return Hessian(matrix, dead, order, *_unit_upper(found[0]), found[1])
    nothing = torch.empty(0, device=matrix.device)
    return Hessian(matrix, dead, order, nothing.view(0, 0), nothing, 0.0)


def pivots(
    matrix: torch.Tensor,  # A, [in, in]
    diagonal: torch.Tensor,  # Σ x² without weights, [in]: 0 tells a dead input
    *,
    group: int,
    act_order: str,
    damp: float,
    together: int = 1,
) -> torch.Tensor:
    """d alone, float32 [in] in the original order, with 0 for dead inputs.

    It is factorized in float32, which takes half the time and memory, and is enough to compare
    columns by. All are 0 where no damping makes A definite.
    """
    dead = diagonal == 0
    order = column_order(matrix.diagonal(), group, act_order, together)
    found = _factorized(matrix, dead, order, damp, torch.float32)
    own = torch.zeros(len(dead), device=matrix.device)
    if found is not None:
        own[order] = found[0].diagonal().flip(0).square()
    return own.masked_fill_(dead, 0.0)


def _factorized(
    matrix: torch.Tensor,
    dead: torch.Tensor,
    order: torch.Tensor,
    damp: float,
    kind: torch.dtype,  # of the factorization
) -> tuple[torch.Tensor, float] | None:
    """Lᵀ of the damped matrix in reversed order, [in, in], and the damping that it took.

    Its lower triangle is not to be read.
    """
    mean = _mean(matrix.diagonal(), dead)
    # LAPACK's lower factor of the reversed matrix is the upper factor that the loop needs.
    backwards = order.flip(0)
    for step in DAMP_STEPS if mean > FAINTEST else ():
        permuted = _permuted(matrix, backwards, kind)
        own = permuted.diagonal()
        own.masked_fill_(dead[backwards], mean).add_(step * damp * mean)
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        # The transpose has LAPACK's column order, so that the factor takes the place of the matrix.
        torch.linalg.cholesky_ex(permuted.mT, out=(permuted.mT, info))
        if int(info) == 0 and bool(torch.isfinite(own).all()):
            return permuted, step * damp
    return None


def _mean(diagonal: torch.Tensor, dead: torch.Tensor) -> float:
    """The mean of diag(A) over the inputs that calibration excites."""
    live = diagonal[~dead].double()
    return float(live.mean()) if len(live) else 0.0


def _permuted(matrix: torch.Tensor, order: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """A copy with rows and columns in `order`, made in bands so that nothing else has its size."""
    permuted = torch.empty(matrix.shape, dtype=kind, device=matrix.device)
    for band, rows in zip(permuted.split(_BAND), order.split(_BAND)):
        band.copy_(matrix[rows].index_select(1, order))
    return permuted


def _unit_upper(transposed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, d), float32, with K·diag(d)·Kᵀ the reversal of L·Lᵀ.

    transposed: Lᵀ, whose lower triangle is not read. Its rows are the columns of L, and with them
    the columns of K from the last one on.
    """
    roots = transposed.diagonal().clone()
    size = len(roots)
    factor = torch.empty(transposed.shape, dtype=torch.float32, device=transposed.device)
    for start in range(0, size, _BAND):
        band = transposed[start : start + _BAND]
        rows = band.triu(start).div_(roots[start : start + _BAND, None])
        factor[:, size - start - len(rows) : size - start] = rows.flip(0, 1).T
    return factor, roots.flip(0).square().float()


def column_term(hessian: Hessian, drift: torch.Tensor, alpha: float) -> torch.Tensor:
    """GPTAQ's P = α·triu(D·L, 1)·Lᵀ with A⁻¹ = L·Lᵀ, float32 [in, in], loop order.

    Row q of P is α·D_q,>q·(A_>q)⁻¹. Since L·Lᵀ = K⁻ᵀ·diag(d)⁻¹·K⁻¹, two triangular solves give it.
    A band of rows needs only the columns from its own diagonal on.
    """
    order, factor, term = hessian.order, hessian.factor, torch.zeros_like(drift)
    for start in range(0, len(drift), _BAND):
        rows = drift[order[start : start + _BAND]].index_select(1, order[start:])
        half = _times_inverse(rows, factor[start:, start:].T, upper=False).triu_(1)
        half.mul_(alpha / hessian.pivots[start:])
        term[start : start + _BAND, start:] = _times_inverse(
            half, factor[start:, start:], upper=True
        )
    return term


def own_term(hessian: Hessian, drift: torch.Tensor, alpha: float) -> torch.Tensor:
    """VLM-PTQ's C = α·diag(D·L)⊙diag(L), float32 [in], loop order.

    C_q = α·D_q,≥q·[(A_≥q)⁻¹]_:,q is what a column would add to itself if it were still free.
    """
    order, factor, term = hessian.order, hessian.factor, torch.empty_like(hessian.pivots)
    for start in range(0, len(drift), _BAND):
        rows = drift[order[start : start + _BAND]].index_select(1, order[start:])
        solved = _times_inverse(rows, factor[start:, start:].T, upper=False)
        term[start : start + _BAND] = solved.diagonal()
    return term.mul_(alpha).div_(hessian.pivots)


def exact_target(
    weights: torch.Tensor, hessian: Hessian, drift: torch.Tensor, alpha: float
) -> torch.Tensor:
    """W' = W + α·W·D·(A+λI)⁻¹, float32 [out, in], original order.

    Rounding toward W' under A minimizes ‖ŴX − WX̃‖² for α = 1. Damping leans toward W, not toward 0.
    """
    return weights + alpha * regression(weights @ drift, hessian)


def regression(products: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """products·(A+λI)⁻¹, float32 [out, in]. Both are in the original order of the columns."""
    shift = _times_inverse(products[:, hessian.order], hessian.factor.T, upper=False)
    shift = _times_inverse(shift.div_(hessian.pivots), hessian.factor, upper=True)
    return shift[:, hessian.order.argsort()]


def _times_inverse(matrix: torch.Tensor, triangle: torch.Tensor, *, upper: bool) -> torch.Tensor:
    """matrix · triangle⁻¹ for a unit triangle."""
    return torch.linalg.solve_triangular(
        triangle, matrix, upper=upper, left=False, unitriangular=True
    )


def weighted_loss(rounded: torch.Tensor, target: torch.Tensor, matrix: torch.Tensor) -> float:
    """tr((Ŵ − W')·A·(Ŵ − W')ᵀ) without damping.

    This is the squared error of the output over the calibration tokens, each weighted by g².
    """
    difference = rounded - target
    return float(((difference @ matrix) * difference).sum(dtype=torch.float64))
