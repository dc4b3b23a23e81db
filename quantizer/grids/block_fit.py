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

In this module w are the weights and h > 0 the importance of each of their columns, both float32
[rows, blocks, sub-blocks, columns]. q is a code minus the grid's centre.
"""

from __future__ import annotations

from itertools import product

import torch

from vlmq_export.quantizer.grids.blocks import BlockGrid, Params

_LARGEST, _TINY = 65504.0, 2.0**-24  # the largest and the smallest float16
_REFITS = 4  # rounds of step 3
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


def fit_blocks(grid: BlockGrid, weights: torch.Tensor, importance: torch.Tensor) -> Params:
    """The parameters of whole blocks.

    weights: float32 [rows, k · block]; importance: float32 [k · block], greater than 0.
    """
    rows = len(weights)
    w = weights.reshape(rows, -1, grid.block // grid.sub_block, grid.sub_block)
    h = importance.expand(weights.shape).reshape(w.shape)
    scale, minimum = _sub_blocks(grid, w, h)
    best = _stored(grid, scale, minimum, 1.0)
    least = _block_error(grid, w, h, best)
    for shrink in _SUPER_SHRINK if grid.sub_block < grid.block else ():
        least, best = _better(grid, w, h, _stored(grid, scale, minimum, shrink), least, best)
    for _ in range(_REFITS):
        least, best = _better(grid, w, h, _refitted(grid, w, h, best), least, best)
    _, best = _better(grid, w, h, _zeros(best), least, best)
    return best.each(lambda p: p.reshape(rows, -1))


# -- 1. real-valued scales and minima of the sub-blocks ------------------------------------------


def _sub_blocks(
    grid: BlockGrid, w: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of each sub-block, [rows, blocks, sub-blocks] each."""
    if not grid.affine:
        return _symmetric_scale(grid, w, h), torch.zeros_like(w[..., 0])
    low, high = w.amin(-1), w.amax(-1)
    if not grid.signed_minimum:
        low, high = low.clamp_max(0), high.clamp_min(0)
    best_scale, best_minimum = ((high - low) / grid.top).clamp_min(0), -low
    least = _sub_error(grid, w, h, best_scale, best_minimum)
    shares = [grid.top / (grid.top + excess) for excess in _EXCESS[grid.bits]]
    middle = (low + high) / 2 if grid.signed_minimum else 0.0
    for below, above in product(shares, repeat=2):
        bottom = middle + (low - middle) * below
        scale, minimum = (middle + (high - middle) * above - bottom) / grid.top, -bottom
        for _ in range(2):
            scale, minimum = _least_squares(grid, w, h, scale, minimum)
            error = _sub_error(grid, w, h, scale, minimum)
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _symmetric_scale(grid: BlockGrid, w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Signed scale of each sub-block, [rows, blocks, sub-blocks].

    The longer side of the grid, mostly that of code 0, reaches the weight of largest magnitude.
    """
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = extreme / grid.reach
    zero = torch.zeros_like(best)
    least = _sub_error(grid, w, h, best, zero)
    for excess, sign in product(_EXCESS_SYMMETRIC, (-1.0, 1.0)):
        scale = sign * extreme / (abs(grid.reach) + excess)
        for _ in range(2):
            q = grid.encode(w, scale[..., None], zero[..., None]) - grid.centre
            scale = (h * q * w).sum(-1) / (h * q * q).sum(-1).clamp_min(_NOTHING)
            error = _sub_error(grid, w, h, scale, zero)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _least_squares(
    grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and minimum that fit best the codes which the given ones lead to.

    Where the type's minimum cannot be negative, a minimum below 0 is held at 0.
    """
    q = grid.encode(w, scale[..., None], minimum[..., None])
    sh, sq, sqq = h.sum(-1), (h * q).sum(-1), (h * q * q).sum(-1)
    sw, sqw = (h * w).sum(-1), (h * q * w).sum(-1)
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


def _sub_error(
    grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
) -> torch.Tensor:
    """Weighted squared error of each sub-block, [rows, blocks, sub-blocks]."""
    scale, minimum = scale[..., None], minimum[..., None]
    decoded = grid.decode(grid.encode(w, scale, minimum), scale, minimum)
    return (h * (decoded - w).square()).sum(-1)


# -- 2. multiples of common units ----------------------------------------------------------------
# Here the fields of Params still have their blocks apart: d and dmin [rows, blocks], scales and
# mins [rows, blocks, sub-blocks].


def _stored(grid: BlockGrid, scale: torch.Tensor, minimum: torch.Tensor, shrink: float) -> Params:
    """Real-valued scales and minima as stored; the largest multiple is `shrink` of its limit."""
    d, scales = _multiples(scale, grid.scale_limits, shrink)
    if not grid.affine:
        return Params(d, scales)
    if grid.signed_minimum:
        return Params(d, scales, _half(-minimum.squeeze(-1)).neg(), torch.ones_like(scales))
    return Params(d, scales, *_multiples(minimum, (0, grid.scale_limits[1]), shrink))


def _multiples(
    values: torch.Tensor, limits: tuple[int, int], shrink: float
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
    return unit, torch.round(values / safe).clamp(low, high).to(torch.int16)


def _zeros(stored: Params) -> Params:
    """Units with which every block decodes to zeros."""
    dmin = None if stored.dmin is None else torch.zeros_like(stored.dmin)
    return Params(torch.zeros_like(stored.d), stored.scales, dmin, stored.mins)


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_LARGEST, _LARGEST).half()


def _effective(stored: Params) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of each sub-block as they decode, [rows, blocks, sub-blocks] each."""
    scale = stored.d.float()[..., None] * stored.scales
    if stored.dmin is None or stored.mins is None:
        return scale, torch.zeros_like(scale)
    return scale, stored.dmin.float()[..., None] * stored.mins


def _block_error(grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, stored: Params) -> torch.Tensor:
    """Weighted squared error of each block, [rows, blocks]."""
    return _sub_error(grid, w, h, *_effective(stored)).sum(-1)


def _better(
    grid: BlockGrid,
    w: torch.Tensor,
    h: torch.Tensor,
    trial: Params,
    least: torch.Tensor,
    best: Params,
) -> tuple[torch.Tensor, Params]:
    """Block by block the smaller error of `trial` and `least`, and the parameters it belongs to."""
    error = _block_error(grid, w, h, trial)
    better = error < least
    d, scales = (
        torch.where(better, trial.d, best.d),
        torch.where(better[..., None], trial.scales, best.scales),
    )
    mixed = Params(d, scales)
    if trial.dmin is not None and best.dmin is not None:
        assert trial.mins is not None and best.mins is not None
        dmin = torch.where(better, trial.dmin, best.dmin)
        mixed = Params(d, scales, dmin, torch.where(better[..., None], trial.mins, best.mins))
    return torch.where(better, error, least), mixed


# -- 3. units refitted to the codes --------------------------------------------------------------


def _refitted(grid: BlockGrid, w: torch.Tensor, h: torch.Tensor, stored: Params) -> Params:
    """The units d and dmin of least error for the codes and multiples that are there."""
    scale, minimum = _effective(stored)
    q = grid.encode(w, scale[..., None], minimum[..., None]) - grid.centre
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
