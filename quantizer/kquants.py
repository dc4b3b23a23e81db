"""llama.cpp's block types as grids: what a weight may become when the file's own blocks are the target.

A super-block of 256 columns holds sub-blocks of 16 or 32, each with an integer multiple of one float16 scale `d` and,
in the affine types, an integer multiple of one float16 minimum `dmin`:

    Q2_K Q4_K Q5_K    w = (d·sc)·q − dmin·m            sc, m of 4 or 6 bits
    Q3_K Q6_K         w = (d·sc)·(q − centre)          sc signed, 6 or 8 bits
    Q4_0 Q5_0 Q8_0    w = d·(q − centre)               a block of 32 is its own sub-block
    Q4_1 Q5_1         w = d·q + m                      m = −minimum, float16
    TQ2_0 Q2_0        w = d·(q − 1)                    a block of 256 or 64; d < 0 is a zero-point of 2

`fit` chooses d, dmin, sc and m on the storage grid under a weight a column; codes are chosen afterwards against the
decoded scale and minimum, so nothing is rounded twice. Products are exact in float32 and the subtraction rounds once,
as in ggml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

_LARGEST = 65504.0


@dataclass(frozen=True)
class Params:
    """Stored parameters of `blocks` blocks a row. Integers are multiples of d and dmin; legacy types have ones."""

    d: torch.Tensor  # float16 [rows, blocks]
    scales: torch.Tensor  # int16 [rows, sub-blocks]
    dmin: torch.Tensor | None = None  # float16 [rows, blocks]
    mins: torch.Tensor | None = None  # int16 [rows, sub-blocks]

    def _each(self, change) -> Params:
        return Params(*(None if p is None else change(p) for p in (self.d, self.scales, self.dmin, self.mins)))

    def rows(self, which: slice | torch.Tensor) -> Params:
        """Those of some rows."""
        return self._each(lambda p: p[which])

    @staticmethod
    def joined(parts: Sequence[Params], dim: int = 1) -> Params:
        """Blocks side by side, in order; rows one below the other with `dim` 0."""
        fields = ([getattr(p, f) for p in parts] for f in ("d", "scales", "dmin", "mins"))
        return Params(*(None if f[0] is None else torch.cat(f, dim) for f in fields))

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum of each sub-block, float32 [rows, sub-blocks]; both products are exact."""
        per = self.scales.shape[1] // self.d.shape[1]
        scale = self.d.float().repeat_interleave(per, 1) * self.scales.float()
        if self.dmin is None or self.mins is None:
            return scale, torch.zeros_like(scale)
        return scale, self.dmin.float().repeat_interleave(per, 1) * self.mins.float()


@dataclass(frozen=True)
class BlockGrid:
    """One GGUF block type."""

    name: str
    bits: int
    block: int  # columns that share d
    sub_block: int  # columns that share an integer scale
    scale_limits: tuple[int, int]  # smallest and largest stored multiple
    affine: bool  # whether there is a minimum
    signed_minimum: bool = False  # Q4_1, Q5_1: a float16 of either sign
    off_centre: int | None = None  # code of zero where it is not the middle one

    @property
    def top(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    @property
    def centre(self) -> int:
        """Code that decodes to zero where there is no minimum."""
        if self.off_centre is not None:
            return self.off_centre
        return 0 if self.affine else 2 ** (self.bits - 1)

    @property
    def reach(self) -> int:
        """q − centre at the longer end of the grid."""
        return max(-self.centre, self.top - self.centre, key=abs)

    @property
    def bits_per_weight(self) -> float:
        """Packed: codes, integers of the sub-blocks, float16 units."""
        low, high = self.scale_limits
        integers = (high - low).bit_length() * (self.block // self.sub_block)
        return self.bits + (1 + self.affine) * (integers + 16) / self.block

    def encode(self, weights: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """Nearest codes as float32; the three broadcast. A scale of 0 decodes every code alike: the centre is written."""
        ratio = torch.where(scale == 0, 0.0, (weights + minimum) / torch.where(scale == 0, 1.0, scale))
        return (torch.round(ratio) + self.centre).clamp_(0, self.top)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """float32, as ggml computes it."""
        return scale * (codes.float() - self.centre) - minimum

    def fit(self, weights: torch.Tensor, importance: torch.Tensor) -> Params:
        """Parameters of whole blocks. weights: float32 [rows, k · block]; importance > 0: float32 [k · block]."""
        rows = len(weights)
        w = weights.reshape(rows, -1, self.block // self.sub_block, self.sub_block)  # [rows, blocks, subs, columns]
        h = importance.expand(weights.shape).reshape(w.shape)
        scale, minimum = self._sub_blocks(w, h)
        best = self._stored(scale, minimum, 1.0)
        least = self._error(w, h, best)
        for shrink in _SUPER_SHRINK if self.sub_block < self.block else ():
            least, best = self._better(w, h, self._stored(scale, minimum, shrink), least, best)
        for _ in range(_REFITS):
            least, best = self._better(w, h, self._refit(w, h, best), least, best)
        return Params(*(None if p is None else p.reshape(rows, -1) for p in best))

    # -- sub-blocks, real-valued ----------------------------------------------------------------------------------

    def _sub_blocks(self, w: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum of each sub-block by trial ranges and least squares, [rows, blocks, subs]."""
        if not self.affine:
            return self._symmetric(w, h), torch.zeros_like(w[..., 0])
        low, high = w.amin(-1), w.amax(-1)
        if not self.signed_minimum:
            low, high = low.clamp_max(0), high.clamp_min(0)
        best_scale = ((high - low) / self.top).clamp_min(0)
        best_min = -low
        least = self._sub_error(w, h, best_scale, best_min)
        for a, b in product((self.top / (self.top + t) for t in _EXCESS[self.bits]), repeat=2):
            middle = 0.0 if not self.signed_minimum else (low + high) / 2
            scale = (middle + (high - middle) * b - (middle + (low - middle) * a)) / self.top
            minimum = -(middle + (low - middle) * a)
            for _ in range(2):
                scale, minimum = self._least_squares(w, h, scale, minimum)
                error = self._sub_error(w, h, scale, minimum)
                better = error < least
                least = torch.where(better, error, least)
                best_scale = torch.where(better, scale, best_scale)
                best_min = torch.where(better, minimum, best_min)
        return best_scale, best_min

    def _symmetric(self, w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Signed scale whose longer side, mostly that of code 0, reaches the largest weight."""
        extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        best = extreme / self.reach
        zero = torch.zeros_like(best)
        least = self._sub_error(w, h, best, zero)
        for excess in _EXCESS_SYMMETRIC:
            for sign in (-1.0, 1.0):
                scale = sign * extreme / (abs(self.reach) + excess)
                for _ in range(2):
                    q = self.encode(w, scale[..., None], zero[..., None]) - self.centre
                    scale = (h * q * w).sum(-1) / (h * q * q).sum(-1).clamp_min(1e-30)
                    error = self._sub_error(w, h, scale, zero)
                    better = error < least
                    least, best = torch.where(better, error, least), torch.where(better, scale, best)
        return best

    def _least_squares(
        self, w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and minimum that fit best the codes these two give; a minimum below 0 is held at 0."""
        q = self.encode(w, scale[..., None], minimum[..., None])
        sh, sq, sqq = h.sum(-1), (h * q).sum(-1), (h * q * q).sum(-1)
        sw, sqw = (h * w).sum(-1), (h * q * w).sum(-1)
        determinant = sh * sqq - sq * sq
        ok = determinant > 1e-12 * sh * sqq
        safe = torch.where(ok, determinant, 1.0)
        new_scale, new_min = (sh * sqw - sq * sw) / safe, (sq * sqw - sqq * sw) / safe
        if not self.signed_minimum:
            held = new_min < 0
            new_scale = torch.where(held, sqw / sqq.clamp_min(1e-30), new_scale)
            new_min = new_min.clamp_min(0)
        ok &= new_scale > 0
        return torch.where(ok, new_scale, scale), torch.where(ok, new_min, minimum)

    def _sub_error(self, w, h, scale, minimum) -> torch.Tensor:
        scale, minimum = scale[..., None], minimum[..., None]
        return (h * (self.decode(self.encode(w, scale, minimum), scale, minimum) - w).square()).sum(-1)

    # -- super-blocks, on the storage grid ------------------------------------------------------------------------

    def _stored(self, scale: torch.Tensor, minimum: torch.Tensor, shrink: float) -> tuple:
        """(d, scales, dmin, mins) for real-valued scales and minima; the largest multiple is at `shrink` of the limit."""
        d, scales = _multiples(scale, self.scale_limits, shrink)
        if not self.affine:
            return d, scales, None, None
        if self.signed_minimum:
            return d, scales, _half(-minimum.squeeze(-1)).neg(), torch.ones_like(scales)
        return d, scales, *_multiples(minimum, (0, self.scale_limits[1]), shrink)

    def _error(self, w: torch.Tensor, h: torch.Tensor, stored: tuple) -> torch.Tensor:
        """Weighted squared error of each block, [rows, blocks]."""
        scale, minimum = self._effective(stored)
        return self._sub_error(w, h, scale, minimum).sum(-1)

    def _effective(self, stored: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        d, scales, dmin, mins = stored
        scale = d.float()[..., None] * scales
        return scale, torch.zeros_like(scale) if dmin is None else dmin.float()[..., None] * mins

    def _better(self, w, h, trial: tuple, least: torch.Tensor, best: tuple) -> tuple[torch.Tensor, tuple]:
        """Keep, block by block, whichever has the smaller error."""
        error = self._error(w, h, trial)
        better = error < least
        mixed = (
            None if new is None else torch.where(better if new.dim() == 2 else better[..., None], new, old)
            for new, old in zip(trial, best)
        )
        return torch.where(better, error, least), tuple(mixed)

    def _refit(self, w: torch.Tensor, h: torch.Tensor, stored: tuple) -> tuple:
        """With codes and integers held, the d and dmin of least error; then the integers again for these."""
        _, scales, dmin, mins = stored
        scale, minimum = self._effective(stored)
        q = self.encode(w, scale[..., None], minimum[..., None]) - self.centre
        x = (q * scales[..., None]).flatten(-2)
        hf, wf = h.flatten(-2), w.flatten(-2)
        sxx, sxw = (hf * x * x).sum(-1), (hf * x * wf).sum(-1)
        if dmin is None or mins is None:
            return _half(sxw / sxx.clamp_min(1e-30)), scales, None, None
        y = -mins[..., None].expand(w.shape).flatten(-2).float()
        syy, sxy, syw = (hf * y * y).sum(-1), (hf * x * y).sum(-1), (hf * y * wf).sum(-1)
        determinant = sxx * syy - sxy * sxy
        ok = determinant > 1e-12 * sxx * syy
        safe = torch.where(ok, determinant, 1.0)
        d = torch.where(ok, (syy * sxw - sxy * syw) / safe, sxw / sxx.clamp_min(1e-30))
        m = torch.where(ok, (sxx * syw - sxy * sxw) / safe, dmin.float())
        return _half(d.clamp_min(0)), scales, _half(m if self.signed_minimum else m.clamp_min(0)), mins


_REFITS = 4
_SUPER_SHRINK = (0.97, 0.94, 0.9, 0.85, 0.8)  # of the largest stored multiple, tried for every block
# Codes by which a trial range exceeds the grid: below 0 the range is stretched, above it outliers are clipped.
_EXCESS = {
    2: (-0.3, 0.0, 0.25, 0.5, 0.85, 1.3, 2.0),
    4: (-0.5, 0.0, 0.5, 1.0, 1.7, 2.4),
    5: (-0.6, -0.3, 0.0, 0.4, 0.8, 1.4),
}
_EXCESS_SYMMETRIC = (-0.9, -0.7, -0.5, -0.3, -0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 1.4, 2.0, 2.6)


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_LARGEST, _LARGEST).half()


def _multiples(values: torch.Tensor, limits: tuple[int, int], shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 unit [...] and integers [..., subs] with unit · integer ≈ value; limits (1, 1) store the value itself."""
    low, high = limits
    if high == 1:
        return _half(values.squeeze(-1)), torch.ones_like(values, dtype=torch.int16)
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)
    unit = _half(extreme / (shrink * (low if low < 0 else high)))
    safe = torch.where(unit == 0, 1.0, unit.float())[..., None]
    return unit, torch.round(values / safe).clamp(low, high).to(torch.int16)


GRIDS = {
    g.name: g
    for g in (
        BlockGrid("Q2_K", 2, 256, 16, (0, 15), True), BlockGrid("Q3_K", 3, 256, 16, (-32, 31), False),
        BlockGrid("Q4_K", 4, 256, 32, (0, 63), True), BlockGrid("Q5_K", 5, 256, 32, (0, 63), True),
        BlockGrid("Q6_K", 6, 256, 16, (-128, 127), False),
        BlockGrid("Q4_0", 4, 32, 32, (1, 1), False), BlockGrid("Q4_1", 4, 32, 32, (1, 1), True, True),
        BlockGrid("Q5_0", 5, 32, 32, (1, 1), False), BlockGrid("Q5_1", 5, 32, 32, (1, 1), True, True),
        BlockGrid("Q8_0", 8, 32, 32, (1, 1), False),
        BlockGrid("TQ2_0", 2, 256, 256, (1, 1), False, off_centre=1), BlockGrid("Q2_0", 2, 64, 64, (1, 1), False, off_centre=1),
    )
}  # fmt: skip
