"""Each method of the table against an independent float64 reference: its loop, its target, its ranges."""

import numpy as np
import pytest
import torch

from tests.oracle import brain_surgeon
from tests.test_solver import SAME, agreement, damped, looped, problem
from vlmq_export.quantizer import ranges, solver
from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.statistics import Statistics

# --- VLM-PTQ -----------------------------------------------------------------------------------------------------


def streams(tokens=300, width=48, seed=0):
    """Inputs of the two streams and a mask of image tokens, which are larger and excite other columns."""
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(tokens, generator=g) < 0.6
    x = torch.randn(tokens, width, generator=g) * torch.where(image[:, None], torch.linspace(3, 0.1, width), 1.0)
    x = x @ (torch.eye(width) + 0.3 * torch.randn(width, width, generator=g) / width**0.5)
    return x, 1.15 * x + 0.3 * torch.randn(tokens, width, generator=g), image


@pytest.mark.parametrize("act_order", ["off", "dynamic"])
def test_own_term_identity(act_order):
    """C_q is α·D_q,≥q·(A_≥q)⁻¹'s own column; the full inverse in its place would be another number."""
    _, a, d, diagonal = problem(in_features=64)
    hessian = solver.prepare(a, diagonal, group=16, act_order=act_order, damp=0.01)
    ours = solver.own_term(hessian, d, 0.25).double().numpy()
    a, d = looped(hessian, a, d)
    expected = np.array([0.25 * d[q, q:] @ np.linalg.inv(a[q:, q:])[:, 0] for q in range(64)])
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
    wrong = 0.25 * np.diag(d @ np.linalg.inv(a))
    assert np.abs(wrong - expected).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "group"), [(3, 48), (2, 16)])
def test_vlm_ptq_equals_the_slow_loop(bits, group):
    """GPTAQ's loop, each column rounded as w·(1 + C), on ranges of least M-weighted error: ≥ 99.9 % the same codes."""
    x, full, image = streams()
    w = 0.1 * torch.randn(40, 48, generator=torch.Generator().manual_seed(1))
    sums = Statistics.empty(48, drift=True, modal=True)
    sums.add(x, full, image=image)
    sums = sums.rounded()
    grid = Affine(bits)
    mix = ranges.best_mix(w, sums, grid, group)
    weigh = ranges.mixed(sums, mix)
    hessian = solver.prepare(sums.hessian, sums.diagonal, group=group, act_order="off", damp=0.01)
    ours = solver.solve(
        w, hessian, grid, group=group, act_order="off", block=group, columns=solver.column_term(hessian, sums.drift, 0.25),
        own=solver.own_term(hessian, sums.drift, 0.25), fit=lambda part, columns: ranges.search(grid, part, weigh[columns]),
    )  # fmt: skip
    x, full = x.double().numpy(), full.double().numpy()
    v, t = x[image.numpy()], x[~image.numpy()]
    m = mix * (v**2).mean(0) + (1 - mix) * (t**2).mean(0)
    d = (full - x).T @ x
    arguments = {"drift": d, "alpha": 0.25, "inside": group}
    codes, _, _ = brain_surgeon(
        w.numpy(), damped(torch.from_numpy(x.T @ x)), bits, group, own=True, weigh=m, **arguments
    )
    assert agreement(ours, codes) >= SAME
    for without in ({"own": True}, {"weigh": m}):
        other, _, _ = brain_surgeon(w.numpy(), damped(torch.from_numpy(x.T @ x)), bits, group, **without, **arguments)
        assert (other != codes).mean() > 0.01, f"{without} alone gives the same: the test above proves nothing"


def test_the_mix_is_that_of_least_output_error():
    """μ by brute force: ranges searched and rounded in float64 for each, ‖W·X̃ − Ŵ·X‖² over the tokens."""
    x, full, image = streams(seed=3)
    w = 0.1 * torch.randn(16, 48, generator=torch.Generator().manual_seed(2))
    sums = Statistics.empty(48, drift=True, modal=True)
    sums.add(x, full, image=image)
    sums = sums.rounded()
    losses = []
    for mix in ranges.MIXES:
        rounded = ranges.nearest(w, Affine(2), 16, ranges.mixed(sums, mix))
        losses.append(float((w.double() @ full.double().T - rounded.double() @ x.double().T).square().sum()))
    assert ranges.best_mix(w, sums, Affine(2), 16) == ranges.MIXES[int(np.argmin(losses))]
    assert len({round(loss, 6) for loss in losses}) > 1


def test_modalities_are_means_over_their_own_tokens():
    x, full, image = streams()
    g = torch.rand(len(x), generator=torch.Generator().manual_seed(5))
    sums = Statistics.empty(48, drift=True, modal=True)
    other = Statistics.empty(48, drift=True, modal=True)
    sums.add(x[:100], full[:100], g[:100], image[:100])
    other.add(x[100:], full[100:], g[100:], image[100:])
    sums.merge(other)
    weighted = (x * g[:, None]).square()
    for mix, tokens in ((1.0, image), (0.0, ~image)):
        expected = weighted[tokens].sum(0) / g[tokens].square().sum()
        torch.testing.assert_close(ranges.mixed(sums, mix), expected)
    alone = Statistics.empty(48, drift=True, modal=True)  # text without images: the other modality has no say
    alone.add(x, full, None, torch.zeros(len(x), dtype=torch.bool))
    assert bool((ranges.mixed(alone, 1.0) == 0).all()) and bool(torch.isfinite(ranges.mixed(alone, 0.5)).all())
