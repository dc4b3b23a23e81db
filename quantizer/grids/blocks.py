"""llama.cpp's block types as grids: what a weight may become when a GGUF block is the target.

A block of `block` columns has one float16 unit d and, in the affine types, a second one, dmin. Its
sub-blocks of `sub_block` columns each hold an integer multiple of d and of dmin:

    Q2_K Q4_K Q5_K    w = (d·sc)·q − dmin·m      sc, m of 4 or 6 bits
    Q3_K Q6_K         w = (d·sc)·(q − centre)    sc signed, of 6 or 8 bits
    Q4_0 Q5_0 Q8_0    w = d·(q − centre)         a block of 32 is its own sub-block
    Q4_1 Q5_1         w = d·q + m                m = −minimum, float16
    TQ2_0 Q2_0        w = d·(q − 1)              blocks of 256 or 64; d < 0 means a zero-point of 2
    IQ4_XS            w = (d·sc)·level[q]        sc signed, of 6 bits; 16 levels, unevenly spaced
    IQ4_NL            w = d·level[q]             the same levels; a block of 32
    IQ2_… IQ3_…       w = (d·sc)·level[q]        sc odd, of 4 bits; the codes of 4 or 8 columns are
                                                 a point of a lattice (`lattices.py`)

`block_fit.py` chooses d, dmin, sc and m on the storage grid. Codes are chosen afterwards, against
the scale and minimum as they decode, so nothing is rounded twice. The products are exact in float32
and the subtraction rounds once, as in ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch

from vlmq_export.quantizer.grids.lattices import Lattice, as_tensor, nearest, on_host

_FEW = 2**10  # numbers whose places are searched for one by one


@dataclass(frozen=True)
class Params:
    """The stored parameters of the blocks of some rows. Types without sub-scales have ones."""

    d: torch.Tensor  # float16 [rows, blocks]
    scales: torch.Tensor  # int16 [rows, sub-blocks]
    dmin: torch.Tensor | None = None  # float16 [rows, blocks]
    mins: torch.Tensor | None = None  # int16 [rows, sub-blocks]

    def fields(self) -> tuple[torch.Tensor | None, ...]:
        """d, scales, dmin, mins."""
        return self.d, self.scales, self.dmin, self.mins

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Params:
        """The same with `change` applied to every tensor that is there."""
        d, scales = change(self.d), change(self.scales)
        return Params(d, scales, *(None if p is None else change(p) for p in self.fields()[2:]))

    def divided(self, by: torch.Tensor) -> Params:
        """Those of rows that are divided by float32 [rows], as float16 has them."""
        d, dmin = (
            None if unit is None else (unit.float() / by[:, None]).half()
            for unit in (self.d, self.dmin)
        )
        assert d is not None, "every type has scales"
        return replace(self, d=d, dmin=dmin)

    def rows(self, which: slice | torch.Tensor) -> Params:
        """The parameters of some of the rows."""
        return self.each(lambda p: p[which])

    @staticmethod
    def joined(parts: Sequence[Params], dim: int = 1) -> Params:
        """Blocks side by side with `dim` 1, rows one below the other with `dim` 0."""
        d, scales = (torch.cat([getattr(p, f) for p in parts], dim) for f in ("d", "scales"))
        if parts[0].dmin is None:
            return Params(d, scales)
        return Params(
            d, scales, *(torch.cat([getattr(p, f) for p in parts], dim) for f in ("dmin", "mins"))
        )

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum of each sub-block, float32 [rows, sub-blocks]. Both are exact."""
        per = self.scales.shape[1] // self.d.shape[1]  # sub-blocks per block
        scale = self.d.float().repeat_interleave(per, 1) * self.scales.float()
        if self.dmin is None or self.mins is None:
            return scale, torch.zeros_like(scale)
        return scale, self.dmin.float().repeat_interleave(per, 1) * self.mins.float()


@dataclass(frozen=True)
class BlockGrid:
    """One GGUF block type."""

    name: str
    bits: int  # of a code
    block: int  # columns that share d
    sub_block: int  # columns that share an integer scale
    scale_limits: tuple[int, int]  # the smallest and the largest stored multiple
    affine: bool  # whether there is a minimum
    signed_minimum: bool = False  # Q4_1, Q5_1: the minimum is a float16 of either sign
    off_centre: int | None = None  # the code of zero, where it is not the middle one
    # What each code stands for before the scale, from low to high; empty: code − centre.
    levels: tuple[float, ...] = ()
    lattice: Lattice | None = None  # which codes may stand together
    scale_step: int = 1  # between stored multiples: 2 where all are odd

    @property
    def together(self) -> int:
        """Columns whose codes are chosen together."""
        return 1 if self.lattice is None else self.lattice.together

    @property
    def rounded_inputs(self) -> int:
        """Inputs that llama.cpp rounds to 8 bits with one scale: a block of Q8_K, else of Q8_0."""
        return 256 if self.block == 256 else 32

    @property
    def top(self) -> int:
        """The largest code."""
        return len(self.levels) - 1 if self.levels else 2**self.bits - 1

    @property
    def centre(self) -> int:
        """The code that decodes to zero where there is no minimum."""
        if self.off_centre is not None:
            return self.off_centre
        return 0 if self.affine else 2 ** (self.bits - 1)

    @property
    def reach(self) -> float:
        """What the code at the longer end of the grid stands for."""
        ends = self.levels or (-self.centre, self.top - self.centre)
        return max(ends[0], ends[-1], key=abs)

    @property
    def spacing(self) -> float:
        """The distance between the last two codes there."""
        ends = self.levels[:2] if self.levels[:1] == (self.reach,) else self.levels[-2:]
        return abs(ends[0] - ends[1]) if ends else 1.0

    @cached_property
    def positive(self) -> BlockGrid:
        """On a lattice, the magnitudes alone: what |w| of each column may become."""
        assert self.lattice is not None, "the two sides of other grids are not alike"
        return replace(self, levels=self.lattice.magnitudes, lattice=None)

    @property
    def bits_per_weight(self) -> float:
        """Of a packed block: codes, multiples of the sub-blocks, float16 units."""
        low, high = self.scale_limits
        each = ((high - low) // self.scale_step).bit_length()
        multiples = each * (self.block // self.sub_block)
        codes = self.bits if self.lattice is None else self.lattice.bits
        return codes + (1 + self.affine) * (multiples + 16) / self.block

    def encode(
        self, weights: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> torch.Tensor:
        """The nearest codes as float32. The three arguments broadcast against each other.

        They are those of each column alone, which on a lattice may be no point: see `round`. With a
        scale of 0 all codes decode alike, and the one nearest to zero is taken.
        """
        safe = torch.where(scale == 0, torch.inf, scale)
        ratio = (weights + minimum).div_(safe) if self.affine else weights / safe
        if self.levels:
            levels = _tensor(self.levels, ratio.device)
            return _places(ratio.contiguous(), (levels[1:] + levels[:-1]) / 2)
        codes = ratio.round_()
        return (codes.add_(self.centre) if self.centre else codes).clamp_(0, self.top)

    def alone(
        self, weights: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> torch.Tensor:
        """What the codes of `encode` stand for, float32."""
        if self.levels and weights.device.type == "cpu":
            return _nearest_levels(weights / torch.where(scale == 0, torch.inf, scale), self.levels)
        return self.values(self.encode(weights, scale, minimum))

    def round(
        self,
        weights: torch.Tensor,  # [..., columns]
        scale: torch.Tensor,  # broadcasts to the weights, alike in columns that stand together
        minimum: torch.Tensor,  # broadcasts likewise
        importance: torch.Tensor,  # likewise, greater than 0; it decides on a lattice alone
    ) -> torch.Tensor:
        """What the codes of least weighted squared error stand for, float32."""
        if self.lattice is None:
            return self.alone(weights, scale, minimum)
        size = self.lattice.together
        each = scale if scale.shape[-1] == 1 else scale[..., ::size]  # of the columns of a point
        each = each.expand(*weights.shape[:-1], weights.shape[-1] // size).reshape(-1)
        cost = importance.expand_as(weights).reshape(-1, size)
        given = map(on_host, (weights.reshape(-1, size), each, cost))
        return as_tensor(nearest(self.lattice, *given)).view_as(weights)

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """The codes that stand for `values`, uint8."""
        if self.levels:
            return torch.bucketize(values, _tensor(self.levels, values.device)).to(torch.uint8)
        return (values + self.centre).to(torch.uint8)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for before scale and minimum, float32."""
        if self.levels:
            return _tensor(self.levels, codes.device)[codes.long()]
        return codes.float() - self.centre if self.centre else codes.float()

    def decode(
        self, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> torch.Tensor:
        """The weights in float32, as ggml computes them."""
        weights = scale * self.values(codes)
        return weights.sub_(minimum) if self.affine else weights


def _places(numbers: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """How many of the bounds are less than each number, float32.

    On a CPU many numbers are compared with one bound after the other, which takes a tenth of the
    time of a search for each.
    """
    if numbers.device.type != "cpu" or numbers.numel() < _FEW:
        return torch.bucketize(numbers, bounds).float()
    found, own = np.zeros(numbers.shape, np.uint8), numbers.numpy()
    for bound in bounds.numpy():
        found += (own > bound).view(np.uint8)
    return torch.from_numpy(found.astype(np.float32))


def _nearest_levels(numbers: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """The level nearest to each number on a CPU, float32. Of two that are as near, the lower one.

    Counted as in `_places`, by the distances between the levels.
    """
    unit, steps = _whole(levels)
    found, own = np.full(numbers.shape, steps[0], np.int8), numbers.numpy()
    for low, high, step in zip(levels, levels[1:], steps[1:]):
        found += (own > np.float32((low + high) / 2)).view(np.int8) * step
    return torch.from_numpy(found.astype(np.float32)).mul_(unit)


@cache
def _whole(levels: tuple[float, ...]) -> tuple[float, list[np.int8]]:
    """A unit of which all levels are multiples; the first multiple, and by how many it rises."""
    unit = 1.0
    while any(level % unit for level in levels):
        unit /= 2
    multiples = [round(level / unit) for level in levels]
    return unit, [np.int8(multiples[0]), *map(np.int8, np.diff(multiples))]


@cache
def _tensor(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)


# kvalues_iq4nl of ggml-common.h.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# The grids and magnitudes of iq2xxs_grid … iq3s_grid of ggml-common.h. Theirs are 8 or 4 times as
# large in all types but IQ3_S, whose decoders divide by that.
_IQ2, _IQ3 = (1.0, 3.125, 5.375), (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0)


def _on_lattice(name: str, sub_block: int, lattice: Lattice) -> BlockGrid:
    return BlockGrid(
        name,
        round(lattice.bits),
        256,
        sub_block,
        (1, 31),
        False,
        levels=lattice.levels,
        lattice=lattice,
        scale_step=2,
    )


GRIDS = {
    g.name: g
    for g in (
        BlockGrid("Q2_K", 2, 256, 16, (0, 15), True),
        BlockGrid("Q3_K", 3, 256, 16, (-32, 31), False),
        BlockGrid("Q4_K", 4, 256, 32, (0, 63), True),
        BlockGrid("Q5_K", 5, 256, 32, (0, 63), True),
        BlockGrid("Q6_K", 6, 256, 16, (-128, 127), False),
        BlockGrid("Q4_0", 4, 32, 32, (1, 1), False),
        BlockGrid("Q4_1", 4, 32, 32, (1, 1), True, signed_minimum=True),
        BlockGrid("Q5_0", 5, 32, 32, (1, 1), False),
        BlockGrid("Q5_1", 5, 32, 32, (1, 1), True, signed_minimum=True),
        BlockGrid("Q8_0", 8, 32, 32, (1, 1), False),
        BlockGrid("TQ2_0", 2, 256, 256, (1, 1), False, off_centre=1),
        BlockGrid("Q2_0", 2, 64, 64, (1, 1), False, off_centre=1),
        BlockGrid("IQ4_NL", 4, 32, 32, (1, 1), False, levels=_IQ4),
        BlockGrid("IQ4_XS", 4, 256, 32, (-32, 31), False, levels=_IQ4),
        _on_lattice("IQ3_S", 32, Lattice("IQ3_S", 512, 4, 4, False, (*_IQ3, 15.0))),
        _on_lattice("IQ3_XXS", 32, Lattice("IQ3_XXS", 256, 4, 8, True, (*_IQ3, 15.5))),
        _on_lattice("IQ2_S", 16, Lattice("IQ2_S", 1024, 8, 8, False, _IQ2)),
        _on_lattice("IQ2_XS", 16, Lattice("IQ2_XS", 512, 8, 8, True, _IQ2)),
        _on_lattice("IQ2_XXS", 32, Lattice("IQ2_XXS", 256, 8, 8, True, _IQ2)),
    )
}
