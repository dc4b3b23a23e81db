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

import torch

_SCORES = 2**22  # scores of points that are held at once


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


def nearest(
    lattice: Lattice,
    weights: torch.Tensor,  # float32 [n, together]
    scale: torch.Tensor,  # float32 [n], not negative
    importance: torch.Tensor,  # float32 [n, together], greater than 0
) -> torch.Tensor:
    """The codes of least weighted squared error, uint8 [n, together]."""
    step = max(1, _SCORES // (lattice.points * lattice.together // lattice.columns))
    parts = zip(weights.split(step), scale.split(step), importance.split(step))
    return torch.cat([_nearest(lattice, w, s, h) for w, s, h in parts])


def _nearest(
    lattice: Lattice, weights: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """With g the magnitudes of a point, its error is Σ h·(|w| − s·g)², up to a constant

        s · (Σ s·h·g² − 2·Σ h·|w|·g)

    and a sign that is not the weight's own adds 4·s·h·|w|·g. Where one sign must turn, turning one
    is enough, for every further one would add to the error.
    """
    grid = lattice.grid(weights.device)
    magnitudes = torch.tensor(lattice.magnitudes, device=weights.device)
    each = magnitudes[grid]  # [points, columns]
    table = torch.cat([each * each, each], 1).T.contiguous()
    pull = (importance * weights.abs()).reshape(-1, lattice.columns)
    bend = (importance * scale[:, None]).reshape(-1, lattice.columns)
    scores, chosen = _least(torch.cat([bend, -2 * pull], 1) @ table)
    negative = weights < 0
    if lattice.even:
        odd = (negative.sum(1) % 2 == 1).nonzero().squeeze(1)
        if len(odd):
            _turn(lattice, odd, pull, bend, scores, chosen, negative, each, table)
    places = grid[chosen].view(len(weights), lattice.together)
    top = len(lattice.magnitudes)
    return torch.where(negative, top - 1 - places, top + places).to(torch.uint8)


def _least(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least score of each row, and the number of its point: [n, points] → [n] each.

    On a CPU NumPy finds it in a third of PyTorch's time. Both take the first of equal scores.
    """
    if scores.device.type != "cpu":
        return scores.min(1)
    chosen = torch.from_numpy(scores.numpy().argmin(1))
    return scores.gather(1, chosen[:, None]).squeeze(1), chosen


def _turn(
    lattice: Lattice,
    odd: torch.Tensor,  # int64 [m]: the rows where a sign must turn
    pull: torch.Tensor,  # h·|w|, [n · parts, columns]
    bend: torch.Tensor,  # s·h, likewise
    scores: torch.Tensor,  # of the chosen points, [n · parts]
    chosen: torch.Tensor,  # their numbers; changed
    negative: torch.Tensor,  # bool [n, together]; changed
    each: torch.Tensor,  # magnitudes, [points, columns]
    table: torch.Tensor,  # [2 · columns, points]
) -> None:
    """Turn the sign that adds least, with the point that is then best, in the odd rows.

    The point that was best has the cost of 4·h·|w|·g for any turn, and every point at least that of
    the least magnitude. Only turns that may be cheaper by this bound are searched.
    """
    parts, columns = lattice.together // lattice.columns, lattice.columns
    pulls = pull.view(-1, parts, columns)[odd]
    own = 4 * (pulls * each[chosen.view(-1, parts)[odd]]).flatten(1)  # [m, together]
    best, turn = own.min(1)
    point = chosen.view(-1, parts)[odd].gather(1, turn[:, None] // columns).squeeze(1)
    row, column = (4 * lattice.magnitudes[0] * pulls.flatten(1) < best[:, None]).nonzero(
        as_tuple=True
    )
    part = column // columns
    place = odd[row] * parts + part  # in `pull`
    turned = pull[place].clone()
    within = torch.arange(len(row), device=row.device), column % columns
    turned[within] *= -1
    better = torch.full((len(odd), lattice.together), torch.inf, device=pull.device)
    found = torch.zeros_like(better, dtype=torch.int64)
    step = max(1, _SCORES // lattice.points)
    for here in range(0, len(row), step):
        some = slice(here, here + step)
        score, number = _least(torch.cat([bend[place[some]], -2 * turned[some]], 1) @ table)
        better[row[some], column[some]] = score - scores[place[some]]
        found[row[some], column[some]] = number
    least, at = better.min(1)
    wins = least < best
    turn = torch.where(wins, at, turn)
    point = torch.where(wins, found.gather(1, at[:, None]).squeeze(1), point)
    negative[odd, turn] ^= True
    chosen.view(-1, parts)[odd, turn // columns] = point
