"""What a solver returns: the integers of a matrix, on an affine grid or on a GGUF block type.

Decoding stands here and nowhere else in `quantizer/`. The proof has a decoder of its own
(`formats/proof/weights.py`), which shares nothing with this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid, Params

LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class Solution:
    """Integers on an affine grid: `weight = scales[:, g_idx] · (codes − zero_points[:, g_idx])`.

    The columns are in the original order. Several linears may be stacked by rows.
    """

    codes: torch.Tensor  # uint8 [out, in]
    scales: torch.Tensor  # float16 [out, groups]
    zero_points: torch.Tensor  # uint8 [out, groups]
    g_idx: torch.Tensor  # int32 [in]: the group of each input column

    @property
    def natural_order(self) -> bool:
        """Whether every group is a run of neighbouring columns, so that no `g_idx` is needed."""
        return bool((self.g_idx[1:] >= self.g_idx[:-1]).all())

    def decode(self) -> torch.Tensor:
        """float32 [out, in]. Only the product is rounded."""
        codes, scales, zeros = self.codes.float(), self.scales.float(), self.zero_points.float()
        group, rest = divmod(self.codes.shape[1], scales.shape[1])  # columns per group
        # Where all groups are as long, and lie together, no gather is needed.
        by_group = self.g_idx.view(-1, 1 if rest else group)
        if not rest and bool((by_group == by_group[:, :1]).all()):
            first = self.g_idx[::group].long()
            grouped = codes.view(len(codes), -1, group)
            return grouped.sub_(zeros[:, first, None]).mul_(scales[:, first, None]).view_as(codes)
        index = self.g_idx.long()
        return codes.sub_(zeros[:, index]).mul_(scales[:, index])

    @property
    def clipped(self) -> bool:
        """Whether a scale ends where float16 does, so that weights beyond it were cut."""
        return bool((self.scales.abs() >= LARGEST).any())

    def rows(self, which: slice | torch.Tensor) -> Solution:
        """The solution of some of the rows."""
        return Solution(self.codes[which], self.scales[which], self.zero_points[which], self.g_idx)

    @property
    def units(self) -> list[torch.Tensor]:
        """What decodes in proportion to a row: float16, each [out, ...]."""
        return [self.scales]

    def divided(self, by: torch.Tensor, grid: Affine) -> Solution:
        """The same codes for rows that are divided by float32 [out], as the grid has the scales."""
        return replace(self, scales=grid.nearest(self.scales.float() / by[:, None]).half())

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Solution:
        """The same with `change` applied to every tensor."""
        return Solution(*map(change, (self.codes, self.scales, self.zero_points, self.g_idx)))

    def out_of_range(self, bits: int) -> str:
        """What in the tensors lies outside a grid of `bits` bits, in words; empty if nothing."""
        top, (out_features, groups) = 2**bits - 1, self.scales.shape
        shapes = self.codes.shape, self.zero_points.shape
        if shapes != ((out_features, len(self.g_idx)), self.scales.shape):
            return "shapes that do not fit together"
        return _counted(
            {
                f"codes over {top}": self.codes > top,
                f"zero-points over {top}": self.zero_points > top,
                f"g_idx entries outside 0..{groups - 1}": (self.g_idx < 0) | (self.g_idx >= groups),
                "scales that are not finite": ~torch.isfinite(self.scales),
            }
        )


@dataclass(frozen=True)
class BlockSolution:
    """Codes and stored parameters on the grid of a GGUF block type, columns in natural order."""

    grid: BlockGrid
    codes: torch.Tensor  # uint8 [out, in]
    params: Params

    def decode(self) -> torch.Tensor:
        """float32 [out, in], bit for bit what ggml decodes."""
        scale, minimum = (
            p.repeat_interleave(self.grid.sub_block, 1) for p in self.params.decoded()
        )
        return self.grid.decode(self.codes.float(), scale, minimum)

    @property
    def clipped(self) -> bool:
        """Whether a unit ends where float16 does, so that weights beyond it were cut."""
        return any(bool((unit.abs() >= LARGEST).any()) for unit in self.units)

    def rows(self, which: slice | torch.Tensor) -> BlockSolution:
        """The solution of some of the rows."""
        return BlockSolution(self.grid, self.codes[which], self.params.rows(which))

    @property
    def units(self) -> list[torch.Tensor]:
        """What decodes in proportion to a row: float16, each [out, ...]."""
        return [unit for unit in (self.params.d, self.params.dmin) if unit is not None]

    def divided(self, by: torch.Tensor) -> BlockSolution:
        """The same codes for rows that are divided by float32 [out], as float16 has the units."""
        return replace(self, params=self.params.divided(by))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BlockSolution:
        """The same with `change` applied to every tensor."""
        return BlockSolution(self.grid, change(self.codes), self.params.each(change))

    def out_of_range(self) -> str:
        """What in the tensors lies outside the grid, in words; empty if nothing does."""
        p, (low, high) = self.params, self.grid.scale_limits
        found = {
            f"codes over {self.grid.top}": self.codes > self.grid.top,
            f"sub-scales outside {low}..{high}": (p.scales < low) | (p.scales > high),
            "sub-scales that are even": (p.scales - low) % self.grid.scale_step != 0,
            "scales that are not finite": ~torch.isfinite(p.d),
        }
        if p.dmin is not None and p.mins is not None:
            found[f"minima over {high}"] = p.mins > high
            found["minima that are not finite"] = ~torch.isfinite(p.dmin)
        if self.grid.lattice is not None and not _counted(found):
            found["groups of codes that are no point"] = ~self.grid.lattice.holds(self.codes)
        return _counted(found)


def _counted(found: dict[str, torch.Tensor]) -> str:
    """`found` maps a description to the mask of what it describes."""
    return ", ".join(f"{int(bad.sum())} {what}" for what, bad in found.items() if bool(bad.any()))
