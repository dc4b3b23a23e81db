"""The lattices of the I-quants: which columns' magnitudes may stand together.

A point is the magnitudes of 4 or 8 neighbouring columns, one of 256 to 1024 that the type lists.
Each column has a sign of its own. In some types the number of negative signs among 8 columns must
be even, which saves a bit. `nearest` is exact: no other point and signs have a smaller weighted
squared error.

The points are constants of the format, from gguf-py's tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

_SCORES = 2**26  # scores of points that are held at once on a GPU
_CACHED = 2**17  # and on a CPU, whose caches hold so many
Array = Any  # NumPy's for what is on the CPU, and PyTorch's for what is on a device


@dataclass(frozen=True)
class Lattice:
    """The points and signs of one block type."""

    table: str  # class of gguf.quants that has the points
    points: int  # how many there are
    columns: int  # of a point
    together: int  # columns that are rounded together: those of a point, or those under one parity
    even: bool  # whether the number of negative signs among them must be even
    magnitudes: tuple[float, ...]  # that a column may have before the scale, from low to high

    @property
    def levels(self) -> tuple[float, ...]:
        """Magnitudes of both signs, from low to high: what the codes of columns stand for."""
        return (*(-m for m in reversed(self.magnitudes)), *self.magnitudes)

    @property
    def bits(self) -> float:
        """Of a column: its share of the point's number, and its sign."""
        signs = self.together - self.even
        return (self.points.bit_length() - 1) / self.columns + signs / self.together

    def grid(self, device: torch.device) -> torch.Tensor:
        """For each point the place of each column's magnitude, int64 [points, columns]."""
        return _grid(self.table, device)

    def holds(self, codes: torch.Tensor) -> torch.Tensor:
        """bool [..., groups]: whether codes [..., columns] are a point with signs that may be."""
        top = len(self.magnitudes)
        groups = codes.long().unflatten(-1, (-1, self.together // self.columns, self.columns))
        negative = groups < top
        places = torch.where(negative, top - 1 - groups, groups - top)
        listed = torch.zeros(top**self.columns, dtype=torch.bool, device=codes.device)
        listed[_number(self.grid(codes.device), top)] = True
        held = listed[_number(places.clamp(0, top - 1), top)].all(-1)
        odd = negative.flatten(-2).sum(-1) % 2 == 1
        return held & ~odd if self.even else held


@cache
def _grid(table: str, device: torch.device) -> torch.Tensor:
    import gguf

    quants = getattr(gguf.quants, table)
    quants.init_grid()
    points = torch.from_numpy(quants.grid.reshape(quants.grid_shape).copy())
    values = torch.tensor(sorted(quants.grid_map), dtype=points.dtype)
    return torch.searchsorted(values, points.contiguous()).to(device)


def _number(places: torch.Tensor, top: int) -> torch.Tensor:
    """Places of magnitudes [..., columns] as one number each, int64 [...]."""
    powers = top ** torch.arange(places.shape[-1], device=places.device)
    return (places * powers).sum(-1)


@dataclass(frozen=True)
class _Tables:
    """The points as the search needs them."""

    magnitudes: Array  # g, float32 [points, columns]
    terms: Array  # g² over g, float32 [2 · columns, points]
    turns: Array  # signs of the terms where one column's weight turns, [columns, 2 · columns]


@cache
def _tables(lattice: Lattice, device: torch.device) -> _Tables:
    each = torch.tensor(lattice.magnitudes, device=device)[lattice.grid(device)]
    terms = torch.cat([each * each, each], 1).T.contiguous()
    ones = torch.ones(lattice.columns, lattice.columns, device=device)
    turns = torch.cat([ones, ones - 2 * torch.eye(lattice.columns, device=device)], 1)
    return _Tables(*map(on_host, (each, terms, turns)))


def on_host(tensor: torch.Tensor) -> Array:
    """A tensor of the CPU as NumPy's array, and another one as it is."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def as_tensor(array: Array) -> torch.Tensor:
    """What `on_host` was given."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def product(a: Array, b: Array) -> Array:
    """a @ b by PyTorch, whose threads NumPy's would wait for."""
    return on_host(as_tensor(a) @ as_tensor(b))


def nearest(lattice: Lattice, weights: Array, scale: Array, importance: Array) -> Array:
    """`Search` for one set of weights, float32 [n, together]."""
    return Search(lattice, scale, importance)(weights)


class Search:
    """Finds the levels of least weighted squared error, for rows that keep their scales.

    With g the magnitudes of a point, its error is Σ h·(|w| − s·g)², up to a constant

        s · (Σ s·h·g² − 2·Σ h·|w|·g)

    and a sign that is not the weight's own adds 4·s·h·|w|·g. Where one sign must turn, turning one
    is enough, for every further one would add to the error.

    The arrays are those of `on_host`: a loop asks for a few hundred rows at a time, and a call of
    NumPy takes a third of PyTorch's.
    """

    def __init__(
        self,
        lattice: Lattice,
        scale: Array,  # s, float32 [n], not negative
        importance: Array,  # h, float32 [n, together], or of all rows [together]; greater than 0
    ):
        self.lattice, self.importance, self.xp = lattice, importance, _module(scale)
        self.tables = _tables(lattice, as_tensor(scale).device)
        bend = (importance * scale[:, None]).reshape(-1, lattice.columns)
        # s·h and −2·h·|w|, [n · parts, 2 · columns]. The second half is filled for each search.
        self.factors = self.xp.concatenate((bend, bend), 1)

    def __call__(self, weights: Array) -> Array:
        """Levels, float32 [n, together], for weights likewise."""
        xp, lattice, signs = self.xp, self.lattice, weights
        pull = abs(weights) * self.importance  # h·|w|
        xp.multiply(pull.reshape(-1, lattice.columns), -2, out=self.factors[:, lattice.columns :])
        scores, chosen = _least(self.factors, self.tables.terms, scored=lattice.even)
        found = self.tables.magnitudes[chosen].reshape(pull.shape)
        if lattice.even:
            (odd,) = xp.where(xp.signbit(weights).sum(1) % 2 == 1)
            if len(odd):
                signs = self._turned(odd, weights, pull, scores, found)
        return xp.copysign(found, signs)

    def _turned(
        self,
        odd: Array,  # int64 [m]: the rows where a sign must turn
        weights: Array,  # [n, together]
        pull: Array,  # h·|w|, likewise
        scores: Array,  # of the points that were found, [n · parts]
        found: Array,  # their magnitudes, [n, together]; changed
    ) -> Array:
        """The weights with the sign turned that adds least.

        `found` gets the point that is then best. The point that was best has the cost of 4·h·|w|·g
        for any turn, and every point at least that of the least magnitude. Only turns that may be
        cheaper by this bound are searched.
        """
        xp, tables, columns = self.xp, self.tables, self.lattice.columns
        pulls = pull[odd]
        own = pulls * found[odd]
        best, turn = xp.amin(own, 1), own.argmin(1)
        row, column = xp.where(self.lattice.magnitudes[0] * pulls < best[:, None])
        if len(row):
            place = odd[row] * (self.lattice.together // columns) + column // columns
            turned = self.factors[place] * tables.turns[column % columns]
            score, number = _least(turned, tables.terms)
            added = xp.full_like(pulls, float("inf"))
            added[row, column] = score - scores[place]
            least, at = xp.amin(added, 1), added.argmin(1)
            wins = least < 4 * best
            turn = xp.where(wins, at, turn)
            taken = wins[row] & (column == at[row])
            found.reshape(-1, columns)[place[taken]] = tables.magnitudes[number[taken]]
        signs = weights * 1
        signs[odd, turn] *= -1
        return signs


def _module(array: Array) -> Any:
    """The module that the functions of an array are in. Those used here have the same names."""
    return np if isinstance(array, np.ndarray) else torch


def _least(factors: Array, terms: Array, *, scored: bool = True) -> tuple[Array, Array]:
    """The least score of each row, and the number of its point; of equal scores the first one.

    factors: [n, 2 · columns]; terms: [2 · columns, points] → [n] each, the first undefined where it
    is not asked for. The scores of a part stay in the caches of a CPU.
    """
    if isinstance(factors, torch.Tensor):
        parts = [(part @ terms).min(1) for part in factors.split(max(1, _SCORES // terms.shape[1]))]
        least, chosen = zip(*parts)
        return torch.cat(least), torch.cat(chosen)
    step = max(1, _CACHED // terms.shape[1])
    least, chosen = np.empty(len(factors), np.float32), np.empty(len(factors), np.int64)
    for start in range(0, len(factors), step):
        scores = product(factors[start : start + step], terms)
        number = scores.argmin(1, out=chosen[start : start + step])
        if scored:
            least[start : start + step] = scores[np.arange(len(scores)), number]
    return least, chosen
