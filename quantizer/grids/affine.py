"""The affine grid: a weight may become `scale · (code − zero_point)` for a code in [0, 2^bits − 1].

A grid is a value without state. It fits a scale and a zero-point to each group of weights, chooses
codes, and decodes codes. Every scale is rounded to float16, the type that it has on disk, *before*
the zero-point and the codes are chosen. Nothing is therefore rounded twice.

docs/methods.md §2.1 has the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlmq_export.quantizer.config import QuantConfig

_TINY = 2.0**-24  # the smallest float16, and the distance between float16 subnormals
_NORMAL = 2.0**-14  # the smallest normal float16
_LARGEST = 65504.0
_LARGEST_PORTABLE = 4352.0  # the largest number of 7 significant bits whose 15-fold is a float16
_PORTABLE_BITS = 7  # significant bits of s for which s·z, z < 16, fits the 11 bits of a float16


@dataclass(frozen=True)
class Affine:
    """Integers of `bits` bits with one scale and one zero-point per group of weights.

    portable: scales are restricted so that s·z is exact in float16. GGUF's `d·q + m` (Q4_1) then
        decodes to the same weights. The restriction enlarges a scale by up to 1/64. A scale so
        large that no product fits float16 is left free, because clipped weights would be worse.

    The zero-points of an asymmetric grid lie in [1, 2^bits − 1], because GPTQ v1 stores them minus
    one and its readers disagree about a stored −1.
    """

    bits: int
    symmetric: bool = False
    portable: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def fit(self, weights: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero-point of each group, float32, shaped like `weights` without `dim`.

        The weights of one group lie along `dim`. Every weight decodes to within half a scale, up to
        the float16 rounding of the scale, unless it exceeds what a float16 scale can reach (about
        2^bits · 65504). A group of zeros gets the scale 1.
        """
        if self.symmetric:
            scale = self.storable(2 * weights.abs().amax(dim) / self.top)
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        low, high = weights.amin(dim).clamp_max(0), weights.amax(dim).clamp_min(0)
        # The second term counts only where the zero-point would round to 0. It makes room for a
        # zero-point of 1.
        scale = self.storable(torch.maximum((high - low) / self.top, high / (self.top - 0.5)))
        return scale, torch.round(-low / scale).clamp(1, self.top)

    def storable(self, scale: torch.Tensor) -> torch.Tensor:
        """The float16 that will be stored for each scale, as float32 [...].

        Subnormal scales are rounded up, because rounding to nearest could halve a range.
        """
        scale = torch.where(scale == 0, 1.0, scale.float()).clamp(_TINY, _LARGEST)
        if self.portable:
            return _portable(scale, torch.ceil)
        return torch.where(scale < _NORMAL, (scale / _TINY).ceil() * _TINY, scale.half().float())

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        """The storable scale that is nearest to each, float32 [...].

        It is for codes that are already chosen, which no range has to cover any more.
        """
        return _portable(scale, torch.round) if self.portable else scale.half().float()

    def encode(
        self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        """The nearest codes, as float32. The three arguments broadcast against each other."""
        return (torch.round(weights / scale) + zero).clamp_(0, self.top)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The weights, float32. Only the product is rounded."""
        return scale * (codes - zero)


def _portable(scale: torch.Tensor, whole: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Scales of few significant bits, rounded by `whole`; free where no product would fit."""
    power = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^⌊log2 scale⌋
    unit = (power * 2.0 ** (1 - _PORTABLE_BITS)).clamp_min(_TINY)
    portable = whole(scale / unit) * unit
    return torch.where(portable > _LARGEST_PORTABLE, scale.half().float(), portable)


def grid_for(config: QuantConfig, in_features: int) -> Affine:
    """The affine grid of a linear with `in_features` input columns.

    The scales are portable where Q4_1 is GGUF's only exact home for the grid. Groups of whole
    blocks of 256 columns have Q4_K instead, which takes any scale.
    """
    whole_blocks = config.group_columns(in_features) % 256 == 0
    portable = config.bits == 4 and not config.symmetric and not whole_blocks
    return Affine(config.bits, config.symmetric, portable)
