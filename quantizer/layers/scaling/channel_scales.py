"""The scales of a step's input channels that leave the least error, told before the solve.

    x'_j = x_j / s_j        W'_ij = W_ij · s_j

Rounding W' leaves at the outputs of a linear about

    E(s) = Σ_groups (Σ_j d_j/s_j²) · Σ_i step_i²/12  +  Σ_blocks (Σ_j |W_j|²·s_j²) · δ²/12

d_j   what is left of A_jj once the columns after j make up for its error: the pivot of A
step  between two codes of a group: its range over the largest code. The range goes with the 4-norm
      of W_ij·s_j, since a search of ranges cuts the maximum off
δ     between two inputs, where the runtime rounds a block of them to 8 bits: its peak over 127

The first sum grows with what a group has to cover, and falls where columns that matter much are
rounded finely. It does not change where all of a group's columns are scaled alike. The second is
that of runtimes that round activations. At the least E the slopes of both sides are equal, channel
by channel, and s is found by their ratio, over and over. docs/methods.md §4.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

OCTAVES = 8  # the most that a channel is scaled by, either way
ROUNDS = 8  # after which E changes by less than a thousandth
_STEP = 1 / 6  # of log s, for log(falls/rises): E has terms of s⁻² and, in the 4-norm, of s⁴
_REACH = 2.2  # (range/2)² over the mean square of a group, both as its 4-norm has them
_PEAK_NORM = 8  # of the inputs of a block
_PEAK = 4.0  # peak² of a block over the square of that norm of the rms: 2.5 if it were Gaussian
_INPUT_CODES = 127
_AT_ONCE = 2**20  # weights that are looked at together
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Reader:
    """A linear that reads the channels, with what E is computed from."""

    weights: torch.Tensor  # W, [out, in]
    pivots: torch.Tensor  # d, float32 [in]; 0 where an input is never excited
    energy: torch.Tensor  # mean of g²·x², float32 [in]
    group: int  # columns that share a step
    top: int  # the largest code
    block: int = 0  # inputs that the runtime rounds to 8 bits with one scale; 0: it does not

    def slopes(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much E falls and rises with log s_j, each halved, [in]. Either sums up to E."""
        left = (self.pivots / scale.square()).view(-1, self.group)  # [groups, group]
        squares, shares = self._ranges(scale)
        step = 4 * _REACH / self.top**2
        falls = step * left * squares[:, None]
        rises = step * left.sum(1, keepdim=True) * shares
        falls, rises = falls.flatten(), rises.flatten()
        if self.block:
            own = (self.energy / scale.square()).view(-1, self.block)  # [blocks, block]
            peak, share = _peaks(own)
            carried = (self._norms * scale.square()).view(-1, self.block)
            falls += (peak * share * carried.sum(1, keepdim=True)).flatten()
            rises += (peak * carried).flatten()
        return falls, rises

    @cached_property
    def _norms(self) -> torch.Tensor:
        """|W_j|² of each column, [in]."""
        return torch.stack([part.square().sum(0) for part in self._parts()]).sum(0)

    def _ranges(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ_i range² of each group [groups], and what of it is each column's [groups, group]."""
        shares = torch.zeros_like(scale).view(-1, self.group)
        squares = torch.zeros_like(shares[:, 0])
        for part in self._parts():
            size = (part * scale).abs_().view(len(part), -1, self.group)
            most = size.amax(2, keepdim=True)
            powers = size.div_(most.clamp_min(_TINY)).square_().square_()
            total = powers.sum(2, keepdim=True)  # from 1 to `group`, but 0 for a group of zeros
            square = (total / self.group).sqrt_().mul_(most.square())
            squares += square.sum((0, 2))
            shares += powers.mul_(square / total.clamp_min(1)).sum(0)
        return squares, shares

    def _parts(self) -> Iterator[torch.Tensor]:
        """W in float32, some rows at a time, so that they stay in the caches."""
        rows = max(1, _AT_ONCE // self.weights.shape[1])
        return (part.detach().float() for part in self.weights.split(rows))


def least_error_scales(readers: Sequence[Reader]) -> torch.Tensor:
    """s, float32 [in], of least E, summed over the readers, each as a share of what it is at s = 1.

    Where nothing tells against any scale s is 1: inputs that are never excited, columns of zeros.
    The geometric mean of the others is 1.
    """
    scale = torch.ones_like(readers[0].pivots)
    shares = [1 / max(float(reader.slopes(scale)[0].sum()), _TINY) for reader in readers]
    free = torch.ones_like(scale, dtype=torch.bool)
    for _ in range(ROUNDS):
        falls, rises = torch.zeros_like(scale), torch.zeros_like(scale)
        for reader, share in zip(readers, shares):
            for total, slope in zip((falls, rises), reader.slopes(scale)):
                total.add_(slope, alpha=share)
        ratio = falls / rises
        free = torch.isfinite(ratio) & (ratio > 0)
        scale = scale * ratio.where(free, 1.0).pow(_STEP)
    octaves = scale.log2()
    octaves -= octaves[free].mean() if bool(free.any()) else 0.0
    return octaves.clamp_(-OCTAVES, OCTAVES).where(free, 0.0).exp2()


def _peaks(energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """δ² of each block of inputs [blocks, 1], and each one's share of it [blocks, block].

    energy: mean square of the inputs, [blocks, block].
    """
    most = energy.amax(1, keepdim=True)
    powers = (energy / most.clamp_min(_TINY)).pow_(_PEAK_NORM / 2)
    total = powers.sum(1, keepdim=True).clamp_min(1)
    return most * total.pow(2 / _PEAK_NORM) * (_PEAK / _INPUT_CODES**2), powers / total
