"""A knapsack: the type or width of each matrix that costs least in all, within a budget of bits.

On the lower convex hull of a matrix's (bits, cost) points, each step to a larger type gains less
per bit than the step before it. So the steps of all matrices can be taken in one order, the largest
gain per bit first, wherever they fit. The result is optimal where the budget is used up exactly.
Otherwise its cost is above the optimum by at most the gain of one step.

The step of a vision tower can be a fifth of a budget, and what fits beside it then depends on it.
So the largest matrices are tried at each of their kinds, and the others fill what is left.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple, TypeVar

from vlmq_export.errors import UsageError

Matrix = TypeVar("Matrix", bound=Hashable)  # its name, or the names of those that share a kind
Kind = TypeVar("Kind", bound=Hashable)  # a block type, or the bits of a width
LARGE = 3  # matrices whose kinds are all tried: a vision tower, an embedding and an output head


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
    hulls = {matrix: _hull(kinds) for matrix, kinds in costs.items()}

    def span(matrix: Matrix) -> int:
        """Bits between the smallest and the largest kind."""
        first, last = (costs[matrix][hulls[matrix][end]][0] for end in (0, -1))
        return last - first

    def total(chosen: Mapping[Matrix, Kind]) -> tuple[int, float]:
        """Bits and cost of all matrices."""
        bits, cost = zip(*(costs[matrix][kind] for matrix, kind in chosen.items()))
        return sum(bits), sum(cost)

    large = sorted(costs, key=span, reverse=True)[:LARGE]
    smallest = {matrix: hull[0] for matrix, hull in hulls.items()}
    steps = [
        _step(matrix, costs[matrix], *each)
        for matrix, hull in hulls.items()
        if matrix not in large
        for each in pairwise(hull)
    ]
    steps.sort(key=lambda step: -step.gain)
    found = []
    for kinds in product(*(hulls[matrix] for matrix in large)):
        start = smallest | dict(zip(large, kinds))
        if (left := budget - total(start)[0]) >= 0:
            found.append(_filled(start, steps, left))
    if not found:
        raise UsageError(
            "--target-bpw: the smallest types take"
            f" {total(smallest)[0] / budget:.3f} times as much; raise it"
        )
    return min(found, key=lambda chosen: total(chosen)[1])


def _filled(start: Mapping[Any, Any], steps: Sequence[_Step], left: int) -> dict[Any, Any]:
    """The same kinds, and whatever steps fit into the bits that are left."""
    chosen = {**start}
    for step in steps:
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
