"""Columns of a linear in the order of the file, where that is not the order of transformers.

Whole heads change their places. A group of columns with one scale, or a block, must therefore lie
within a head, or be a whole row.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.tables.layout import Place, heads_in_order
from vlmq_export.quantizer.grids.linears import BlockLinear, Linear


def in_order(linear: Linear, place: Place) -> Linear:
    """A linear with its columns as the file has them.

    Raises FormatError where its groups or blocks would be torn.
    """
    if not place.heads:
        return linear

    def move(values: torch.Tensor) -> torch.Tensor:  # [rows, heads · n] → the same shape
        return heads_in_order(values, place.heads)

    if isinstance(linear, BlockLinear):
        if place.run % linear.solution.grid.block:
            raise FormatError(
                torn(linear.name, f"blocks of {linear.type}", place.run, "quantize again")
            )
        return replace(linear, solution=linear.solution.each(move))
    solution = replace(linear.solution, codes=move(linear.solution.codes))
    if linear.group_size != -1:
        if place.run % linear.group_size:
            raise FormatError(
                torn(linear.name, f"groups of {linear.group_size} columns", place.run)
            )
        parts = {"scales": move(solution.scales), "zero_points": move(solution.zero_points)}
        solution = replace(solution, **parts)
    return replace(linear, solution=solution)


def torn(
    name: str, what: str, run: int, instead: str = "use --group-size 32, 64, 128 or -1"
) -> str:
    """One line on a linear whose groups or blocks do not lie within heads of `run` columns."""
    return (
        f"{name}: llama.cpp has its heads of {run} columns in another order, which {what} do not"
        f" survive; {instead}"
    )
