"""llama.cpp's block types as grids: what a weight may become when a GGUF block is the target.

A block of `block` columns has one float16 unit d and, in the affine types, a second one, dmin. Its
sub-blocks of `sub_block` columns each hold an integer multiple of d and of dmin:

    Q2_K Q4_K Q5_K    w = (d·sc)·q − dmin·m      sc, m of 4 or 6 bits
    Q3_K Q6_K         w = (d·sc)·(q − centre)    sc signed, of 6 or 8 bits
    Q4_0 Q5_0 Q8_0    w = d·(q − centre)         a block of 32 is its own sub-block
    Q4_1 Q5_1         w = d·q + m                m = −minimum, float16
    TQ2_0 Q2_0        w = d·(q − 1)              blocks of 256 or 64; d < 0 means a zero-point of 2

`block_fit.py` chooses d, dmin, sc and m on the storage grid. Codes are chosen afterwards, against
the scale and minimum as they decode, so nothing is rounded twice. The products are exact in float32
and the subtraction rounds once, as in ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


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

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def centre(self) -> int:
        """The code that decodes to zero where there is no minimum."""
        if self.off_centre is not None:
            return self.off_centre
        return 0 if self.affine else 2 ** (self.bits - 1)

    @property
    def reach(self) -> int:
        """q − centre at the longer end of the grid."""
        return max(-self.centre, self.top - self.centre, key=abs)

    @property
    def bits_per_weight(self) -> float:
        """Of a packed block: codes, multiples of the sub-blocks, float16 units."""
        low, high = self.scale_limits
        multiples = (high - low).bit_length() * (self.block // self.sub_block)
        return self.bits + (1 + self.affine) * (multiples + 16) / self.block

    def encode(
        self, weights: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> torch.Tensor:
        """The nearest codes as float32. The three arguments broadcast against each other.

        With a scale of 0 all codes decode alike, and the centre is taken.
        """
        safe = torch.where(scale == 0, 1.0, scale)
        ratio = torch.where(scale == 0, 0.0, (weights + minimum) / safe)
        return (torch.round(ratio) + self.centre).clamp_(0, self.top)

    def decode(
        self, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> torch.Tensor:
        """The weights in float32, as ggml computes them."""
        return scale * (codes.float() - self.centre) - minimum


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
    )
}
