"""What follows the column loop, and the choices that are made on samples put aside.

Both are held against brute force in float64.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.jobs import job_for
from tests.quantizer.solver.test_column_loop import SAME, damped, problem
from vlmq_export.quantizer.calibration.collect import Evidence
from vlmq_export.quantizer.calibration.importance import floored, normalized
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.choice import grid_choice
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.layers.attempt import _shares, prepared
from vlmq_export.quantizer.layers.damping import TIMES
from vlmq_export.quantizer.layers.stack import Matrix, Stack
from vlmq_export.quantizer.layers.unit import solve_unit
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.solver import column_loop, descent
from vlmq_export.quantizer.solver.block_loop import solve_blocks
from vlmq_export.quantizer.solver.descent import Descent, descend
from vlmq_export.quantizer.solver.hessian import (
    DAMP_STEPS,
    column_term,
    own_term,
    prepare,
    regression,
    weighted_loss,
)
from vlmq_export.quantizer.solver.ranges import NEIGHBOURS, best_range, search


def solved(w, a, diagonal, bits=2, group=32, act_order="gar"):
    """(Hessian, solution of the column loop)."""
    hessian = prepare(a, diagonal, group=group, act_order=act_order, damp=0.01)
    return hessian, column_loop.solve(
        w, hessian, Affine(bits), group=group, act_order=act_order, block=128
    )


def loss(solution, target, a) -> np.ndarray:
    """(ŵ − t)·A·(ŵ − t)ᵀ of each row with the damped A, float64 [out]."""
    error = solution.decode().double().numpy() - target.double().numpy()
    return ((error @ damped(a)) * error).sum(1)


def slow_sweep(codes, scales, zeros, target, a, bits, group):
    """The codes after one sweep, in float64.

    It goes row by row and column by column, and computes the gradient anew for each code.
    """
    codes = codes.astype(np.float64).copy()
    for r, j in itertools.product(range(len(codes)), range(codes.shape[1])):
        s, z = np.repeat(scales[r], group), np.repeat(zeros[r], group)
        error = s * (codes[r] - z) - target[r]
        best = s[j] * (codes[r, j] - z[j]) - a[j] @ error / a[j, j]
        codes[r, j] = np.clip(np.round(best / s[j]) + z[j], 0, 2**bits - 1)
    return codes


@pytest.mark.parametrize(
    ("bits", "group", "act_order"), [(2, 32, "off"), (3, 96, "gar"), (2, 96, "static")]
)
def test_sweeps_equal_the_slow_ones(bits, group, act_order):
    w, a, _, diagonal = problem(out_features=12, seed=bits)
    hessian, start = solved(w, a, diagonal, bits, group, act_order)
    codes = start.codes.numpy()
    scales, zeros = start.scales.double().numpy(), start.zero_points.double().numpy()
    for sweeps in (1, 2):
        codes = slow_sweep(codes, scales, zeros, w.double().numpy(), damped(a), bits, group)
        ours = descend(start, w, hessian, Affine(bits), sweeps=sweeps)
        assert (ours.codes.numpy() == codes).mean() >= SAME
    moved = (codes != start.codes.numpy()).mean() > 0.01
    assert moved, "nothing moved, so the check above proves nothing"


def test_no_single_code_can_be_bettered_in_the_end():
    w, a, _, diagonal = problem(out_features=6, in_features=32)
    hessian, start = solved(w, a, diagonal, 2, 16)
    end = descend(start, w, hessian, Affine(2), sweeps=50)
    final = loss(end, w, a)
    for j, change in itertools.product(range(32), (-1, 1)):
        codes = (end.codes.int()).clone()
        codes[:, j] = (codes[:, j] + change).clamp(0, 3)
        other = Solution(codes.to(torch.uint8), end.scales, end.zero_points, end.g_idx)
        assert (loss(other, w, a) >= final * (1 - 1e-5)).all()


@given(
    st.integers(0, 1000),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([16, 48]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_loss_of_every_row_falls_or_stays(seed, bits, group, refit, dynamic):
    w, a, _, diagonal = problem(out_features=7, in_features=48, tokens=60, seed=seed)
    act_order = "dynamic" if dynamic else "gar"
    hessian, start = solved(w, a, diagonal, bits, group, act_order)
    grid = Affine(bits, portable=bits == 4)
    if bits == 4:
        start = column_loop.solve(w, hessian, grid, group=group, act_order=act_order, block=128)
    before = loss(start, w, a)
    for sweeps in (1, 3):
        end = descend(start, w, hessian, grid, sweeps=sweeps, refit=refit)
        assert (loss(end, w, a) <= before * (1 + 1e-4) + 1e-9).all()
    assert torch.equal(end.zero_points, start.zero_points) and torch.equal(end.g_idx, start.g_idx)
    assert int(end.codes.max()) < 2**bits
    if bits == 4:  # still portable: scale · zero_point is a float16
        product = end.scales.float() * end.zero_points.float()
        assert torch.equal(product, product.half().float())


def test_refitted_scales_reach_least_squares():
    """For z = codes − zero_point the scale is ⟨z, A·t⟩/⟨z, A·z⟩, up to its rounding to float16."""
    w, a, _, diagonal = problem(out_features=5, in_features=32)
    hessian, start = solved(w, a, diagonal, 3, 32)
    state = Descent(start, w, descent.damped(hessian), Affine(3))
    state.refit()
    steps = start.codes.double().numpy() - start.zero_points.double().numpy()
    best = (steps * (w.double().numpy() @ damped(a))).sum(1) / ((steps @ damped(a)) * steps).sum(1)
    np.testing.assert_allclose(state.scales[0].half().double().numpy(), best, rtol=2.0**-10)
    refitted = replace(start, scales=state.scales[0].half()[:, None])
    assert (loss(refitted, w, a) < loss(start, w, a)).all()


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS", "IQ2_XS"])
def test_points_descend_and_no_row_loses(name):
    w, a, _, diagonal = problem(out_features=6, in_features=256, tokens=600)
    grid = GRIDS[name]
    hessian = prepare(
        a, diagonal, group=grid.block, act_order="gar", damp=0.01, together=grid.together
    )
    start = solve_blocks(w, hessian, grid, block=128)
    before = loss(start, w, a)
    for refit in (False, True):
        end = descend(start, w, hessian, sweeps=3, refit=refit)
        assert not end.out_of_range()
        # The damped loss falls in every row; this is the loss without damping.
        assert (loss(end, w, a) <= before * (1 + 1e-2)).all()
        assert loss(end, w, a).sum() < 0.95 * before.sum()


def test_block_types_descend_too():
    w, a, _, diagonal = problem(out_features=8, in_features=256, tokens=600)
    grid = GRIDS["Q2_K"]
    hessian = prepare(a, diagonal, group=grid.block, act_order="gar", damp=0.01)
    start = solve_blocks(w, hessian, grid, block=128)
    end = descend(start, w, hessian, sweeps=3, refit=True)
    assert loss(end, w, a).sum() < 0.95 * loss(start, w, a).sum()
    assert torch.equal(end.params.d, start.params.d) and int(end.codes.max()) <= grid.top


def test_dead_columns_and_a_hopeless_hessian_are_left_alone():
    w, a, _, diagonal = problem()
    dead = [3, 40, 95]
    a[dead], a[:, dead], diagonal[dead] = 0, 0, 0
    hessian, start = solved(w, a, diagonal)
    end = descend(start, w, hessian, Affine(2), sweeps=3, refit=True)
    assert float(end.decode()[:, dead].abs().max()) == 0
    assert bool(torch.isfinite(end.decode()).all())
    hopeless = prepare(-torch.eye(96), diagonal, group=32, act_order="off", damp=0.01)
    assert descend(start, w, hopeless, Affine(2), sweeps=3) is start


# --- ranges ---------------------------------------------------------------------------------------


def ranges_problem():
    """(W, A, solve): solve(target, fit, tries) is the column loop at 2 bits with these ranges."""
    w, a, _, diagonal = problem(out_features=9)
    options = {"group": 32, "act_order": "gar"}
    hessian = prepare(a, diagonal, damp=0.01, **options)

    def solve(target, fit, tries=1):
        return column_loop.solve(
            target, hessian, Affine(2), block=128, fit=fit, tries=tries, **options
        )

    return w, a, solve


def test_every_row_takes_the_range_of_least_error_after_the_loop():
    w, a, solve = ranges_problem()
    shares = (1.0, 0.9, 0.75, 0.6)
    ours = best_range(solve, w, Affine(2), shares)
    each = [solve(w, lambda part, _columns, c=c: Affine(2).fit(part * c, dim=0)) for c in shares]
    losses = np.stack([[weighted_loss(s.decode()[r], w[r], a) for r in range(9)] for s in each])
    chosen = losses.argmin(0)
    assert len(set(chosen)) > 1
    for r, c in enumerate(chosen):
        assert torch.equal(ours.codes[r], each[c].codes[r])
        assert torch.equal(ours.scales[r], each[c].scales[r])


@pytest.mark.parametrize("act_order", ["gar", "static", "dynamic", "off"])
@pytest.mark.parametrize("terms", ["", "column", "own", "both"])
@pytest.mark.parametrize("damp", [0.001, 0.3])
def test_the_loop_tells_itself_what_each_try_leaves(act_order, terms, damp):
    """Against ‖(Ŵ − W)·X‖² in float64 of each range alone, with a dead input."""
    w, a, drift, diagonal = problem(out_features=9)
    a[5], a[:, 5], diagonal[5] = 0, 0, 0
    options = {"group": 32, "act_order": act_order}
    hessian = prepare(a, diagonal, damp=damp, **options)
    if terms in ("column", "both"):
        options["column_term"] = column_term(hessian, 0.1 * drift, 0.25)
    if terms in ("own", "both"):
        options["own_term"] = own_term(hessian, 0.1 * drift, 0.25)
    shares = (1.0, 0.9, 0.75, 0.6)

    def solve(target, fit, tries=1):
        return column_loop.solve(
            target, hessian, Affine(2), block=128, fit=fit, tries=tries, **options
        )

    def loss(solution) -> np.ndarray:
        apart = (solution.decode() - w).double()
        return ((apart @ a.double()) * apart).sum(1).numpy()

    each = [solve(w, lambda part, _columns, c=c: Affine(2).fit(part * c, dim=0)) for c in shares]
    losses = np.stack([loss(s) for s in each])
    ours = best_range(solve, w, Affine(2), shares)
    np.testing.assert_allclose(loss(ours), losses.min(0), rtol=1e-5)
    assert len(set(losses.argmin(0))) > 1


def test_zero_points_next_to_a_range_are_tried_with_every_share():
    """Each row is as good as with the best of all pairs, tried one by one.

    Some row is better than without the neighbours.
    """
    w, a, solve = ranges_problem()

    def moved(part, _columns, share, move):
        scale, zero = Affine(2).fit(part * share, dim=0)
        return scale, (zero + move).clamp(1, 3)

    def losses(solution):
        return np.array([weighted_loss(solution.decode()[r], w[r], a) for r in range(9)])

    shares, moves = (1.0, 0.8), NEIGHBOURS
    ours = losses(best_range(solve, w, Affine(2), shares, moves))
    pairs = itertools.product(shares, moves)
    each = [losses(solve(w, lambda p, c, pair=pair: moved(p, c, *pair))) for pair in pairs]
    np.testing.assert_allclose(ours, np.min(each, 0), rtol=1e-5)
    alone = losses(best_range(solve, w, Affine(2), shares))
    assert (ours <= alone * (1 + 1e-5)).all() and (ours < 0.999 * alone).any()


@given(st.integers(0, 500), st.sampled_from([2, 3]))
@settings(max_examples=20, deadline=None)
def test_a_search_with_neighbours_errs_no_more_before_the_loop(seed, bits):
    g = torch.Generator().manual_seed(seed)
    weights, weigh = torch.randn(24, 5, generator=g), torch.rand(24, generator=g)
    grid = Affine(bits)

    def error(moves):
        scale, zero = search(grid, weights, weigh, moves=moves)
        assert bool(((zero >= 1) & (zero <= grid.top)).all())
        rounded = grid.decode(grid.encode(weights, scale, zero), scale, zero)
        return ((rounded - weights).square() * weigh[:, None]).sum(0)

    assert bool((error(NEIGHBOURS) <= error((0,)) * (1 + 1e-5)).all())


# --- choices on samples put aside -----------------------------------------------------------------


def two_streams(tokens, width=48, seed=0, drift=0.4):
    """(x, x̃), [tokens, width]. The drift has a part that is the same for every seed."""
    g = torch.Generator().manual_seed(seed)

    def fixed(seed):
        drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
        return drawn / width**0.5

    mix, lean = fixed(99) + 0.4 * torch.eye(width), fixed(98)
    x = torch.randn(tokens, width, generator=g) @ mix
    return x, x + drift * (0.5 * x @ lean + torch.randn(tokens, width, generator=g))


def sums_of(x, full, residual=None) -> Statistics:
    width = 0 if residual is None else residual.shape[1]
    sums = Statistics.empty(x.shape[1], drift=True, pull=width)
    sums.add(x, full, pull=residual)
    return sums.to_float32()


def linears() -> list[Matrix]:
    """Two linears that share their inputs."""
    torch.manual_seed(0)
    return [Matrix(f"x{n}", nn.Linear(48, n, bias=False).weight.detach()) for n in (20, 12)]


def output_error(solution, x, w, full, behind=0.0) -> float:
    """‖ŴX − WX̃ − (R̃ − R)‖² over the tokens, in float64.

    `behind` is R̃ − R, the drift of the residual stream, [tokens, out].
    """
    rounded = solution.decode() if isinstance(solution, Solution) else solution
    error = x.double() @ rounded.double().T - full.double() @ w.double().T - behind
    return float(error.square().sum())


def recipe(method: str) -> QuantConfig:
    return QuantConfig(method=method, bits=2, group_size=16)


def solved_by(method: str, sums: Statistics, held: Statistics | None) -> list[tuple]:
    """(solution, metrics) of each linear of `linears`."""
    found = solve_unit(linears(), Evidence(sums, held), job_for(recipe(method)))
    return [(linear.solution, metrics) for linear, metrics in found]


def shares(sums: Statistics, held: Statistics) -> list[tuple]:
    """(α, W, W' − W) of each linear of `linears`, with α found on the samples put aside."""
    config = recipe("exact-held")
    stack = Stack.of(linears(), grid_choice(config, "x20", 48))
    shift = prepared(stack, sums, config).shift
    found = _shares(stack, shift, held, "held-out")
    return list(zip(found, stack.split(stack.weights), stack.split(shift)))


def test_error_on_tokens_put_aside_is_that_of_the_output():
    """A, D and R alone give the output error except for a constant.

    So the differences between candidates are exact.
    """
    x, full = two_streams(200)
    g = torch.Generator().manual_seed(1)
    w, behind = torch.randn(9, 48, generator=g), torch.randn(200, 9, generator=g)
    sums = sums_of(x, full, behind)
    candidates = [w + 0.1 * torch.randn(9, 48, generator=g) for _ in range(4)]
    true = [output_error(c, x, w, full, behind) for c in candidates]
    ours = [sums.error(c, w) for c in candidates]
    np.testing.assert_allclose(np.diff(ours), np.diff(true), rtol=1e-3)


def test_share_of_the_shift_is_the_best_one_for_tokens_put_aside():
    """α of each linear, in closed form, against a grid search over the tokens."""
    (x, full), (hx, hfull) = two_streams(120), two_streams(80, seed=1)
    for ours, w, shift in shares(sums_of(x, full), sums_of(hx, hfull)):
        grid = np.linspace(0, 1, 1001)
        error = [output_error(w + a * shift, hx, w, hfull) for a in grid]
        assert ours == pytest.approx(grid[int(np.argmin(error))], abs=2e-3)
        assert 0.05 < ours < 0.95


def test_streams_that_do_not_drift_or_have_no_held_samples_leave_the_weights():
    x, _ = two_streams(120)
    assert [a for a, _, _ in shares(sums_of(x, x), sums_of(x[:40], x[:40]))] == [0.0, 0.0]
    x, full = two_streams(120)
    nothing = Statistics.empty(48, drift=True).to_float32()
    assert [a for a, _, _ in shares(sums_of(x, full), nothing)] == [0.0, 0.0]


def test_auto_is_never_worse_than_gptq_on_what_is_put_aside():
    better = 0
    for seed in range(6):
        (x, full), (hx, hfull) = two_streams(150, seed=seed), two_streams(60, seed=seed + 50)
        gptq = solved_by("gptq", sums_of(x, full), sums_of(hx, hfull))
        auto = solved_by("auto", sums_of(x, full), sums_of(hx, hfull))
        for (ours, metrics), (plain, _), w in zip(auto, gptq, (m.weight for m in linears())):
            error, base = (output_error(p, hx, w, hfull) for p in (ours, plain))
            assert error <= base * (1 + 1e-5)
            assert metrics["method"] in METHODS["auto"].candidates
            assert metrics["held_out_gain"] >= 0
            assert metrics["tokens"] == 210, "the choice is solved once more from all samples"
            better += error < 0.99 * base
    assert better >= 6


def test_auto_keeps_its_first_solution_where_the_second_errs_more():
    """The second solution comes from all samples together.

    Where it errs more on the samples put aside, the first one stays.
    """
    (x, full), (hx, _) = two_streams(150), two_streams(60, seed=1)
    hfull = hx - 3 * (two_streams(60, seed=1)[1] - hx)
    gptq = solved_by("gptq", sums_of(x, full), sums_of(hx, hfull))
    auto = solved_by("auto", sums_of(x, full), sums_of(hx, hfull))
    for (ours, _), (plain, _), w in zip(auto, gptq, (m.weight for m in linears())):
        error, base = (output_error(p, hx, w, hfull) for p in (ours, plain))
        assert error <= base * (1 + 1e-5)


def test_auto_keeps_the_weights_as_target_where_the_drift_does_not_carry_over():
    """There are few tokens, and the drift of those put aside points the other way."""
    x, full = two_streams(150)
    hx, _ = two_streams(60, seed=1)
    against = sums_of(hx, hx - 3 * (two_streams(60, seed=1)[1] - hx))
    auto = solved_by("auto", sums_of(x, full), against)
    assert [m.get("alpha", 0.0) for _, m in auto] == [0.0, 0.0]


def test_residual_target_identity():
    """‖ŴX + R − (WX̃ + R̃)‖² − ‖(Ŵ − W'')X‖² is the same for every Ŵ (LoaQ).

    W'' is the target that makes up for the drift of the residual stream too.
    """
    x, full = two_streams(300)
    g = torch.Generator().manual_seed(2)
    w, behind = torch.randn(7, 48, generator=g), torch.randn(300, 7, generator=g)
    sums = sums_of(x, full, behind)
    hessian = prepare(sums.hessian, sums.diagonal, group=16, act_order="gar", damp=1e-9)
    target = w + regression(sums.mismatch(w), hessian)
    gaps = []
    for _ in range(4):
        rounded = w + 0.2 * torch.randn(w.shape, generator=g)
        true = output_error(rounded, x, w, full, behind)
        gaps.append(true - weighted_loss(rounded, target, sums.hessian))
    assert np.ptp(gaps) <= 1e-4 * np.mean(np.abs(gaps))


@pytest.mark.parametrize("least", [10, 300, 2000, 1e9])
def test_floor_of_the_importance_leaves_the_tokens_asked_for(least):
    draws = (torch.Generator().manual_seed(seed) for seed in range(2))
    g = normalized([torch.rand(2500, generator=draw) ** 20 for draw in draws])
    ours = torch.cat(floored(g, least)).double()
    before = torch.cat(g).double()

    def effective(g):
        return float(g.square().sum() ** 2 / g.pow(4).sum())

    if effective(before) >= least:
        assert torch.equal(ours, before)
    else:
        assert effective(ours) == pytest.approx(min(least, 2500), rel=1e-3)
        assert float(ours.square().mean()) == pytest.approx(1, rel=1e-5)
        assert torch.equal(ours.argsort(stable=True).sort().values, torch.arange(5000))
        assert float(ours.min()) > 0


# --- numerics that do not break -------------------------------------------------------------------


def damaged(kind: str) -> tuple[Statistics, Statistics]:
    """(sums, sums of the samples put aside) as bad calibration leaves them."""
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
        both.append(sums.to_float32())
    return tuple(both)


@pytest.mark.parametrize("kind", ["few", "dead", "all dead", "rank", "huge", "tiny", "one token"])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.solves])
def test_bad_statistics_break_nothing(kind, name):
    """The codes are on the grid, the weights finite, and the metrics say what was done.

    JSON can hold the metrics.
    """
    sums, held = damaged(kind)
    for part, metrics in solved_by(name, sums, held):
        assert bool(torch.isfinite(part.decode()).all())
        assert int(part.codes.max()) <= 3
        assert bool((part.scales > 0).all())
        json.dumps(metrics, allow_nan=False)
        assert metrics["fallback"] == (kind in ("all dead", "huge", "tiny")), metrics
        # The squares of tiny inputs may round to 0, and then their columns count as dead.
        dead = metrics["dead_columns"]
        assert kind == "tiny" or dead == {"dead": 4, "all dead": 48}.get(kind, 0)
        if kind in ("few", "rank", "one token", "dead"):
            found = TIMES if METHODS[name].damping == "held-out" else (1.0,)
            assert metrics["damp"] in [s * (t * 0.01) for s in DAMP_STEPS for t in found]


def test_damping_that_grew_is_in_the_manifest():
    x, full = two_streams(150)
    sums = sums_of(x, full)
    lowest = float(torch.linalg.eigvalsh(sums.hessian.double())[0])
    sums.upper = sums.upper - (lowest + 0.05 * float(sums.upper.diagonal().mean())) * torch.eye(48)
    assert [m["damp"] for _, m in solved_by("gptaq", sums, None)] == [0.1, 0.1]
