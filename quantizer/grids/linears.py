"""A quantized matrix by name: its solution, its bias, and what calibration saw of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from vlmq_export.quantizer.grids.blocks import Params
from vlmq_export.quantizer.grids.solutions import BlockSolution, Solution


@dataclass(frozen=True)
class _Named:
    name: str  # hub name of the module: model.layers.0.self_attn.q_proj
    solution: Solution | BlockSolution
    bias: torch.Tensor | None  # float16 [out], the source's bias rounded: what every runtime adds

    @property
    def out_features(self) -> int:
        return self.solution.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.solution.codes.shape[1]

    def decode(self) -> torch.Tensor:
        """The weights, float32 [out, in]."""
        return self.solution.decode()

    def at(self, rows: torch.Tensor) -> Self:
        """Some of the rows, without bias. `rows` is int64 [n]."""
        return replace(self, solution=self.solution.rows(rows), bias=None)


@dataclass(frozen=True)
class QuantizedLinear(_Named):
    """A linear on an affine grid."""

    solution: Solution
    bits: int
    group_size: int  # −1: one scale per output channel
    symmetric: bool
    energy: torch.Tensor | None = None  # float32 [in]: mean g²x² of its inputs in calibration

    def out_of_range(self) -> str:
        """What in the tensors lies outside the grid, in words; empty if nothing does."""
        return self.solution.out_of_range(self.bits)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer's file holds of it, by the name of the part. The bias is not included."""
        s = self.solution
        held = {
            "codes": s.codes,
            "scales": s.scales,
            "zero_points": s.zero_points,
            "g_idx": s.g_idx,
        }
        return held if self.energy is None else held | {"energy": self.energy}


@dataclass(frozen=True)
class BlockLinear(_Named):
    """A linear, embedding or output matrix on the grid of a GGUF block type."""

    solution: BlockSolution
    energy: torch.Tensor | None = None  # as in QuantizedLinear

    @property
    def type(self) -> str:
        """Name of the block type, a key of `blocks.GRIDS`."""
        return self.solution.grid.name

    @property
    def params(self) -> Params:
        return self.solution.params

    def out_of_range(self) -> str:
        """What in the tensors lies outside the grid, in words; empty if nothing does."""
        return self.solution.out_of_range()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer's file holds of it, by the name of the part. The bias is not included.

        Sub-scales fit int8 and minima fit uint8.
        """
        p = self.params
        held = {"codes": self.solution.codes, "d": p.d, "sub_scales": p.scales.to(torch.int8)}
        if p.dmin is not None and p.mins is not None:
            held |= {"dmin": p.dmin, "sub_mins": p.mins.to(torch.uint8)}
        return held if self.energy is None else held | {"energy": self.energy}


Linear = QuantizedLinear | BlockLinear


def stacked(slabs: Sequence[Linear]) -> Linear:
    """Slabs of one matrix one below the other. Their columns have one order."""
    first = slabs[0]
    codes = torch.cat([s.solution.codes for s in slabs])
    if isinstance(first, BlockLinear):
        params = Params.joined([s.params for s in slabs if isinstance(s, BlockLinear)], 0)
        return replace(first, solution=BlockSolution(first.solution.grid, codes, params))
    own = [s.solution for s in slabs if isinstance(s.solution, Solution)]
    scales, zeros = torch.cat([s.scales for s in own]), torch.cat([s.zero_points for s in own])
    return replace(first, solution=Solution(codes, scales, zeros, own[0].g_idx))
