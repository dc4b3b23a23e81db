"""VLM-PTQ against an independent float64 reference: its term C, its ranges, its modality mix."""

import numpy as np
import pytest
import torch

from tests.oracle import brain_surgeon
from tests.quantizer.solver.test_column_loop import SAME, agreement, damped, looped, problem
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.layers.vlm_ptq import MIXES, best_mix, mixed, nearest_in_ranges
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.hessian import column_term, own_term, prepare
from vlmq_export.quantizer.solver.ranges import search


def streams(tokens=300, width=48, seed=0):
    """(x, x̃, mask of the image tokens). Image tokens are larger and excite other columns."""
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(tokens, generator=g) < 0.6
    x = torch.randn(tokens, width, generator=g)
    x = x * torch.where(image[:, None], torch.linspace(3, 0.1, width), 1.0)
    x = x @ (torch.eye(width) + 0.3 * torch.randn(width, width, generator=g) / width**0.5)
    return x, 1.15 * x + 0.3 * torch.randn(tokens, width, generator=g), image


@pytest.mark.parametrize("act_order", ["off", "dynamic"])
def test_own_term_identity(act_order):
    """C_q is α·D_q,≥q times column q of (A_≥q)⁻¹. The inverse of the whole A would not do."""
    _, a, d, diagonal = problem(in_features=64)
    hessian = prepare(a, diagonal, group=16, act_order=act_order, damp=0.01)
    ours = own_term(hessian, d, 0.25).double().numpy()
    a, d = looped(hessian, a, d)
    expected = np.array([0.25 * d[q, q:] @ np.linalg.inv(a[q:, q:])[:, 0] for q in range(64)])
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
    wrong = 0.25 * np.diag(d @ np.linalg.inv(a))
    assert np.abs(wrong - expected).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "group"), [(3, 48), (2, 16)])
def test_vlm_ptq_equals_the_slow_loop(bits, group):
    """GPTAQ's loop, which rounds w·(1 + C) on ranges of the least error weighted by M."""
    x, full, image = streams()
    w = 0.1 * torch.randn(40, 48, generator=torch.Generator().manual_seed(1))
    sums = Statistics.empty(48, drift=True, modal=True)
    sums.add(x, full, image=image)
    sums = sums.to_float32()
    grid = Affine(bits)
    mix = best_mix(w, sums, grid, group)
    weigh = mixed(sums, mix)
    hessian = prepare(sums.hessian, sums.diagonal, group=group, act_order="off", damp=0.01)
    ours = solve(
        w,
        hessian,
        grid,
        group=group,
        act_order="off",
        block=group,
        column_term=column_term(hessian, sums.drift, 0.25),
        own_term=own_term(hessian, sums.drift, 0.25),
        fit=lambda part, columns: search(grid, part, weigh[columns]),
    )
    x, full = x.double().numpy(), full.double().numpy()
    v, t = x[image.numpy()], x[~image.numpy()]
    m = mix * (v**2).mean(0) + (1 - mix) * (t**2).mean(0)
    drift, a = (full - x).T @ x, damped(torch.from_numpy(x.T @ x))

    def slow(**options):
        options |= {"drift": drift, "alpha": 0.25, "inside": group}
        return brain_surgeon(w.numpy(), a, bits, group, **options)[0]

    codes = slow(own=True, weigh=m)
    assert agreement(ours, codes) >= SAME
    for alone in ({"own": True}, {"weigh": m}):
        differs = (slow(**alone) != codes).mean() > 0.01
        assert differs, f"{list(alone)} alone gives the same: the check above proves nothing"


def test_the_mix_is_that_of_least_output_error():
    """μ by brute force: for each of its values ‖W·X̃ − Ŵ·X‖² over the tokens, in float64."""
    x, full, image = streams(seed=3)
    w = 0.1 * torch.randn(16, 48, generator=torch.Generator().manual_seed(2))
    sums = Statistics.empty(48, drift=True, modal=True)
    sums.add(x, full, image=image)
    sums = sums.to_float32()
    wanted, losses = w.double() @ full.double().T, []
    for mix in MIXES:
        rounded = nearest_in_ranges(w, Affine(2), 16, mixed(sums, mix))
        losses.append(float((wanted - rounded.double() @ x.double().T).square().sum()))
    assert best_mix(w, sums, Affine(2), 16) == MIXES[int(np.argmin(losses))]
    assert len({round(loss, 6) for loss in losses}) > 1


def test_modalities_are_means_over_their_own_tokens():
    x, full, image = streams()
    g = torch.rand(len(x), generator=torch.Generator().manual_seed(5))
    sums = Statistics.empty(48, drift=True, modal=True)
    other = Statistics.empty(48, drift=True, modal=True)
    sums.add(x[:100], full[:100], g[:100], image[:100])
    other.add(x[100:], full[100:], g[100:], image[100:])
    sums = sums.plus(other)
    weighted = (x * g[:, None]).square()
    for mix, tokens in ((1.0, image), (0.0, ~image)):
        expected = weighted[tokens].sum(0) / g[tokens].square().sum()
        torch.testing.assert_close(mixed(sums, mix), expected)
    # Where all tokens are text, images have no say.
    alone = Statistics.empty(48, drift=True, modal=True)
    alone.add(x, full, None, torch.zeros(len(x), dtype=torch.bool))
    assert bool((mixed(alone, 1.0) == 0).all())
    assert bool(torch.isfinite(mixed(alone, 0.5)).all())
