"""Linears of one grid on the same statistics, solved together as the rows of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.grids.blocks import BlockGrid
from vlmq_export.quantizer.grids.choice import GridChoice
from vlmq_export.quantizer.grids.linears import BlockLinear, Linear, QuantizedLinear
from vlmq_export.quantizer.grids.solutions import BlockSolution, Solution
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks, round_to_nearest

Rounded = Solution | BlockSolution
Solved = tuple[Linear, dict]  # a linear and its metrics


@dataclass(frozen=True)
class Matrix:
    """A linear that is to be solved, with its source weights."""

    name: str  # hub name of the module
    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None = None  # [out]


@dataclass(frozen=True)
class Stack:
    """Matrices one below the other."""

    names: list[str]
    weights: torch.Tensor  # float32 [out of all, in]
    sizes: list[int]  # rows of each
    choice: GridChoice

    @classmethod
    def of(cls, matrices: Sequence[Matrix], choice: GridChoice) -> Stack:
        """Matrices that share a grid and the width of their inputs."""
        weights = torch.cat([m.weight.float() for m in matrices])
        return cls([m.name for m in matrices], weights, [len(m.weight) for m in matrices], choice)

    def split(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows of the stack → those of each matrix."""
        return rows.split(self.sizes)

    def parts(self, solution: Rounded) -> list[Rounded]:
        """A solution of the stack → that of each matrix."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [solution.rows(slice(end - size, end)) for end, size in zip(ends, self.sizes)]


def nearest(weights: torch.Tensor, choice: GridChoice) -> Rounded:
    """Weights [out, in] rounded to nearest on their grid."""
    if isinstance(choice.grid, BlockGrid):
        return nearest_in_blocks(weights, choice.grid)
    return round_to_nearest(weights, choice.grid, group=choice.group)


def linear_of(
    name: str,
    solution: Rounded,
    bias: torch.Tensor | None,
    choice: GridChoice,
    energy: torch.Tensor | None = None,
) -> Linear:
    """A solution by name, with its bias in float16, which every runtime format stores it in.

    Raises CheckpointError for a bias beyond float16, and for weights that no scale reaches.
    """
    if solution.clipped:
        raise CheckpointError(
            f"{name}.weight has values that no float16 scale of this grid reaches; use more bits,"
            " or mend the checkpoint"
        )
    bias = None if bias is None else bias.detach().half()
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise CheckpointError(
            f"{name}.bias exceeds float16's range, which every runtime format stores it in"
        )
    if isinstance(solution, BlockSolution):
        return BlockLinear(name, solution, bias, energy)
    assert not isinstance(choice.grid, BlockGrid)
    bits, symmetric = choice.grid.bits, choice.grid.symmetric
    return QuantizedLinear(name, solution, bias, bits, choice.group_size, symmetric, energy)
