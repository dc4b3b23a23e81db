"""The lattices of the I-quants: gguf-py's points, and a search that misses no better one."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.quantizer.grids import lattices
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.lattices import Lattice, nearest

LATTICES = {name: grid.lattice for name, grid in GRIDS.items() if grid.lattice is not None}
# What gguf-py's magnitudes are of ours: its decoders divide by it.
UNIT = {"IQ3_S": 1, "IQ3_XXS": 4, "IQ2_S": 8, "IQ2_XS": 8, "IQ2_XXS": 8}


@pytest.mark.parametrize("name", LATTICES)
def test_points_are_those_of_gguf_py(name):
    lattice, theirs = LATTICES[name], getattr(gguf.quants, name)
    theirs.init_grid()
    places = lattice.grid(torch.device("cpu")).numpy()
    ours = np.array(lattice.magnitudes, np.float32)[places] * UNIT[name]
    assert ours.shape == (lattice.points, lattice.columns) == theirs.grid_shape
    assert np.array_equal(ours, theirs.grid.reshape(theirs.grid_shape))


def least_error(lattice: Lattice, w: np.ndarray, s: float, h: np.ndarray) -> float:
    """Of every point and every allowed choice of signs, in float64. w and h are [together]."""
    magnitudes = np.array(lattice.magnitudes)[lattice.grid(torch.device("cpu")).numpy()]
    parts = []  # for each part the least error with an even and an odd number of negative signs
    for w_part, h_part in zip(w.reshape(-1, lattice.columns), h.reshape(-1, lattice.columns)):
        least = [np.inf, np.inf]
        for signs in itertools.product((1.0, -1.0), repeat=lattice.columns):
            odd = signs.count(-1.0) % 2
            error = (h_part * (w_part - s * magnitudes * signs) ** 2).sum(1).min()
            least[odd] = min(least[odd], error)
        parts.append(least)
    if not lattice.even:
        return sum(min(part) for part in parts)
    chosen = itertools.product((0, 1), repeat=len(parts))
    return min(sum(p[o] for p, o in zip(parts, odd)) for odd in chosen if sum(odd) % 2 == 0)


@pytest.mark.parametrize("name", LATTICES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 2), step=st.floats(0.05, 3))
def test_no_point_and_no_signs_are_nearer(name, seed, spread, step):
    lattice, rng = LATTICES[name], np.random.default_rng(seed)
    w = rng.standard_normal((2, lattice.together)) * np.exp(spread * rng.standard_normal((2, 1)))
    h = np.exp(spread * rng.standard_normal(w.shape))
    w, h, s = w.astype(np.float32), h.astype(np.float32), np.float32(step)
    levels = nearest(lattice, w, np.full(2, s), h)
    assert lattice.holds(GRIDS[name].codes(torch.from_numpy(levels))).all()
    found = s.astype(np.float64) * levels
    for row in range(2):
        error = (h[row].astype(np.float64) * (w[row] - found[row]) ** 2).sum()
        least = least_error(lattice, w[row].astype(np.float64), float(s), h[row].astype(np.float64))
        assert error <= least * (1 + 1e-4) + 1e-6 * float((h[row] * w[row] ** 2).sum())


def drawn(lattice: Lattice, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, scales and column weights of some rows."""
    draw = np.random.default_rng(0)
    w = draw.standard_normal((rows, lattice.together))
    s, h = draw.random(rows) / 3 + 0.1, draw.random(w.shape) + 0.1
    return w.astype(np.float32), s.astype(np.float32), h.astype(np.float32)


@pytest.mark.parametrize("name", LATTICES)
def test_searching_in_parts_is_searching_at_once(name, monkeypatch):
    lattice, given = LATTICES[name], drawn(LATTICES[name], 64)
    whole = nearest(lattice, *given)
    monkeypatch.setattr(lattices, "_CACHED", 5 * lattice.points)
    assert np.array_equal(nearest(lattice, *given), whole)


@pytest.mark.parametrize("name", LATTICES)
def test_a_device_finds_the_points_that_the_host_finds(name, monkeypatch):
    """The same functions on PyTorch's tensors, in parts too."""
    lattice, given = LATTICES[name], drawn(LATTICES[name], 64)
    on_host = nearest(lattice, *given)
    monkeypatch.setattr(lattices, "on_host", lambda tensor: tensor)
    monkeypatch.setattr(lattices, "_SCORES", 5 * lattice.points)
    lattices._tables.cache_clear()
    found = nearest(lattice, *map(torch.from_numpy, given))
    lattices._tables.cache_clear()
    assert torch.equal(found, torch.from_numpy(on_host))


@pytest.mark.parametrize("name", LATTICES)
def test_codes_that_are_no_point_are_seen(name):
    lattice = LATTICES[name]
    codes = GRIDS[name].codes(torch.from_numpy(nearest(lattice, *drawn(lattice, 16))))
    assert lattice.holds(codes).all()
    if lattice.even:
        turned = codes.clone()
        turned[:, 0] = len(lattice.levels) - 1 - turned[:, 0]
        assert not lattice.holds(turned).any()
    # Every combination of magnitudes is a point in none of the types.
    top = len(lattice.magnitudes)
    places = torch.tensor(list(itertools.product(range(top), repeat=4)))
    places = places.repeat(1, lattice.together // 4) + top
    assert not lattice.holds(places).all()
