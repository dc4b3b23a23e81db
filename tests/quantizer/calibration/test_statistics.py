"""The sums of a linear's inputs: A, D, Σx², and the sums of the token weights."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.quantizer.calibration import statistics
from vlmq_export.quantizer.calibration.statistics import Statistics, outputs_apart, tf32

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tokens(count=60, width=12, seed=0):
    """(x, x̃, g) of `count` tokens."""
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
    torch.testing.assert_close(a.moments, b.moments)


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
    close(left.plus(right), add_all([(x, full, g)]))


def test_no_weights_are_ones():
    x, full, _ = tokens()
    close(add_all([(x, full, None)]), add_all([(x, full, torch.ones(60))]))
    assert add_all([(x, full, None)]).effective_tokens == 60


def test_a_token_without_weight_counts_only_for_deadness():
    x, full, _ = tokens()
    x[:, 4] = 0
    x[0, 4] = 1.0  # token 0 alone excites input 4, and its g is 0
    g = torch.ones(60)
    g[0] = 0
    sums = add_all([(x, full, g)])
    assert sums.hessian[4, 4] == 0 and sums.diagonal[4] > 0
    assert sums.effective_tokens == pytest.approx(59)


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_what_outputs_should_make_up_for_is_weights_times_drift(seed):
    x, full, g = tokens(seed=seed)
    weights = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    square, few = Statistics.empty(12, drift=True), Statistics.empty(12, drift=False, pull=5)
    square.add(x, full, g)
    few.add(x, full, g, pull=outputs_apart(weights, x, full))
    assert few.drift is None and few.two_streams and square.two_streams
    d = sum(g[n].double() ** 2 * torch.outer(full[n] - x[n], x[n]).double() for n in range(60))
    for sums in (square.to_float32(), few.to_float32()):
        torch.testing.assert_close(sums.mismatch(weights).double(), weights.double() @ d, **CLOSE)
    rounded = weights.round()
    assert few.error(rounded, weights) == pytest.approx(square.error(rounded, weights), rel=1e-4)
    with pytest.raises(ValueError, match="should make up for"):
        few.add(x, full, g)


def test_without_a_second_stream_the_error_is_that_of_the_outputs_alone():
    x, _, g = tokens()
    weights = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    sums = add_all([(x, None, g)], drift=False).to_float32()
    change = weights.round() - weights
    want = float(((x @ change.T) * g[:, None]).double().square().sum())
    assert sums.error(weights.round(), weights) == pytest.approx(want, rel=1e-4)
    with pytest.raises(ValueError, match="one stream only"):
        sums.mismatch(weights)


def test_equal_streams_do_not_drift():
    x, _, g = tokens()
    assert float(add_all([(x, x, g)]).drift.abs().max()) == 0


def test_one_stream_keeps_no_drift():
    x, _, g = tokens()
    sums = add_all([(x, None, g)], drift=False)
    assert sums.drift is None
    with pytest.raises(ValueError, match="both streams"):
        add_all([(x, None, g)])


@pytest.mark.parametrize(
    ("precision", "bits"), [("float32", 22), ("tf32", 11), ("bf16", 8), ("bf16x3", 15)]
)
def test_precision_of_products(precision, bits):
    """The error of A_ij, relative to √(A_ii·A_jj), is that of the factors' significant bits.

    A stays positive definite.
    """
    x, full, g = tokens(2000, 40)
    x = x * torch.linspace(-12, 12, 40).exp2()
    full = full * torch.linspace(-12, 12, 40).exp2()
    sums = Statistics.empty(40, drift=True, precision=precision)
    sums.add(x, full, g)
    w = (x * g[:, None]).double()
    scale = w.norm(dim=0)
    error = (sums.hessian.double() - w.T @ w) / scale / scale[:, None]
    assert float(error.abs().max()) < 2.0 ** (1 - bits)
    delta = ((full - x) * g[:, None]).double()
    error = (sums.drift.double() - delta.T @ w) / scale / delta.norm(dim=0)[:, None]
    assert float(error.abs().max()) < 2.0 ** (1 - bits)
    assert float(torch.linalg.eigvalsh(sums.hessian.double() / scale / scale[:, None]).min()) > 0


def test_tf32_rounds_to_nearest_even():
    one = 1.0 + 2.0**-10
    inf, huge = float("inf"), tf32(torch.tensor([3e38])).item()
    x = [1.0, one, 1.0 + 2.0**-11, one + 2.0**-11, -one - 2.0**-12, 3e38, 0.0, inf]
    expected = [1.0, one, 1.0, 1.0 + 2.0**-9, -one, huge, 0.0, inf]
    assert torch.equal(tf32(torch.tensor(x)), torch.tensor(expected))


@pytest.mark.parametrize("width", [5, 16, 17, 40])
def test_only_the_upper_bands_are_summed(monkeypatch, width):
    monkeypatch.setattr(statistics, "_BAND", 16)
    x, full, g = tokens(60, width)
    sums = Statistics.empty(width, drift=True)
    sums.add(x, full, g)
    half = sums.hessian.clone()
    assert torch.equal(half, half.T) or width <= 16
    sums.add(x, full, g)  # reading A in between changes nothing
    weighted = x * g[:, None]
    torch.testing.assert_close(sums.hessian.float(), 2 * weighted.T @ weighted)
    torch.testing.assert_close(sums.drift.float(), 2 * ((full - x) * g[:, None]).T @ weighted)


@pytest.mark.parametrize("read_at", [(), (0,), (1,), (0, 1, 2)])
def test_a_sum_that_was_read_before_it_was_whole_is_mirrored_again(read_at, monkeypatch):
    monkeypatch.setattr(statistics, "_BAND", 5)
    x, full, g = tokens()
    sums, other = Statistics.empty(12, drift=True), add_all([(x[40:], full[40:], g[40:])])
    for i, part in enumerate((slice(0, 20), slice(20, 40))):
        sums.add(x[part], full[part], g[part])
        if i in read_at:
            sums.hessian  # noqa: B018
    if 2 in read_at:
        other.hessian  # noqa: B018
    sums = sums.plus(other)
    weighted = (x * g[:, None]).double()
    torch.testing.assert_close(sums.hessian, weighted.T @ weighted, rtol=1e-5, atol=1e-5)
    assert torch.equal(sums.hessian[5:10, :5], sums.hessian[:5, 5:10].T)


def test_half_precision_inputs_are_multiplied_in_float32_and_summed_in_float64():
    x, full, g = tokens()
    sums = add_all([(x.half(), full.half(), g)])
    assert sums.hessian.dtype == sums.drift.dtype == torch.float64
    torch.testing.assert_close(sums.hessian, add_all([(x, full, g)]).hessian, rtol=1e-2, atol=1e-1)


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_batches_changes_no_bit(random):
    """Sums in float64 are rounded to float32 once. Sums in float32 would depend on the order."""
    parts = [tokens(30, 24, seed) for seed in range(16)]

    def summed(parts) -> Statistics:
        sums = Statistics.empty(24, drift=True)
        for x, full, weight in parts:
            sums.add(x, full, weight)
        return sums.to_float32()

    first = summed(parts)
    random.shuffle(parts)
    second = summed(parts)
    for field in ("hessian", "drift", "diagonal"):
        assert getattr(first, field).dtype == torch.float32
        assert torch.equal(getattr(first, field), getattr(second, field))
