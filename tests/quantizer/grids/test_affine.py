"""Affine grids: what every reader of the codes, scales and zero-points relies on."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.oracle import fit_group, nearest
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.affine import Affine, grid_for

# The largest rounding error in steps, by bits: ½ plus (2^bits − 1)·2⁻¹¹, since the scale is rounded
# to float16.
HALF_STEP = {2: 0.502, 3: 0.504, 4: 0.508, 8: 0.625}
GRIDS = [Affine(b, s) for b in (2, 3, 4, 8) for s in (False, True)] + [Affine(4, portable=True)]
finite = st.floats(-60000, 60000, width=32)
groups = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=finite)
exponents = st.integers(-40, 12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(groups, exponents)
@settings(max_examples=150, deadline=None)
def test_properties_of_any_group(grid, values, exponent):
    w = torch.from_numpy(values / 60000 * 2.0**exponent).float()
    scale, zero = grid.fit(w)
    assert torch.equal(scale, scale.half().float())
    assert bool((scale > 0).all())
    codes = grid.encode(w, scale[:, None], zero[:, None])
    assert torch.equal(codes, codes.round())
    assert int(codes.min()) >= 0 and int(codes.max()) <= grid.top
    if grid.symmetric:
        assert bool((zero == 2 ** (grid.bits - 1)).all())
    else:
        assert int(zero.min()) >= 1 and int(zero.max()) <= grid.top
    # 0 is on the grid, and no weight is further off than half a step and the scale's rounding.
    assert bool((grid.encode(torch.zeros_like(scale), scale, zero) == zero).all())
    error = (grid.decode(codes, scale[:, None], zero[:, None]) - w).abs()
    assert bool((error <= scale[:, None] * HALF_STEP[grid.bits]).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(hnp.arrays(np.float64, 24, elements=st.floats(-1, 1).map(lambda v: round(v, 4))))
@settings(max_examples=60, deadline=None)
def test_equals_the_reference(grid, values):
    w = torch.from_numpy(values).float()
    scale, zero = grid.fit(w[None])
    s, z = fit_group(w.double().numpy(), grid.bits, grid.symmetric, grid.portable)
    assume(s > 2.0**-14)  # smaller scales are subnormal and rounded up: test_zeros_tiny_and_huge
    # float32 and float64 may fall on two sides of a tie of float16.
    assert float(scale) == pytest.approx(s, rel=2.0**-6 if grid.portable else 2.0**-10)
    if float(scale) == s and abs((-min(values.min(), 0) / s) % 1 - 0.5) > 1e-4:
        assert int(zero) == z
        for value, code in zip(w.double().tolist(), grid.encode(w, scale, zero).tolist()):
            assert int(code) == nearest(value, s, z, grid.bits) or abs((value / s) % 1 - 0.5) < 1e-4


@given(hnp.arrays(np.float32, 32, elements=st.floats(-1, 1, width=32)), st.sampled_from(GRIDS))
@settings(max_examples=100, deadline=None)
def test_weights_on_the_grid_are_found_again(values, grid):
    scale, zero = grid.fit(torch.from_numpy(values))
    codes = torch.arange(grid.top + 1).float()
    assert torch.equal(grid.encode(grid.decode(codes, scale, zero), scale, zero), codes)


def test_portable_products_are_exact_for_every_scale():
    """Every positive float16 as the scale asked for, and every zero-point from 1 to 15.

    For the scale s that is stored, s·z is a float16. Scales beyond 4352 have no such products at
    15: they are stored as they are, so that no weight is clipped.
    """
    bits = torch.arange(1, 0x7C00, dtype=torch.int32)
    scale = Affine(4, portable=True).storable(bits.to(torch.int16).view(torch.float16).float())
    assert torch.equal(scale, scale.half().float())
    asked = bits.to(torch.int16).view(torch.float16).float()
    assert torch.equal(scale[asked > 4352], asked[asked > 4352])
    for zero in range(1, 16):
        product = scale[asked <= 4352] * zero
        assert bool(torch.isfinite(product.half()).all())
        assert torch.equal(product.half().double(), scale[asked <= 4352].double() * zero)
    # Where float16 can hold the products at all, the scale is never smaller than the one asked for
    # and at most 1/64 larger.
    inside = (asked <= 4352) & (asked >= 2.0**-18)
    assert bool((scale >= asked)[asked <= 4352].all())
    assert bool((scale <= asked * (1 + 2.0**-6))[inside].all())


def test_a_plain_scale_is_not_portable():
    """The test above can fail: a float16 scale that is not rounded up has no exact products."""
    scale = Affine(4).storable(torch.tensor([0.0123, 0.0457, 0.1011]))
    assert not torch.equal((scale * 13).half().float(), scale * 13)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_sided_groups(bits):
    grid = Affine(bits)
    positive = torch.linspace(0.2, 1.0, 33)
    for w, expected in ((positive, 1), (-positive, grid.top)):
        scale, zero = grid.fit(w)
        assert int(zero) == expected
        error = (grid.decode(grid.encode(w, scale, zero), scale, zero) - w).abs().max()
        assert float(error) <= HALF_STEP[bits] * float(scale)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_tiny_and_huge(grid):
    for value in (0.0, 1e-30, 3e-8, 1e-6, 6.1e-5, 6e4, 8e4, 9e4):
        w = torch.tensor([-value / 3, 0.0, value])
        scale, zero = grid.fit(w)
        decoded = grid.decode(grid.encode(w, scale, zero), scale, zero)
        assert bool(torch.isfinite(decoded).all()) and float(scale) > 0
        assert float(decoded[1]) == 0
        assert bool(((decoded - w).abs() <= scale * HALF_STEP[grid.bits]).all())


def test_batched_equals_one_by_one():
    w = torch.randn(7, 5, 32, generator=torch.Generator().manual_seed(0))
    for grid in GRIDS:
        scale, zero = grid.fit(w)
        along = grid.fit(w.movedim(-1, 0), dim=0)
        assert torch.equal(scale, along[0]) and torch.equal(zero, along[1])
        for r in range(7):
            for g in range(5):
                s, z = grid.fit(w[r, g])
                assert s == scale[r, g] and z == zero[r, g]


def test_which_grids_are_portable():
    assert grid_for(QuantConfig(bits=4, group_size=128), 1024).portable
    assert grid_for(QuantConfig(bits=4, group_size=-1), 896).portable
    assert not grid_for(QuantConfig(bits=4, group_size=-1), 1024).portable
    assert not grid_for(QuantConfig(bits=4, group_size=256), 1024).portable
    assert not grid_for(QuantConfig(bits=4, group_size=128, symmetric=True), 1024).portable
    assert not grid_for(QuantConfig(bits=3, group_size=128), 1024).portable
