"""A, D and the plain sums beside them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.quantizer.statistics import Statistics


def tokens(count=60, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g)
    return x, x + 0.2 * torch.randn(count, width, generator=g), torch.rand(count, generator=g)


def add_all(parts, *, drift=True) -> Statistics:
    sums = Statistics.empty(12, drift=drift)
    for x, full, weight in parts:
        sums.add(x, full, weight)
    return sums


def close(a: Statistics, b: Statistics) -> None:
    for field in ("hessian", "drift", "diagonal"):
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-5, atol=1e-5)
    assert a.tokens == b.tokens
    assert a.weight == pytest.approx(b.weight)
    assert a.weight_squared == pytest.approx(b.weight_squared)


def test_against_the_formula():
    x, full, g = tokens()
    sums = add_all([(x, full, g)])
    a = sum(g[n].double() ** 2 * torch.outer(x[n], x[n]).double() for n in range(60))
    d = sum(g[n].double() ** 2 * torch.outer(full[n] - x[n], x[n]).double() for n in range(60))
    torch.testing.assert_close(sums.hessian.double(), a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.drift.double(), d, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.diagonal, x.square().sum(0).double())
    assert sums.tokens == 60 and sums.weight == pytest.approx(float(g.double().square().sum()))


@given(st.lists(st.integers(1, 59), max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_any_split_in_any_order_is_the_one_shot_sum(cuts, random):
    x, full, g = tokens()
    edges = [0, *sorted(set(cuts)), 60]
    parts = [(x[a:b], full[a:b], g[a:b]) for a, b in pairwise(edges)]
    random.shuffle(parts)
    close(add_all(parts), add_all([(x, full, g)]))


def test_merged_parts_are_the_whole():
    x, full, g = tokens()
    left, right = add_all([(x[:25], full[:25], g[:25])]), add_all([(x[25:], full[25:], g[25:])])
    left.merge(right)
    close(left, add_all([(x, full, g)]))


def test_no_weights_are_ones():
    x, full, _ = tokens()
    close(add_all([(x, full, None)]), add_all([(x, full, torch.ones(60))]))
    assert add_all([(x, full, None)]).effective_tokens == 60


def test_a_token_without_weight_counts_only_for_deadness():
    x, full, _ = tokens()
    x[:, 4] = 0
    x[0, 4] = 1.0  # the only token that excites this input has g = 0
    g = torch.ones(60)
    g[0] = 0
    sums = add_all([(x, full, g)])
    assert sums.hessian[4, 4] == 0 and sums.diagonal[4] > 0
    assert sums.effective_tokens == pytest.approx(59)


def test_equal_streams_do_not_drift():
    x, _, g = tokens()
    assert float(add_all([(x, x, g)]).drift.abs().max()) == 0


def test_one_stream_keeps_no_drift():
    x, _, g = tokens()
    sums = add_all([(x, None, g)], drift=False)
    assert sums.drift is None
    with pytest.raises(ValueError, match="both streams"):
        add_all([(x, None, g)])


def test_half_precision_inputs_are_summed_in_float32():
    x, full, g = tokens()
    sums = add_all([(x.half(), full.half(), g)])
    assert sums.hessian.dtype == sums.drift.dtype == torch.float32
    torch.testing.assert_close(sums.hessian, add_all([(x, full, g)]).hessian, rtol=1e-2, atol=1e-1)


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_batches_changes_no_bit(random):
    """Rounded once from float64; with float32 sums every order gives other last bits."""
    parts = [tokens(30, 24, seed) for seed in range(16)]

    def summed(parts) -> Statistics:
        sums = Statistics.empty(24, drift=True)
        for x, full, weight in parts:
            sums.add(x, full, weight)
        return sums.rounded()

    first = summed(parts)
    random.shuffle(parts)
    second = summed(parts)
    for field in ("hessian", "drift", "diagonal"):
        assert getattr(first, field).dtype == torch.float32
        assert torch.equal(getattr(first, field), getattr(second, field))
