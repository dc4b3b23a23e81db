"""The scales of least error: against gradients in float64 and other scales, and their limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.choice import GridChoice
from vlmq_export.quantizer.layers.scaling.channel_scales import (
    OCTAVES,
    Reader,
    least_error_scales,
)
from vlmq_export.quantizer.solver.hessian import pivots, prepare

IN = 64


def reader(seed=0, group=32, top=3, block=0, out=48, spread=2.0):
    """Weights, pivots and energies whose channels are uneven."""
    g = torch.Generator().manual_seed(seed)
    uneven = [torch.randn(IN, generator=g).mul(spread).exp2() for _ in range(3)]
    weights = torch.randn(out, IN, generator=g) * uneven[0]
    return Reader(weights, uneven[1], uneven[1] + uneven[2], group, top, block)


def error(reader: Reader, octaves: torch.Tensor) -> torch.Tensor:
    """E(s) as docs/methods.md §4.4 has it, float64, for log2 s."""
    s = octaves.exp2()
    size = (reader.weights.double() * s).abs().view(-1, IN // reader.group, reader.group)
    ranges = size.pow(4).mean(2).sqrt().sum(0)
    left = (reader.pivots.double() / s.square()).view(-1, reader.group).sum(1)
    total = (4 * 2.2 / reader.top**2 * left * ranges).sum()
    if reader.block:
        own = (reader.energy.double() / s.square()).view(-1, reader.block)
        peak = 4.0 / 127**2 * own.pow(4).sum(1).pow(1 / 4)
        carried = (reader.weights.double().square().sum(0) * s.square()).view(-1, reader.block)
        total = total + (peak * carried.sum(1)).sum()
    return total


@pytest.mark.parametrize("block", [0, 32])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), group=st.sampled_from([16, 32, 64]))
def test_slopes_are_the_gradient(seed, group, block):
    """d E/d ln s is twice what rises less what falls, and both sum up to E."""
    one = reader(seed, group, block=block)
    octaves = torch.randn(IN, generator=torch.Generator().manual_seed(seed)).double()
    octaves.requires_grad_()
    value = error(one, octaves)
    (gradient,) = torch.autograd.grad(value, octaves)
    falls, rises = one.slopes(octaves.detach().exp2().float())
    found = 2 * (rises - falls) * torch.log(torch.tensor(2.0))
    atol = 1e-4 * float(gradient.abs().max())
    torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=atol)
    assert float(falls.sum()) == pytest.approx(float(value.detach()), rel=1e-4)
    assert float(rises.sum()) == pytest.approx(float(value.detach()), rel=1e-4)


@pytest.mark.parametrize("block", [0, 32])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_scales_near_them_or_far_away_leave_less(seed, block):
    one, g = reader(seed, block=block), torch.Generator().manual_seed(seed)
    best = least_error_scales([one]).log2().double()
    least = float(error(one, best))
    assert least <= float(error(one, torch.zeros(IN)))
    for size in (0.05, 0.5, 2.0):
        other = best + size * torch.randn(IN, generator=g)
        assert least <= float(error(one, other)) * (1 + 1e-3)
    magnitudes = one.energy.log2().double() / 2
    for power in (0.25, 0.5, 1.0):
        assert least <= float(error(one, power * (magnitudes - magnitudes.mean())))


def test_a_group_that_is_scaled_alike_changes_nothing():
    one = reader(block=0, group=16)
    steps = torch.arange(4.0).repeat_interleave(16)
    assert float(error(one, steps)) == pytest.approx(float(error(one, torch.zeros(IN))))


def test_several_readers_count_by_their_share():
    """A reader of a thousandfold the weights has no more to say than another."""
    one, other = reader(1), reader(2)
    loud = Reader(1e3 * other.weights, other.pivots, other.energy, other.group, other.top)
    torch.testing.assert_close(
        least_error_scales([one, other]), least_error_scales([one, loud]), rtol=1e-3, atol=0
    )
    own = [least_error_scales([each]).log2() for each in (one, other)]
    both = least_error_scales([one, other]).log2()
    assert all((both - mine).abs().mean() < (own[0] - own[1]).abs().mean() for mine in own)


def test_what_nothing_tells_of_stays_as_it_is():
    one = reader()
    one.weights[:, 3], one.pivots[5] = 0.0, 0.0
    scale = least_error_scales([one])
    assert scale[3] == scale[5] == 1
    live = torch.ones(IN, dtype=torch.bool)
    live[[3, 5]] = False
    assert float(scale[live].log2().mean()) == pytest.approx(0, abs=1e-5)
    silent = Reader(one.weights, torch.zeros(IN), torch.zeros(IN), 32, 3)
    assert torch.equal(least_error_scales([silent]), torch.ones(IN))


def test_scales_stay_within_their_octaves():
    one = reader(spread=8.0)
    scale = least_error_scales([one]).log2()
    assert float(scale.abs().max()) == OCTAVES


@pytest.mark.parametrize("order", ["gar", "off", "static"])
def test_pivots_are_those_of_the_solver(order):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, IN, generator=g) * torch.rand(IN, generator=g).mul(3).exp()
    x[:, 7] = 0
    a, options = x.T @ x, {"group": 16, "act_order": order, "damp": 0.01}
    own = pivots(a.double(), x.square().sum(0), **options)
    hessian = prepare(a, x.square().sum(0), **options)
    theirs = torch.empty(IN)
    theirs[hessian.order] = hessian.pivots
    theirs[7] = 0
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=0)
    assert not pivots(-a, x.square().sum(0), **options).any()


def test_pivots_fall_as_squares_of_scales():
    """Which is why scales can be chosen before anything is factorized again."""
    g = torch.Generator().manual_seed(0)
    x, s = torch.randn(200, IN, generator=g), torch.randn(IN, generator=g).exp2()
    options = {"group": 16, "act_order": "off", "damp": 1e-6}
    before, after = (pivots(y.T @ y, y.square().sum(0), **options) for y in (x, x / s))
    torch.testing.assert_close(after, before / s.square(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("kind", "stepped", "inputs"), [("Q2_K", 16, 256), ("Q4_K", 32, 256), ("Q4_0", 32, 32)]
)
def test_block_types_say_what_shares_a_step_and_what_is_rounded(kind, stepped, inputs):
    grid = GRIDS[kind]
    choice = GridChoice(grid, grid.block, 128, "gar")
    assert (choice.stepped, choice.rounded_inputs) == (stepped, inputs)
