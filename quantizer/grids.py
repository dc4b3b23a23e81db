"""What a weight may become: `scale · (code − zero_point)`, code in [0, 2^bits − 1].

A grid is a value: it fits its parameters to groups of weights, chooses codes and decodes them. The scale is rounded to
float16, its type on disk, *before* the zero-point and the codes are chosen, so nothing is ever rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmq_export.quantizer.config import QuantConfig

_TINY = 2.0**-24  # smallest float16, and the spacing of float16 subnormals
_NORMAL = 2.0**-14  # smallest normal float16
_LARGEST = 65504.0
_LARGEST_PORTABLE = 4352.0  # largest 7-bit significand whose 15-fold is still a float16
_PORTABLE_BITS = 7  # 11 − bits: significand of s such that s·z, z < 16, fits float16's 11 bits


@dataclass(frozen=True)
class Affine:
    """Integers with one scale and zero-point a group (methods.md §2.1, min-max).

    `portable` makes s·z exact in float16, so that GGUF's `d·q + m` decodes the same weights (Q4_1); it costs up to
    1/64 of the scale. Zero-points of asymmetric grids stay in [1, 2^bits − 1]: GPTQ v1 stores them minus one.
    """

    bits: int
    symmetric: bool = False
    portable: bool = False

    @property
    def top(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    def fit(self, weights: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero-point of each group; a group's weights lie along `dim`. Both float32, without `dim`.

        Every weight of the group decodes to within half a scale, up to float16's rounding of the scale, unless it
        exceeds what float16 scales can reach (about 2^bits · 65504). An all-zero group gets scale 1.
        """
        if self.symmetric:
            scale = self.storable(2 * weights.abs().amax(dim) / self.top)
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        low, high = weights.amin(dim).clamp_max(0), weights.amax(dim).clamp_min(0)
        # The second term only counts where the zero-point would round to 0: it makes room for a zero-point of 1.
        scale = self.storable(torch.maximum((high - low) / self.top, high / (self.top - 0.5)))
        return scale, torch.round(-low / scale).clamp(1, self.top)

    def storable(self, scale: torch.Tensor) -> torch.Tensor:
        """float32 [...] → the float16 that will be stored, as float32. Upwards where rounding down could clip much."""
        scale = torch.where(scale == 0, 1.0, scale.float()).clamp(_TINY, _LARGEST)
        if self.portable:
            power = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)  # largest power of two ≤ scale
            unit = (power * 2.0 ** (1 - _PORTABLE_BITS)).clamp_min(_TINY)
            return ((scale / unit).ceil() * unit).clamp_max(_LARGEST_PORTABLE)
        # Subnormals are multiples of 2^-24; to nearest could halve a range.
        return torch.where(scale < _NORMAL, (scale / _TINY).ceil() * _TINY, scale.half().float())

    def encode(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Nearest codes, as float32; the three broadcast."""
        return (torch.round(weights / scale) + zero).clamp_(0, self.top)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """float32; exact but for the one rounding of the product."""
        return scale * (codes - zero)


def grid_for(config: QuantConfig, in_features: int) -> Affine:
    """The grid of one linear. Portable where Q4_1 is GGUF's only home for it: groups of whole 256-blocks have Q4_K."""
    portable = config.bits == 4 and not config.symmetric and config.group_columns(in_features) % 256 != 0
    return Affine(config.bits, config.symmetric, portable)
