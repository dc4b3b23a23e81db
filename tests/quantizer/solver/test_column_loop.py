"""The column loop against slow float64 references, and the identities that it rests on."""

import numpy as np
import pytest
import torch

from tests.oracle import brain_surgeon, gptq_by_inverse
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.solver import column_loop
from vlmq_export.quantizer.solver.hessian import (
    column_order,
    column_term,
    exact_target,
    prepare,
    weighted_loss,
)
from vlmq_export.quantizer.solver.nearest import round_to_nearest

# Share of equal codes. Float32 and float64 may round a tie differently, and then the rest of the
# row differs too.
SAME = 0.999


def problem(out_features=48, in_features=96, tokens=400, seed=0, drift=0.3):
    """(W [out, in], A, D, Σx²) of correlated inputs with uneven column energies."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=g) / in_features**0.5
    mix = mix + 0.3 * torch.eye(in_features)
    x = torch.randn(tokens, in_features, generator=g) @ mix
    x = x * torch.rand(in_features, generator=g).mul(2).exp()
    full = x + drift * torch.randn(tokens, in_features, generator=g) @ mix
    w = torch.randn(out_features, in_features, generator=g) * 0.1
    return w, x.T @ x, (full - x).T @ x, x.square().sum(0)


def damped(a: torch.Tensor, share=0.01) -> np.ndarray:
    """A + λI with λ = share · mean(diag A), float64."""
    a = a.double().numpy()
    return a + share * np.diag(a).mean() * np.eye(len(a))


def solve(w, a, diagonal, *, bits=3, group=32, act_order="off", block=128, drift=None, alpha=0.25):
    hessian = prepare(a, diagonal, group=group, act_order=act_order, damp=0.01)
    columns = None if drift is None else column_term(hessian, drift, alpha)
    return column_loop.solve(
        w, hessian, Affine(bits), group=group, act_order=act_order, block=block, column_term=columns
    )


def looped(hessian, a, d) -> tuple[np.ndarray, np.ndarray]:
    """(A damped, D), both in loop order and float64."""
    order = hessian.order.numpy()
    return damped(a)[np.ix_(order, order)], d.double().numpy()[np.ix_(order, order)]


def agreement(solution, codes) -> float:
    """Share of equal codes."""
    return float((solution.codes.numpy() == codes).mean())


@pytest.mark.parametrize("act_order", ["off", "static", "gar", "dynamic"])
@pytest.mark.parametrize(
    ("bits", "group", "block"), [(2, 32, 128), (3, 32, 48), (4, 96, 40), (3, 48, 32), (2, 24, 96)]
)
def test_equals_optimal_brain_quantization(act_order, bits, group, block):
    """Blocks and groups of any size give the codes of the loop without blocks."""
    w, a, _, diagonal = problem(seed=bits + group)
    order = column_order(a.diagonal(), group, act_order)
    codes, scales, zeros = brain_surgeon(
        w.numpy(), damped(a), bits, group, order=order.numpy(), static=act_order == "static"
    )
    s = solve(w, a, diagonal, bits=bits, group=group, act_order=act_order, block=block)
    assert agreement(s, codes) >= SAME
    # brain_surgeon numbers groups in loop order, except for static. The solver numbers them in the
    # original order, except for dynamic.
    if act_order in ("static", "dynamic"):
        where = np.arange(w.shape[1] // group)
    else:
        where = order.numpy()[::group] // group
    if act_order == "static":
        np.testing.assert_array_equal(s.scales.numpy(), scales)
    assert (s.scales.numpy()[:, where] == scales.astype(np.float16)).mean() >= SAME
    assert (s.zero_points.numpy()[:, where] == zeros).mean() >= SAME


@pytest.mark.parametrize("act_order", ["off", "dynamic"])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_equals_gptaq_column_by_column(act_order, alpha):
    w, a, d, diagonal = problem(seed=5)
    order = column_order(a.diagonal(), 32, act_order).numpy()
    codes, _, _ = brain_surgeon(
        w.numpy(), damped(a), 2, 32, order=order, drift=d.numpy(), alpha=alpha, inside=32
    )
    ours = solve(w, a, diagonal, bits=2, act_order=act_order, block=32, drift=d, alpha=alpha)
    assert agreement(ours, codes) >= SAME
    plain, _, _ = brain_surgeon(w.numpy(), damped(a), 2, 32, order=order)
    differs = (plain != codes).mean() > 0.01
    assert differs, "the drift term does nothing here, so the check above proves nothing"


def heavy_tailed(rows=96, n=640, tokens=1500, seed=0):
    """(W, A, D, Σx²) of inputs as in real layers.

    They are correlated, their energies span four decades, and one channel has massive activations.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g) * (1.2 * torch.randn(n, generator=g)).exp()
    x *= torch.rand(tokens, 1, generator=g)
    x += torch.randn(tokens, 6, generator=g) @ torch.randn(6, n, generator=g)
    x[::50, 11] = 400.0
    delta = 0.05 * x.roll(3, dims=1) + 0.02 * torch.randn(tokens, n, generator=g)
    return 0.05 * torch.randn(rows, n, generator=g), x.T @ x, delta.T @ x, x.square().sum(0)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, 128), (2, 128), (3, 640), (2, 64)])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("act_order", ["off", "dynamic"])
def test_codes_and_loss_are_those_of_the_loop_with_the_inverse(bits, group, asymmetric, act_order):
    """The solver uses the factor of A, the papers that of A⁻¹.

    The codes are the same. Where a tie falls the other way, the loss still is.
    """
    w, a, d, diagonal = heavy_tailed(seed=bits)
    order = column_order(a.diagonal(), group, act_order)

    def in_loop_order(matrix):
        return matrix[order][:, order]

    damped_a = in_loop_order(a + 0.01 * a.diagonal().mean() * torch.eye(len(a)))
    block, drift = min(group, 128), in_loop_order(d) if asymmetric else None
    grid, target = Affine(bits), w[:, order]
    codes, rounded = gptq_by_inverse(target, damped_a, grid, group, drift=drift, block=block)
    options = {"bits": bits, "group": group, "act_order": act_order, "block": block}
    s = solve(w, a, diagonal, drift=d if asymmetric else None, **options)
    assert float((s.codes[:, order] == codes.T).float().mean()) >= SAME
    ours, theirs = s.decode()[:, order], rounded
    losses = [weighted_loss(q, target, in_loop_order(a)) for q in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("act_order", ["off", "gar", "dynamic"])
def test_column_term_identity(act_order):
    """Row q of P is α·D_q,>q (A_>q)⁻¹ in loop order."""
    _, a, d, diagonal = problem(in_features=64)
    hessian = prepare(a, diagonal, group=16, act_order=act_order, damp=0.01)
    p = column_term(hessian, d, 0.25).double().numpy()
    a, d = looped(hessian, a, d)
    for q in range(63):
        expected = 0.25 * d[q, q + 1 :] @ np.linalg.inv(a[q + 1 :, q + 1 :])
        np.testing.assert_allclose(p[q, q + 1 :], expected, atol=2e-5 * np.abs(p).max())
        assert np.all(p[q, : q + 1] == 0)


def test_exact_target_identity():
    """‖(ŴX − WX̃)G‖² − ‖(Ŵ − W')XG‖² is the same for every Ŵ, when W' is made without damping."""
    w, *_ = problem(8, 24)
    g = torch.Generator().manual_seed(1)
    x, delta = torch.randn(24, 300, generator=g), 0.3 * torch.randn(24, 300, generator=g)
    weight = torch.rand(300, generator=g) + 0.1
    a, d = (x * weight**2) @ x.T, (delta * weight**2) @ x.T
    hessian = prepare(a, a.diagonal(), group=8, act_order="dynamic", damp=1e-9)
    target = exact_target(w, hessian, d, 1.0)
    gaps = []
    for _ in range(5):
        rounded = w + 0.2 * torch.randn(w.shape, generator=g)
        true = ((rounded @ x - w @ (x + delta)) * weight).double().square().sum()
        gaps.append(float(true) - weighted_loss(rounded, target, a))
    assert np.ptp(gaps) <= 1e-4 * np.mean(np.abs(gaps))


def test_exact_target_leans_to_the_weights():
    w, a, d, diagonal = problem()
    hessian = prepare(a, diagonal, group=32, act_order="off", damp=1.0)
    assert torch.equal(exact_target(w, hessian, torch.zeros_like(d), 1.0), w)
    assert torch.equal(exact_target(w, hessian, d, 0.0), w)
    heavy = prepare(a, diagonal, group=32, act_order="off", damp=1e6)
    assert float((exact_target(w, heavy, d, 1.0) - w).abs().max()) < 1e-4


@pytest.mark.parametrize("act_order", ["off", "static", "gar", "dynamic"])
@pytest.mark.parametrize("power", [-30, -8, 6, 30])
def test_power_of_two_scaling_gives_identical_integers(act_order, power):
    """Token weights that are 2^k times as large multiply A and D by 4^k. No integer may move."""
    w, a, d, diagonal = problem()
    one = solve(w, a, diagonal, act_order=act_order, drift=d)
    other = solve(w, a * 4.0**power, diagonal, act_order=act_order, drift=d * 4.0**power)
    for field in ("codes", "scales", "zero_points", "g_idx"):
        assert torch.equal(getattr(one, field), getattr(other, field))


def test_rows_do_not_see_each_other():
    w, a, d, diagonal = problem()
    together = solve(w, a, diagonal, act_order="dynamic", drift=d)
    for r in (0, 17, 47):
        alone = solve(w[r : r + 1], a, diagonal, act_order="dynamic", drift=d)
        assert agreement(together.rows(slice(r, r + 1)), alone.codes.numpy()) >= SAME


@pytest.mark.parametrize("group", [16, 96])
def test_g_idx(group):
    w, a, _, diagonal = problem()
    n = w.shape[1]
    natural = torch.arange(n, dtype=torch.int32) // group
    for act_order in ("off", "static", "gar"):
        s = solve(w, a, diagonal, group=group, act_order=act_order)
        assert torch.equal(s.g_idx, natural)
    s = solve(w, a, diagonal, group=group, act_order="dynamic")
    assert torch.equal(s.g_idx.bincount(), torch.full((n // group,), group))
    energy = a.diagonal()
    for g in range(n // group - 1):  # groups are filled in the order of diag(A)
        assert float(energy[s.g_idx == g].min()) >= float(energy[s.g_idx == g + 1].max())


def test_orders():
    energy = torch.tensor([1.0, 9.0, 3.0, 3.0, 8.0, 2.0, 0.0, 5.0])
    assert column_order(energy, 2, "off").tolist() == list(range(8))
    assert column_order(energy, 2, "dynamic").tolist() == [1, 4, 7, 2, 3, 5, 0, 6]
    assert column_order(energy, 2, "gar").tolist() == [1, 0, 4, 5, 7, 6, 2, 3]
    assert column_order(energy, 8, "gar").tolist() == column_order(energy, 8, "static").tolist()


@pytest.mark.parametrize("act_order", ["off", "static", "gar", "dynamic"])
def test_solution_decodes_to_what_the_loop_aimed_at(act_order):
    """The integers, decoded in the original order, have a loss that rounding cannot reach."""
    w, a, _, diagonal = problem(tokens=2000)
    s = solve(w, a, diagonal, bits=3, act_order=act_order)
    nearest = round_to_nearest(w, Affine(3), group=32)
    assert weighted_loss(s.decode(), w, a) < 0.6 * weighted_loss(nearest.decode(), w, a)


def test_diagonal_hessian_is_rounding_to_nearest():
    w, a, _, _ = problem()
    diagonal = torch.diag(a.diagonal())
    s = solve(w, diagonal, a.diagonal(), group=32)
    nearest = round_to_nearest(w, Affine(3), group=32)
    assert torch.equal(s.codes, nearest.codes) and torch.equal(s.scales, nearest.scales)


def test_dead_columns_are_zero_and_disturb_nothing():
    w, a, _, diagonal = problem()
    dead = [3, 40, 95]
    a[dead], a[:, dead], diagonal[dead] = 0, 0, 0
    for act_order in ("off", "static", "gar", "dynamic"):
        s = solve(w, a, diagonal, group=32, act_order=act_order)
        assert float(s.decode()[:, dead].abs().max()) == 0
    live = torch.ones(96, dtype=torch.bool)
    live[dead] = False
    hessian = prepare(a, diagonal, group=32, act_order="off", damp=0.01)
    only = prepare(a[live][:, live], diagonal[live], group=93, act_order="off", damp=0.01)
    torch.testing.assert_close(hessian.factor[live][:, live], only.factor)
    torch.testing.assert_close(hessian.pivots[live], only.pivots)


def test_column_without_weight_but_with_input_is_kept():
    """A column that only tokens with g = 0 excite has 0 on the diagonal of A. It is not dead."""
    w, a, _, diagonal = problem()
    a[7], a[:, 7] = 0, 0
    s = solve(w, a, diagonal, bits=4, group=32)
    step = s.scales.float()[:, 0]
    assert bool(((s.decode()[:, 7] - w[:, 7]).abs() <= 0.51 * step + 1e-6).all())


def test_rank_deficient_hessian_is_solved_with_damping():
    w, a, d, diagonal = problem(tokens=10)
    hessian = prepare(a, diagonal, group=32, act_order="gar", damp=0.01)
    assert not hessian.fallback
    s = solve(w, a, diagonal, act_order="gar", drift=d)
    assert bool(torch.isfinite(s.decode()).all())


def test_damping_grows_until_the_matrix_is_definite():
    _, a, _, diagonal = problem()
    mean, least = float(a.diagonal().mean()), float(torch.linalg.eigvalsh(a.double())[0])
    broken = a - (0.05 * mean + least) * torch.eye(96)
    hessian = prepare(broken, diagonal, group=32, act_order="off", damp=0.01)
    assert hessian.damp == pytest.approx(0.1) and not hessian.fallback


@pytest.mark.parametrize(
    "matrix", [torch.zeros(96, 96), -torch.eye(96), torch.full((96, 96), float("nan"))]
)
def test_hopeless_hessian_falls_back_to_nearest(matrix):
    w, _, _, diagonal = problem()
    hessian = prepare(matrix, diagonal, group=32, act_order="dynamic", damp=0.01)
    assert hessian.fallback
    s = column_loop.solve(w, hessian, Affine(4), group=32, act_order="dynamic", block=128)
    nearest = round_to_nearest(w, Affine(4), group=32)
    assert torch.equal(s.codes, nearest.codes) and torch.equal(s.g_idx, nearest.g_idx)


def test_weighted_loss_is_the_output_error():
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(50, 12, generator=g), torch.rand(50, generator=g)
    w, other = torch.randn(4, 12, generator=g), torch.randn(4, 12, generator=g)
    a = (x * weight[:, None]).T @ (x * weight[:, None])
    expected = (((w - other) @ x.T) * weight).square().sum()
    assert weighted_loss(w, other, a) == pytest.approx(float(expected), rel=1e-5)
