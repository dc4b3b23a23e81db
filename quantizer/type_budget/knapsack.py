"""A knapsack: the type or width of each matrix that costs least in all, within a budget of bits.

On the lower convex hull of a matrix's (bits, cost) points, each step to a larger type gains less
per bit than the step before it. So the steps of all matrices can be taken in one order, the largest
gain per bit first, wherever they fit. The result is optimal where the budget is used up exactly.
Otherwise its cost is above the optimum by at most the gain of one step.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from vlmq_export.errors import UsageError

Matrix = TypeVar("Matrix", bound=Hashable)  # its name, or the names of those that share a kind
Kind = TypeVar("Kind", bound=Hashable)  # a block type, or the bits of a width


class _Step(NamedTuple):
    """From one kind of a matrix to the next larger one on its hull."""

    matrix: Hashable
    before: Hashable
    after: Hashable
    bits: int  # that it takes
    gain: float  # of cost, per bit


def choose(
    costs: Mapping[Matrix, Mapping[Kind, tuple[int, float]]], budget: int
) -> dict[Matrix, Kind]:
    """matrix → kind, of least total cost within `budget` bits. costs: matrix → kind → (bits, cost).

    Raises UsageError where not even the smallest kinds fit.
    """
    chosen: dict[Any, Any] = {}
    steps: list[_Step] = []
    left = budget
    for matrix, kinds in costs.items():
        hull = _hull(kinds)
        chosen[matrix] = hull[0]
        left -= kinds[hull[0]][0]
        steps += [_step(matrix, kinds, before, after) for before, after in pairwise(hull)]
    if left < 0:
        raise UsageError(
            "--target-bpw: the smallest types take"
            f" {(budget - left) / budget:.3f} times as much; raise it"
        )
    for step in sorted(steps, key=lambda step: -step.gain):
        # A step that does not fit ends its matrix: those behind it begin at another type.
        if chosen[step.matrix] == step.before and step.bits <= left:
            chosen[step.matrix] = step.after
            left -= step.bits
    return chosen


def _step(
    matrix: Hashable, kinds: Mapping[Kind, tuple[int, float]], before: Kind, after: Kind
) -> _Step:
    """The step of a matrix from one of its kinds to another."""
    (bits_before, cost_before), (bits_after, cost_after) = kinds[before], kinds[after]
    bits = bits_after - bits_before
    return _Step(matrix, before, after, bits, (cost_before - cost_after) / bits)


def _hull(kinds: Mapping[Kind, tuple[int, float]]) -> list[Kind]:
    """Kinds on the lower convex hull, from the smallest on, as long as more bits cost less."""
    hull: list[Kind] = []
    for kind, (bits, cost) in sorted(kinds.items(), key=lambda item: item[1]):
        if hull and cost >= kinds[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (b0, c0), (b1, c1) = (kinds[k] for k in hull[-2:])
            # Whether the step to the last type gains more per bit than the step on from it.
            if (c0 - c1) * (bits - b1) > (c1 - cost) * (b1 - b0):
                break
            hull.pop()
        hull.append(kind)
    return hull
