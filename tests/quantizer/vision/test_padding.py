"""Rows whose last group is shorter: the same integers as without the zeros behind them."""

import numpy as np
import pytest
import torch

from tests.oracle import brain_surgeon, fit_group
from tests.quantizer.solver.test_column_loop import SAME, agreement, damped, problem
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.solver import column_loop
from vlmq_export.quantizer.solver.hessian import prepare
from vlmq_export.quantizer.solver.nearest import round_to_nearest
from vlmq_export.quantizer.vision.padding import cut, filled, missing

GROUP = 32


def solved(solution, bits, columns, symmetric=False):
    linear = QuantizedLinear("x", solution, None, bits, GROUP, symmetric)
    return cut((linear, {"dead_columns": 3 + missing(columns)}), columns)


@pytest.mark.parametrize("columns", [84, 66, 95])
def test_the_loop_solves_a_short_last_group_as_the_slow_reference_does(columns):
    w, a, _, diagonal = problem(in_features=columns, seed=columns)
    codes, scales, zeros = brain_surgeon(w.numpy(), damped(a), 3, GROUP)
    known = prepare(
        filled(filled(a).T.contiguous()), filled(diagonal), group=GROUP, act_order="off", damp=0.01
    )
    found = column_loop.solve(filled(w), known, Affine(3), group=GROUP, act_order="off", block=64)
    linear, metrics = solved(found, 3, columns)
    s = linear.solution
    assert s.codes.shape == w.shape and not linear.out_of_range()
    assert agreement(s, codes) >= SAME
    assert (s.scales.numpy() == scales.astype(np.float16)).mean() >= SAME
    assert (s.zero_points.numpy() == zeros).mean() >= SAME
    assert metrics == {"dead_columns": 3}


def test_rounding_to_nearest_fits_a_short_group_on_its_own_columns():
    w = torch.randn(6, 52, generator=torch.Generator().manual_seed(1))
    linear, _ = solved(round_to_nearest(filled(w), Affine(4, True), group=GROUP), 4, 52, True)
    for row in range(6):
        scale, zero = fit_group(w[row, GROUP:].numpy().astype(np.float64), 4, True)
        codes = np.clip(np.round(w[row, GROUP:].numpy() / scale) + zero, 0, 15)
        want = np.float32(scale) * (codes - zero).astype(np.float32)
        assert np.array_equal(linear.decode()[row, GROUP:].numpy(), want)


def test_whole_groups_are_left_as_they_are():
    w = torch.randn(4, 64)
    assert filled(w) is w
    given = solved(round_to_nearest(w, Affine(4), group=GROUP), 4, 64)
    assert cut(given, 64) is given
