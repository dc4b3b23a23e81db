"""What follows the column loop, against brute force in float64, and the choices made on samples put aside."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.test_solver import SAME, damped, problem
from vlmq_export.quantizer import ranges, refine, solver
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.importance import floored, normalized
from vlmq_export.quantizer.kquants import GRIDS
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.solving import Stack
from vlmq_export.quantizer.statistics import Statistics


def solved(w, a, diagonal, bits=2, group=32, act_order="gar"):
    hessian = solver.prepare(a, diagonal, group=group, act_order=act_order, damp=0.01)
    return hessian, solver.solve(w, hessian, Affine(bits), group=group, act_order=act_order, block=128)


def loss(solution, target, a) -> np.ndarray:
    """(ŵ − t)·A·(ŵ − t)ᵀ of each row, float64, under the damped A."""
    error = solution.decode().double().numpy() - target.double().numpy()
    return ((error @ damped(a)) * error).sum(1)


def slow_sweep(codes, scales, zeros, target, a, bits, group):
    """One sweep in float64: a row, then a column at a time, the gradient formed anew for each."""
    codes = codes.astype(np.float64).copy()
    for r, j in itertools.product(range(len(codes)), range(codes.shape[1])):
        s, z = np.repeat(scales[r], group), np.repeat(zeros[r], group)
        error = s * (codes[r] - z) - target[r]
        best = s[j] * (codes[r, j] - z[j]) - a[j] @ error / a[j, j]
        codes[r, j] = np.clip(np.round(best / s[j]) + z[j], 0, 2**bits - 1)
    return codes


@pytest.mark.parametrize(("bits", "group", "act_order"), [(2, 32, "off"), (3, 96, "gar"), (2, 96, "static")])
def test_sweeps_equal_the_slow_ones(bits, group, act_order):
    w, a, _, diagonal = problem(out_features=12, seed=bits)
    hessian, start = solved(w, a, diagonal, bits, group, act_order)
    codes = start.codes.numpy()
    arguments = (
        start.scales.double().numpy(),
        start.zero_points.double().numpy(),
        w.double().numpy(),
        damped(a),
        bits,
        group,
    )
    for sweeps in (1, 2):
        codes = slow_sweep(codes, *arguments)
        ours = refine.descend(start, w, hessian, Affine(bits), sweeps=sweeps)
        assert (ours.codes.numpy() == codes).mean() >= SAME
    assert (codes != start.codes.numpy()).mean() > 0.01, "nothing moved, so the test above proves nothing"


def test_no_single_code_can_be_bettered_in_the_end():
    w, a, _, diagonal = problem(out_features=6, in_features=32)
    hessian, start = solved(w, a, diagonal, 2, 16)
    end = refine.descend(start, w, hessian, Affine(2), sweeps=50)
    final = loss(end, w, a)
    for j, change in itertools.product(range(32), (-1, 1)):
        codes = (end.codes.int()).clone()
        codes[:, j] = (codes[:, j] + change).clamp(0, 3)
        other = solver.Solution(codes.to(torch.uint8), end.scales, end.zero_points, end.g_idx)
        assert (loss(other, w, a) >= final * (1 - 1e-5)).all()


@given(st.integers(0, 1000), st.sampled_from([2, 3, 4]), st.sampled_from([16, 48]), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_loss_of_every_row_falls_or_stays(seed, bits, group, refit, dynamic):
    w, a, _, diagonal = problem(out_features=7, in_features=48, tokens=60, seed=seed)
    act_order = "dynamic" if dynamic else "gar"
    hessian, start = solved(w, a, diagonal, bits, group, act_order)
    grid = Affine(bits, portable=bits == 4)
    if bits == 4:
        start = solver.solve(w, hessian, grid, group=group, act_order=act_order, block=128)
    before = loss(start, w, a)
    for sweeps in (1, 3):
        end = refine.descend(start, w, hessian, grid, sweeps=sweeps, refit=refit)
        assert (loss(end, w, a) <= before * (1 + 1e-4) + 1e-9).all()
    assert torch.equal(end.zero_points, start.zero_points) and torch.equal(end.g_idx, start.g_idx)
    assert int(end.codes.max()) < 2**bits
    if bits == 4:  # still portable: s·z is a float16
        product = end.scales.float() * end.zero_points.float()
        assert torch.equal(product, product.half().float())


def test_refitted_scales_reach_least_squares():
    """With so many codes that rounding to storage is the only loss, a scale is ⟨z, A·t⟩/⟨z, A·z⟩."""
    w, a, _, diagonal = problem(out_features=5, in_features=32)
    hessian, start = solved(w, a, diagonal, 3, 32)
    state = refine.Descent(start, w, refine.damped(hessian), Affine(3))
    state.refit()
    steps = start.codes.double().numpy() - start.zero_points.double().numpy()
    best = (steps * (w.double().numpy() @ damped(a))).sum(1) / ((steps @ damped(a)) * steps).sum(1)
    np.testing.assert_allclose(state.solution().scales[:, 0].double().numpy(), best, rtol=2.0**-10)
    assert (loss(state.solution(), w, a) < loss(start, w, a)).all()


def test_block_types_descend_too():
    w, a, _, diagonal = problem(out_features=8, in_features=256, tokens=600)
    grid = GRIDS["Q2_K"]
    hessian = solver.prepare(a, diagonal, group=grid.block, act_order="gar", damp=0.01)
    start = solver.solve_blocks(w, hessian, grid, block=128)
    end = refine.descend(start, w, hessian, sweeps=3, refit=True)
    assert loss(end, w, a).sum() < 0.95 * loss(start, w, a).sum()
    assert torch.equal(end.params.d, start.params.d) and int(end.codes.max()) <= grid.top


def test_dead_columns_and_a_hopeless_hessian_are_left_alone():
    w, a, _, diagonal = problem()
    dead = [3, 40, 95]
    a[dead], a[:, dead], diagonal[dead] = 0, 0, 0
    hessian, start = solved(w, a, diagonal)
    end = refine.descend(start, w, hessian, Affine(2), sweeps=3, refit=True)
    assert float(end.decode()[:, dead].abs().max()) == 0 and bool(torch.isfinite(end.decode()).all())
    hopeless = solver.prepare(-torch.eye(96), diagonal, group=32, act_order="off", damp=0.01)
    assert refine.descend(start, w, hopeless, Affine(2), sweeps=3) is start


# --- ranges ------------------------------------------------------------------------------------------------------


def test_every_row_takes_the_range_of_least_error_after_the_loop():
    w, a, _, diagonal = problem(out_features=9)
    hessian = solver.prepare(a, diagonal, group=32, act_order="gar", damp=0.01)
    shares = (1.0, 0.9, 0.75, 0.6)

    def solve(target, fit):
        return solver.solve(target, hessian, Affine(2), group=32, act_order="gar", block=128, fit=fit)

    ours = refine.best_range(solve, w, hessian, Affine(2), shares)
    each = [solve(w, lambda part, _columns, c=c: Affine(2).fit(part * c, dim=0)) for c in shares]
    losses = np.stack([[solver.weighted_loss(s.decode()[r], w[r], a) for r in range(9)] for s in each])
    chosen = losses.argmin(0)
    assert len(set(chosen)) > 1
    for r, c in enumerate(chosen):
        assert torch.equal(ours.codes[r], each[c].codes[r]) and torch.equal(ours.scales[r], each[c].scales[r])


def test_zero_points_next_to_a_range_are_tried_with_every_share():
    """Each row as good as the best of all pairs tried one by one, and better than without the neighbours somewhere."""
    w, a, _, diagonal = problem(out_features=9)
    hessian = solver.prepare(a, diagonal, group=32, act_order="gar", damp=0.01)

    def solve(target, fit):
        return solver.solve(target, hessian, Affine(2), group=32, act_order="gar", block=128, fit=fit)

    def moved(part, _columns, share, move):
        scale, zero = Affine(2).fit(part * share, dim=0)
        return scale, (zero + move).clamp(1, 3)

    def losses(solution):
        return np.array([solver.weighted_loss(solution.decode()[r], w[r], a) for r in range(9)])

    shares, moves = (1.0, 0.8), ranges.NEIGHBOURS
    ours = losses(refine.best_range(solve, w, hessian, Affine(2), shares, moves))
    pairs = itertools.product(shares, moves)
    each = [losses(solve(w, lambda p, c, pair=pair: moved(p, c, *pair))) for pair in pairs]
    np.testing.assert_allclose(ours, np.min(each, 0), rtol=1e-5)
    alone = losses(refine.best_range(solve, w, hessian, Affine(2), shares))
    assert (ours <= alone * (1 + 1e-5)).all() and (ours < 0.999 * alone).any()


@given(st.integers(0, 500), st.sampled_from([2, 3]))
@settings(max_examples=20, deadline=None)
def test_a_search_with_neighbours_errs_no_more_before_the_loop(seed, bits):
    g = torch.Generator().manual_seed(seed)
    weights, weigh, grid = torch.randn(24, 5, generator=g), torch.rand(24, generator=g), Affine(bits)

    def error(moves):
        scale, zero = ranges.search(grid, weights, weigh, moves=moves)
        assert bool(((zero >= 1) & (zero <= grid.top)).all())
        return (
            (grid.decode(grid.encode(weights, scale, zero), scale, zero) - weights).square().mul(weigh[:, None]).sum(0)
        )

    assert bool((error(ranges.NEIGHBOURS) <= error((0,)) * (1 + 1e-5)).all())


# --- choices on samples put aside --------------------------------------------------------------------------------


def two_streams(tokens, width=48, seed=0, drift=0.4):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5 + 0.4 * torch.eye(width)
    lean = torch.randn(width, width, generator=torch.Generator().manual_seed(98)) / width**0.5
    x = torch.randn(tokens, width, generator=g) @ mix
    return x, x + drift * (0.5 * x @ lean + torch.randn(tokens, width, generator=g))


def sums_of(x, full, residual=None) -> Statistics:
    sums = Statistics.empty(x.shape[1], drift=True, residual=0 if residual is None else residual.shape[1])
    sums.add(x, full, residual=residual)
    return sums.rounded()


def stack(sums, held, modules=None, **options) -> Stack:
    torch.manual_seed(0)
    modules = modules or [nn.Linear(48, n, bias=False).requires_grad_(False) for n in (20, 12)]
    return Stack(modules, sums, held, QuantConfig(bits=2, group_size=16, **options), "")


def test_error_on_tokens_put_aside_is_that_of_the_output():
    """From A, D and R alone, but for the constant: differences between candidates are exact."""
    x, full = two_streams(200)
    g = torch.Generator().manual_seed(1)
    w, behind = torch.randn(9, 48, generator=g), torch.randn(200, 9, generator=g)
    sums = sums_of(x, full, behind)
    candidates = [w + 0.1 * torch.randn(9, 48, generator=g) for _ in range(4)]
    true = [
        float((c.double() @ x.T.double() - w.double() @ full.T.double() - behind.T).square().sum()) for c in candidates
    ]
    ours = [sums.error(c, w) for c in candidates]
    np.testing.assert_allclose(np.diff(ours), np.diff(true), rtol=1e-3)


def test_share_of_the_shift_is_the_best_one_for_tokens_put_aside():
    """α in closed form against a grid search over the tokens, each linear its own."""
    (x, full), (hx, hfull) = two_streams(120), two_streams(80, seed=1)
    s = stack(sums_of(x, full), sums_of(hx, hfull))
    s.solved(METHODS["exact-held"])
    for ours, w, shift in zip(s._shares(), s.weights.split(s.sizes), s.shift.split(s.sizes)):
        grid = np.linspace(0, 1, 1001)
        error = [float(((w + a * shift) @ hx.T - w @ hfull.T).double().square().sum()) for a in grid]
        assert ours == pytest.approx(grid[int(np.argmin(error))], abs=2e-3)
        assert 0.05 < ours < 0.95


def test_streams_that_do_not_drift_or_have_no_held_samples_leave_the_weights():
    x, _ = two_streams(120)
    s = stack(sums_of(x, x), sums_of(x[:40], x[:40]))
    s.solved(METHODS["exact-held"])
    assert s._shares() == [0.0, 0.0]
    x, full = two_streams(120)
    s = stack(sums_of(x, full), Statistics.empty(48, drift=True).rounded())
    s.solved(METHODS["exact-held"])
    assert s._shares() == [0.0, 0.0]


def test_auto_is_never_worse_than_gptq_on_what_is_put_aside():
    better = 0
    for seed in range(6):
        (x, full), (hx, hfull) = two_streams(150, seed=seed), two_streams(60, seed=seed + 50)
        gptq = stack(sums_of(x, full), sums_of(hx, hfull)).solved(METHODS["gptq"])
        s = stack(sums_of(x, full), sums_of(hx, hfull))
        auto = s.solved(METHODS["auto"])
        for (ours, metrics), (plain, _), w in zip(auto, gptq, s.weights.split(s.sizes)):
            error, base = (float((p.decode() @ hx.T - w @ hfull.T).double().square().sum()) for p in (ours, plain))
            assert error <= base * (1 + 1e-5)
            assert metrics["method"] in METHODS["auto"].candidates and metrics["held_out_gain"] >= 0
            assert metrics["tokens"] == 210, "the choice is solved once more from all samples"
            better += error < 0.99 * base
    assert better >= 6


def test_auto_keeps_its_first_solution_where_the_second_errs_more():
    """All samples together may lead elsewhere: then what was chosen by the samples put aside stays."""
    (x, full), (hx, _) = two_streams(150), two_streams(60, seed=1)
    hfull = hx - 3 * (two_streams(60, seed=1)[1] - hx)
    gptq = stack(sums_of(x, full), sums_of(hx, hfull)).solved(METHODS["gptq"])
    s = stack(sums_of(x, full), sums_of(hx, hfull))
    for (ours, _), (plain, _), w in zip(s.solved(METHODS["auto"]), gptq, s.weights.split(s.sizes)):
        error, base = (float((p.decode() @ hx.T - w @ hfull.T).double().square().sum()) for p in (ours, plain))
        assert error <= base * (1 + 1e-5)


def test_auto_keeps_the_weights_as_target_where_the_drift_does_not_carry_over():
    """Few tokens, and a drift in the held-out ones that points the other way."""
    x, full = two_streams(150)
    hx, _ = two_streams(60, seed=1)
    s = stack(sums_of(x, full), sums_of(hx, hx - 3 * (two_streams(60, seed=1)[1] - hx)))
    assert [m.get("alpha", 0.0) for _, m in s.solved(METHODS["auto"])] == [0.0, 0.0]


def test_residual_target_identity():
    """‖ŴX + R − (WX̃ + R̃)‖² − ‖(Ŵ − W'')X‖² is the same for every Ŵ (LoaQ)."""
    x, full = two_streams(300)
    g = torch.Generator().manual_seed(2)
    w, behind = torch.randn(7, 48, generator=g), torch.randn(300, 7, generator=g)
    sums = sums_of(x, full, behind)
    hessian = solver.prepare(sums.hessian, sums.diagonal, group=16, act_order="gar", damp=1e-9)
    target = w + solver.regression(sums.mismatch(w), hessian)
    gaps = []
    for _ in range(4):
        rounded = w + 0.2 * torch.randn(w.shape, generator=g)
        true = (rounded.double() @ x.T.double() - w.double() @ full.T.double() - behind.T).square().sum()
        gaps.append(float(true) - solver.weighted_loss(rounded, target, sums.hessian))
    assert np.ptp(gaps) <= 1e-4 * np.mean(np.abs(gaps))


@pytest.mark.parametrize("least", [10, 300, 2000, 1e9])
def test_floor_of_the_importance_leaves_the_tokens_asked_for(least):
    g = normalized([torch.rand(2500, generator=torch.Generator().manual_seed(i)) ** 20 for i in range(2)])
    ours = torch.cat(floored(g, least)).double()
    before = torch.cat(g).double()

    def effective(g):
        return float(g.square().sum() ** 2 / g.pow(4).sum())

    if effective(before) >= least:
        assert torch.equal(ours, before)
    else:
        assert effective(ours) == pytest.approx(min(least, 2500), rel=1e-3)
        assert float(ours.square().mean()) == pytest.approx(1, rel=1e-5)
        assert torch.equal(ours.argsort(stable=True).sort().values, torch.arange(5000)) and float(ours.min()) > 0


# --- numerics that do not break ----------------------------------------------------------------------------------


def damaged(kind: str) -> tuple[Statistics, Statistics]:
    """Sums, and those of samples put aside, as bad calibration leaves them."""
    both = []
    for seed, tokens in ((0, 3 if kind == "few" else 150), (1, 40)):
        x, full = two_streams(1 if kind == "one token" else tokens, seed=seed)
        if kind == "dead":
            x[:, 5:9], full[:, 5:9] = 0, 0
        elif kind == "rank":
            x[:, 24:], full[:, 24:] = x[:, :24], full[:, :24]
        factor = {"all dead": 0.0, "huge": 1e21, "tiny": 1e-21}.get(kind, 1.0)
        sums = Statistics.empty(48, drift=True, modal=True)
        sums.add(x * factor, full * factor, image=torch.arange(len(x)) % 2 == 0)
        both.append(sums.rounded())
    return tuple(both)


@pytest.mark.parametrize("kind", ["few", "dead", "all dead", "rank", "huge", "tiny", "one token"])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.calibrated and not m.scaling])
def test_bad_statistics_break_nothing(kind, name):
    """Whole integers, finite weights, and a manifest that JSON can hold which says what was done."""
    sums, held = damaged(kind)
    for part, metrics in stack(sums, held).solved(METHODS[name]):
        decoded = part.decode()
        assert bool(torch.isfinite(decoded).all()) and int(part.codes.max()) <= 3
        assert bool((part.scales > 0).all())
        json.dumps(metrics, allow_nan=False)
        assert metrics["fallback"] == (kind in ("all dead", "huge", "tiny")), metrics
        assert metrics["dead_columns"] == {"dead": 4, "all dead": 48, "tiny": metrics["dead_columns"]}.get(kind, 0)
        if kind in ("few", "rank", "one token", "dead"):
            assert metrics["damp"] in (0.01, 0.1, 1.0)


def test_damping_that_grew_is_in_the_manifest():
    x, full = two_streams(150)
    sums = sums_of(x, full)
    lowest = float(torch.linalg.eigvalsh(sums.hessian.double())[0])
    sums.upper = sums.upper - (lowest + 0.05 * float(sums.upper.diagonal().mean())) * torch.eye(48)
    assert [m["damp"] for _, m in stack(sums, None).solved(METHODS["gptaq"])] == [0.1, 0.1]
