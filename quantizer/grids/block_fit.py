"""Choosing the stored parameters of GGUF blocks: the scales and minima of least weighted error.

Each block of `block` columns stores a float16 unit d and an integer multiple of d per sub-block. An
affine type stores a second unit, dmin, with multiples for the minima (`blocks.py`). The fit goes
from the inside out:

    1. every sub-block gets a real-valued scale and minimum: a few trial ranges, each improved by
       least squares against the codes that it gives;
    2. these are expressed as multiples of common units, for a few sizes of the units;
    3. the units are refitted to the codes, and the codes chosen again, a few times.

A candidate is kept, block by block, only where its weighted squared error is smaller. The last one
is a block of zeros, so that no block decodes to a larger error than zeros have. Float16 ends at
6e-8, and a block of smaller weights could otherwise keep its minimum and lose its scale.

In this module w are the weights, float32 [rows, blocks, sub-blocks, columns], and h > 0 is the
importance of each of their columns, [1, blocks, sub-blocks, columns]. q is what a code stands for:
`BlockGrid.values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from vlmq_export.quantizer.grids.blocks import BlockGrid, Params

_LARGEST, _TINY = 65504.0, 2.0**-24  # the largest and the smallest float16
_REFITS = 4  # rounds of step 3
_REFITS_ON_LATTICE = 1  # where a rounding is a search among points
_SUPER_SHRINK_ON_LATTICE = (29 / 31, 27 / 31)
_AROUND = (0.84, 0.92, 1.0, 1.09, 1.19)  # of the best scale for each column alone, on a lattice
_SUPER_SHRINK = (0.97, 0.94, 0.9, 0.85, 0.8)  # of the largest stored multiple, tried in step 2
# Step 1: by how many codes a trial range exceeds the grid. Below 0 the range is stretched, above 0
# outliers are clipped. By the number of bits of an affine type.
_EXCESS = {
    2: (-0.3, 0.0, 0.25, 0.5, 0.85, 1.3, 2.0),
    4: (-0.5, 0.0, 0.5, 1.0, 1.7, 2.4),
    5: (-0.6, -0.3, 0.0, 0.4, 0.8, 1.4),
}
_EXCESS_SYMMETRIC = (-0.9, -0.7, -0.5, -0.3, -0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 1.4, 2.0, 2.6)
# A determinant below this share of its terms says that least squares has no answer.
_SINGULAR = 1e-12
_NOTHING = 1e-30  # in place of a sum of squares that is 0
_AT_ONCE = 2**26  # weights under all ranges that are tried at once on a GPU
_CACHED = 2**16  # weights that are fitted at once on a CPU


def fit_blocks(grid: BlockGrid, weights: torch.Tensor, importance: torch.Tensor) -> Params:
    """The parameters of whole blocks.

    weights: float32 [rows, k · block]; importance: float32 [k · block], greater than 0.
    """
    # A row is fitted by itself. A CPU is quicker where all tensors of a part stay in its caches.
    at_once = len(weights) if weights.is_cuda else max(1, _CACHED // weights.shape[1])
    parts = [_fitted(grid, rows, importance) for rows in weights.split(max(1, at_once))]
    return parts[0] if len(parts) == 1 else Params.joined(parts, 0)


def _fitted(grid: BlockGrid, weights: torch.Tensor, importance: torch.Tensor) -> Params:
    """`fit_blocks` of some rows."""
    rows = len(weights)
    w = weights.reshape(rows, -1, grid.block // grid.sub_block, grid.sub_block)
    h = importance.view(1, *w.shape[1:])
    scale, minimum = _sub_blocks(grid, w, h)
    best = _Trial.of(grid, w, h, _stored(grid, scale, minimum, 1.0))
    shrinks = _SUPER_SHRINK if grid.lattice is None else _SUPER_SHRINK_ON_LATTICE
    for shrink in shrinks if grid.sub_block < grid.block else ():
        best = best.or_better(_Trial.of(grid, w, h, _stored(grid, scale, minimum, shrink)))
    if grid.lattice is not None:
        best = best.or_better(_next_multiples(grid, w, h, best))
    for _ in range(_REFITS if grid.lattice is None else _REFITS_ON_LATTICE):
        best = best.or_better(_Trial.of(grid, w, h, _refitted(grid, w, h, best)))
    zeros = (w * w).mul_(h).sum(-1).sum(-1) < best.error.sum(-1)
    return _zeroed(best.stored, zeros).each(lambda p: p.reshape(rows, -1))


@dataclass(frozen=True)
class _Trial:
    """Stored parameters of blocks, with d and dmin [rows, blocks], and what they lead to."""

    stored: Params
    q: torch.Tensor  # what the best codes stand for, [rows, blocks, sub-blocks, columns]
    error: torch.Tensor  # weighted and squared, [rows, blocks, sub-blocks]

    @classmethod
    def of(cls, grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, stored: Params) -> _Trial:
        scale, minimum = _effective(stored)
        q = grid.round(w, scale[..., None], minimum[..., None], h)
        return cls(stored, q, _error(grid, w, h, q, scale, minimum))

    def or_better(self, other: _Trial) -> _Trial:
        """Block by block the one with the smaller error."""
        better = other.error.sum(-1) < self.error.sum(-1)  # [rows, blocks]
        new, old = other.stored, self.stored

        def minimum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
            return None if a is None or b is None else _chosen(better, a, b)

        return _Trial(
            Params(
                _chosen(better, new.d, old.d),
                _chosen(better, new.scales, old.scales),
                minimum(new.dmin, old.dmin),
                minimum(new.mins, old.mins),
            ),
            _chosen(better, other.q, self.q),
            _chosen(better, other.error, self.error),
        )


def _chosen(where: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a where `where` [rows, …] holds, and b elsewhere. Both may have more dimensions behind."""
    return torch.where(where.view(*where.shape, *[1] * (a.dim() - where.dim())), a, b)


# -- 1. real-valued scales and minima of the sub-blocks ------------------------------------------


def _sub_blocks(
    grid: BlockGrid, w: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of each sub-block, [rows, blocks, sub-blocks] each."""
    if grid.lattice is not None:
        scale = _symmetric_scale(grid.positive, w.abs(), h, (1.0,))
        return _lattice_scale(grid, w, h, scale), torch.zeros_like(scale)
    if not grid.affine:
        return _symmetric_scale(grid, w, h, (-1.0, 1.0)), torch.zeros_like(w[..., 0])
    low, high = w.amin(-1), w.amax(-1)
    if not grid.signed_minimum:
        low, high = low.clamp_max(0), high.clamp_min(0)
    best = [((high - low) / grid.top).clamp_min(0), -low]
    least = _error_alone(grid, w, h, *best)
    sums = h.sum(-1), (h * w).sum(-1)
    shares = [grid.top / (grid.top + excess) for excess in _EXCESS[grid.bits]]
    middle = (low + high) / 2 if grid.signed_minimum else torch.zeros_like(low)
    for trial in _trials(list(product(shares, repeat=2)), w):
        below, above = trial.unbind(-1)  # [trials, 1, 1, 1] each
        bottom = middle + (low - middle) * below
        scale, minimum = (middle + (high - middle) * above - bottom) / grid.top, -bottom
        q = grid.alone(w, scale[..., None], minimum[..., None])
        found = []
        for _ in range(2):
            scale, minimum = _least_squares(grid, w, h, q, sums, scale, minimum)
            q = grid.alone(w, scale[..., None], minimum[..., None])
            found.append((_error(grid, w, h, q, scale, minimum), scale, minimum))
        least, best = _least(found, least, best)
    scale, minimum = best
    return scale, minimum


def _trials(values: Sequence[tuple[float, ...]], w: torch.Tensor) -> Sequence[torch.Tensor]:
    """Values that are tried, float32 [trials, 1, 1, 1, values of a trial], in parts.

    A GPU waits for launches, and takes many trials at once. A CPU takes one after the other, which
    stay in its caches.
    """
    at_once = max(1, _AT_ONCE // w.numel()) if w.is_cuda else 1
    trials = torch.tensor(values, dtype=torch.float32, device=w.device)
    return trials.view(len(values), 1, 1, 1, -1).split(at_once)


def _least(
    found: Sequence[Sequence[torch.Tensor]],  # error and values, [trials, rows, blocks, sub-blocks]
    least: torch.Tensor,  # [rows, blocks, sub-blocks]
    best: Sequence[torch.Tensor],  # likewise
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The smallest error, and the values that it belongs to. Of equal errors the first counts.

    `found` has an entry for each round of the trials.
    """
    best = list(best)
    if len(found[0][0]) > 1:  # the first is that of the first trial, whatever its round
        errors, *tried = (torch.stack(list(each), 1).flatten(0, 1) for each in zip(*found))
        error, which = errors.nan_to_num(nan=torch.inf).min(0, keepdim=True)
        found = [(error, *(t.gather(0, which) for t in tried))]
    for error, *values in found:
        better = error[0] < least
        least = torch.where(better, error[0], least)
        best = [torch.where(better, v[0], b) for v, b in zip(values, best)]
    return least, best


def _symmetric_scale(
    grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, signs: Sequence[float]
) -> torch.Tensor:
    """Scale of each sub-block, of one of the signs, [rows, blocks, sub-blocks].

    The longer side of the grid, mostly that of code 0, reaches the weight of largest magnitude.
    """
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = extreme / grid.reach
    zero = torch.zeros_like(best)
    least = _error_alone(grid, w, h, best, zero)
    reaches = [
        (sign * (abs(grid.reach) + excess * grid.spacing),)
        for excess, sign in product(_EXCESS_SYMMETRIC, signs)
    ]
    for trial in _trials(reaches, w):
        scale = extreme / trial.squeeze(-1)
        q = grid.alone(w, scale[..., None], zero[..., None])
        found = []
        for _ in range(2):
            weighted = h * q
            square = (weighted * q).sum(-1).clamp_min_(_NOTHING)
            scale = weighted.mul_(w).sum(-1).div_(square)
            q = grid.alone(w, scale[..., None], zero[..., None])
            found.append((_error(grid, w, h, q, scale, zero), scale))
        least, (best,) = _least(found, least, (best,))
    return best


def _lattice_scale(
    grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The best of a few scales around the one that is best for the columns alone.

    Each is replaced by the least-squares scale of the points that it leads to. The error of these
    is Σ h·w² less the gain that is compared here.
    """
    best, most, zero = scale, torch.full_like(scale, -1.0), torch.zeros_like(scale[..., None])
    for share in _AROUND:
        q = grid.round(w, (share * scale)[..., None], zero, h)
        weighted = h * q
        across, along = (weighted * q).sum(-1), weighted.mul_(w).sum(-1)
        gain = along.clamp_min(0).square() / across
        best = torch.where(gain > most, along.clamp_min(0) / across, best)
        most = torch.maximum(gain, most)
    return best


def _least_squares(
    grid: BlockGrid,
    w: torch.Tensor,
    h: torch.Tensor,
    q: torch.Tensor,  # of the codes that the given scale and minimum lead to
    sums: tuple[torch.Tensor, torch.Tensor],  # Σh and Σhw of each sub-block
    scale: torch.Tensor,
    minimum: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and minimum that fit the codes best.

    Where the type's minimum cannot be negative, a minimum below 0 is held at 0.
    """
    (sh, sw), weighted = sums, h * q
    sq, sqq = weighted.sum(-1), (weighted * q).sum(-1)
    sqw = weighted.mul_(w).sum(-1)
    determinant = sh * sqq - sq * sq
    ok = determinant > _SINGULAR * sh * sqq
    safe = torch.where(ok, determinant, 1.0)
    new_scale, new_minimum = (sh * sqw - sq * sw) / safe, (sq * sqw - sqq * sw) / safe
    if not grid.signed_minimum:
        held = new_minimum < 0
        new_scale = torch.where(held, sqw / sqq.clamp_min(_NOTHING), new_scale)
        new_minimum = new_minimum.clamp_min(0)
    ok &= new_scale > 0
    return torch.where(ok, new_scale, scale), torch.where(ok, new_minimum, minimum)


def _error_alone(
    grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
) -> torch.Tensor:
    """Error of each sub-block whose columns are rounded alone, [rows, blocks, sub-blocks]."""
    q = grid.alone(w, scale[..., None], minimum[..., None])
    return _error(grid, w, h, q, scale, minimum)


def _error(
    grid: BlockGrid,
    w: torch.Tensor,
    h: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
) -> torch.Tensor:
    """Weighted squared error of each sub-block, [rows, blocks, sub-blocks]."""
    decoded = scale[..., None] * q
    decoded = decoded.sub_(minimum[..., None]) if grid.affine else decoded
    return decoded.sub_(w).square_().mul_(h).sum(-1)


# -- 2. multiples of common units ----------------------------------------------------------------
# Here the fields of Params still have their blocks apart: d and dmin [rows, blocks], scales and
# mins [rows, blocks, sub-blocks].


def _stored(grid: BlockGrid, scale: torch.Tensor, minimum: torch.Tensor, shrink: float) -> Params:
    """Real-valued scales and minima as stored; the largest multiple is `shrink` of its limit."""
    d, scales = _multiples(scale, grid.scale_limits, shrink, grid.scale_step)
    if not grid.affine:
        return Params(d, scales)
    if grid.signed_minimum:
        return Params(d, scales, _half(-minimum.squeeze(-1)).neg(), torch.ones_like(scales))
    return Params(d, scales, *_multiples(minimum, (0, grid.scale_limits[1]), shrink))


def _multiples(
    values: torch.Tensor, limits: tuple[int, int], shrink: float, step: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float16 unit [...] and int16 multiples [..., sub-blocks] with unit · multiple ≈ value.

    Limits of (1, 1) belong to a type that stores the value itself.
    """
    low, high = limits
    if high == 1:
        return _half(values.squeeze(-1)), torch.ones_like(values, dtype=torch.int16)
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)
    wanted = extreme / (shrink * (low if low < 0 else high))
    unit = _half(wanted)
    # A unit that float16 rounds to zero would lose every multiple of it.
    lost = (unit == 0) & (wanted != 0)
    unit = torch.where(lost, torch.copysign(torch.full_like(wanted, _TINY), wanted).half(), unit)
    safe = torch.where(unit == 0, 1.0, unit.float())[..., None]
    first = low if step > 1 else 0
    multiples = first + step * torch.round((values / safe - first) / step)
    return unit, multiples.clamp(low, high).to(torch.int16)


def _next_multiples(grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, best: _Trial) -> _Trial:
    """Multiples one step up or down, in the sub-blocks whose error is smaller there."""
    d, scales, q, error = best.stored.d, best.stored.scales, best.q, best.error
    for step in (-grid.scale_step, grid.scale_step):
        next_ = Params(d, (best.stored.scales + step).clamp(*grid.scale_limits))
        trial = _Trial.of(grid, w, h, next_)
        better = trial.error < error  # [rows, blocks, sub-blocks]
        scales, q = _chosen(better, next_.scales, scales), _chosen(better, trial.q, q)
        error = torch.minimum(trial.error, error)
    return _Trial(Params(d, scales), q, error)


def _zeroed(stored: Params, where: torch.Tensor) -> Params:
    """Units with which some blocks, bool [rows, blocks], decode to zeros."""
    dmin = None if stored.dmin is None else stored.dmin.masked_fill(where, 0)
    return Params(stored.d.masked_fill(where, 0), stored.scales, dmin, stored.mins)


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_LARGEST, _LARGEST).half()


def _effective(stored: Params) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of each sub-block as they decode, [rows, blocks, sub-blocks] each."""
    scale = stored.d.float()[..., None] * stored.scales
    if stored.dmin is None or stored.mins is None:
        return scale, torch.zeros_like(scale)
    return scale, stored.dmin.float()[..., None] * stored.mins


# -- 3. units refitted to the codes --------------------------------------------------------------


def _refitted(grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, best: _Trial) -> Params:
    """The units d and dmin of least error for the codes and multiples that are there."""
    stored, q = best.stored, best.q
    x = (q * stored.scales[..., None]).flatten(-2)  # what d is multiplied by, [rows, blocks, block]
    hf, wf = h.flatten(-2), w.flatten(-2)
    sxx, sxw = (hf * x * x).sum(-1), (hf * x * wf).sum(-1)
    alone = sxw / sxx.clamp_min(_NOTHING)
    if stored.dmin is None or stored.mins is None:
        return Params(_half(alone), stored.scales)
    y = -stored.mins[..., None].expand(w.shape).flatten(-2).float()  # what dmin is multiplied by
    syy, sxy, syw = (hf * y * y).sum(-1), (hf * x * y).sum(-1), (hf * y * wf).sum(-1)
    determinant = sxx * syy - sxy * sxy
    ok = determinant > _SINGULAR * sxx * syy
    safe = torch.where(ok, determinant, 1.0)
    d = torch.where(ok, (syy * sxw - sxy * syw) / safe, alone)
    dmin = torch.where(ok, (sxx * syw - sxy * sxw) / safe, stored.dmin.float())
    dmin = _half(dmin if grid.signed_minimum else dmin.clamp_min(0))
    return Params(_half(d.clamp_min(0)), stored.scales, dmin, stored.mins)
