"""Latents of codes and scales: their gradients, and the storage grid that they come back to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.solver.nearest import round_to_nearest
from vlmq_export.quantizer.solver.straight_through import Latents, decoded

GRIDS = [Affine(2), Affine(3), Affine(4, portable=True), Affine(3, symmetric=True)]


def latents(grid: Affine, seed: int, spread: float = 0.0) -> Latents:
    """Those of a random matrix, moved by about `spread` codes and by as much of a scale."""
    generator = torch.Generator().manual_seed(seed)
    start = round_to_nearest(torch.randn(6, 64, generator=generator), grid, group=16)
    found = Latents.of(start, grid)
    with torch.no_grad():
        for moved in (found.codes, found.logs):
            moved += spread * torch.randn(moved.shape, generator=generator)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_latents_that_have_not_moved_are_the_solution_to_the_bit(grid):
    found = latents(grid, 0)
    back = found.solution()
    for part in ("codes", "scales", "zero_points", "g_idx"):
        assert torch.equal(getattr(back, part), getattr(found.start, part))
    assert torch.equal(found.weights().detach(), found.start.decode())


@given(st.sampled_from(GRIDS), st.integers(0, 2**20), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_whatever_moved_is_stored_on_the_grid(grid, seed, spread):
    found = latents(grid, seed, spread)
    back = found.solution()
    scales = back.scales.float()
    assert back.out_of_range(grid.bits) == ""
    assert bool((scales > 0).all())
    # What is on the grid is stored as it is, so that GGUF's and ONNX's copies decode alike.
    assert torch.equal(grid.storable(scales), scales)
    assert torch.equal(back.zero_points, found.start.zero_points)


def slow_gradients(found: Latents, upstream: torch.Tensor, step: float = 1e-6):
    """Of Σ upstream·s·(c(u) − z), float64, by central differences.

    c(u) = round(u) + (u − u₀) inside of the codes and clamp(round(u)) outside: the function whose
    derivative the straight-through estimator takes.
    """
    top, zeros = found.grid.top, found.start.zero_points.double()
    u, s = found.codes.detach().double(), found.start.scales.double() * found.logs.detach().exp()
    inside = (u >= -0.5) & (u <= top + 0.5)

    def value(moved: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        codes = u.round().clamp(0, top) + torch.where(inside, moved - u, 0.0)
        return (
            upstream.double()
            * scales.repeat_interleave(16, 1)
            * (codes - zeros.repeat_interleave(16, 1))
        )

    # Every weight has a latent of its own, so that all of them are moved at once.
    by_code = (value(u + step, s) - value(u - step, s)) / (2 * step)
    by_scale = (value(u, s + step) - value(u, s - step)) / (2 * step)
    return by_code, by_scale.view(*s.shape, -1).sum(-1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_those_of_finite_differences(grid):
    found = latents(grid, 1, spread=0.8)
    scales = (found.start.scales.float() * found.logs.detach().exp()).requires_grad_()
    upstream = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    zeros = found.start.zero_points.float()
    (decoded(found.codes, scales, zeros, grid.top) * upstream).sum().backward()
    by_code, by_scale = slow_gradients(found, upstream)
    assert bool((by_code == 0).any()) or grid.bits == 4  # some latents lie outside of the codes
    torch.testing.assert_close(found.codes.grad.double(), by_code, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scales.grad.double(), by_scale, rtol=1e-4, atol=1e-5)
