"""The damping that each stack finds for itself, on samples that were put aside."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.quantizer.solver.test_descent import linears, output_error, sums_of, two_streams
from vlmq_export.quantizer.calibration.collect import Evidence
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.choice import grid_choice
from vlmq_export.quantizer.layers import damping
from vlmq_export.quantizer.layers.attempt import attempt, prepared
from vlmq_export.quantizer.layers.damping import TIMES, damped_best, lowest, trial
from vlmq_export.quantizer.layers.stack import Stack
from vlmq_export.quantizer.methods import METHODS

CONFIG = QuantConfig(method="exact", bits=4, group_size=16)
EXACT = METHODS["exact"]
FEW, MANY = 60, 20000  # tokens, for 48 inputs


def stack():
    return Stack.of(linears(), grid_choice(CONFIG, "x20", 48))


def evidence(tokens, held=500):
    """Sums of so many tokens, and of others that were put aside."""
    return Evidence(sums_of(*two_streams(tokens)), sums_of(*two_streams(held, seed=1)))


def share(tokens, **options):
    """The damping that is found, in the recipe's."""
    known, _ = damped_best(stack(), evidence(tokens, **options), EXACT, CONFIG)
    return known.hessian.damp / CONFIG.damp


@given(st.permutations(range(len(TIMES))), st.integers(0, len(TIMES) - 1))
def test_the_bottom_of_any_one_valley_is_found(order, bottom):
    left, right = sorted(order[:bottom], reverse=True), sorted(order[bottom:])
    errors = dict(zip(TIMES, [*left, -1, *right[1:]]))
    assert lowest(errors.__getitem__) == TIMES[bottom]


def test_errors_that_are_no_numbers_leave_the_recipes_damping():
    assert lowest(lambda _: float("nan")) == 1


def test_few_tokens_are_damped_more_than_many():
    assert share(FEW) >= 10
    assert share(MANY) <= 1


def test_it_is_the_best_on_the_outputs_put_aside():
    """The sums alone are compared by the search, and here the outputs themselves, in float64."""
    found = evidence(FEW)
    x, full = two_streams(500, seed=1)
    rows, errors = stack(), {}
    for times in TIMES:
        config = replace(CONFIG, damp=times * CONFIG.damp)
        parts = attempt(rows, prepared(rows, found.fitted, config), found.held, EXACT, config)
        pairs = zip(parts, rows.split(rows.weights))
        errors[times] = sum(output_error(part.solution, x, w, full) for part, w in pairs)
    assert share(FEW) == pytest.approx(min(errors, key=errors.__getitem__))


def test_it_errs_less_on_samples_that_nothing_has_seen():
    x, full = two_streams(2000, seed=2)

    def error(method):
        found = evidence(FEW, held=20)
        if method.damping == "held-out":
            _, parts = damped_best(stack(), found, method, CONFIG)
        else:
            parts = attempt(
                stack(), prepared(stack(), found.everything, CONFIG), None, method, CONFIG
            )
        pairs = zip(parts, stack().split(stack().weights))
        return sum(output_error(part.solution, x, w, full) for part, w in pairs)

    assert error(EXACT) < 0.9 * error(replace(EXACT, damping="recipe"))


def test_where_nothing_was_put_aside_it_is_the_recipes():
    empty = Statistics.empty(48, drift=True).to_float32()
    known, parts = damped_best(stack(), Evidence(evidence(FEW).fitted, empty), EXACT, CONFIG)
    plain = attempt(stack(), prepared(stack(), known.sums, CONFIG), None, EXACT, CONFIG)
    assert known.hessian.damp == CONFIG.damp
    for part, other in zip(parts, plain):
        assert torch.equal(part.solution.codes, other.solution.codes)


def test_all_samples_are_solved_with_unless_tuning_follows():
    found = evidence(FEW)
    known, _ = damped_best(stack(), found, EXACT, CONFIG)
    assert known.sums.tokens == FEW + 500
    known, _ = damped_best(stack(), found, replace(EXACT, tuned=True), CONFIG)
    assert known.sums.tokens == FEW


@pytest.mark.parametrize("tokens", [FEW, 300, MANY])
def test_a_trial_chooses_as_the_whole_method_does(monkeypatch, tokens):
    found = share(tokens)
    monkeypatch.setattr(damping, "trial", lambda method, _: method)
    assert share(tokens) == pytest.approx(found)


def test_a_trial_takes_every_sweep_on_the_lattices_of_2_bits_alone():
    sweeps = {name: trial(EXACT, grid).refine.sweeps for name, grid in GRIDS.items()}
    assert {name for name, count in sweeps.items() if count == 3} == {"IQ2_XXS", "IQ2_XS", "IQ2_S"}
    assert {*sweeps.values()} == {1, 3}
    affine = grid_choice(CONFIG, "x20", 48).grid
    assert trial(EXACT, affine).refine.sweeps == 1 and not trial(EXACT, affine).neighbours
    assert trial(METHODS["gptaq-exact"], affine).refine.sweeps == 0


def test_some_rows_choose_for_all_of_them(monkeypatch):
    every = share(FEW)
    monkeypatch.setattr(damping, "ROWS", 8)
    assert share(FEW) == pytest.approx(every)
    assert damping._one_matrix(stack(), 4).sizes == [8]
