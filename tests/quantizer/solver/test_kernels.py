"""The fused block against the plain loop, under Triton's interpreter or on a GPU.

PyTorch's CPU build has no Triton, and its wheel has 286 MB, so `make setup` leaves it out.
tools/checks/triton.sh installs it into an environment of its own and runs this file. On a machine
with a GPU tools/checks/gpu.sh tests the compiled kernel.
"""

import importlib.util
import os

import pytest
import torch

from tests.oracle import brain_surgeon
from tests.quantizer.solver.test_column_loop import damped, problem
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.solver import kernels
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.hessian import column_term, prepare, weighted_loss

# Share of equal codes. The kernel adds products in another order, so that a tie may fall the other
# way, and then the rest of the row differs too.
SAME = 0.999
LOSS = 1e-3  # relative difference of the losses

if importlib.util.find_spec("triton") is None:
    if "triton" in os.environ.get("VLMQ_REQUIRE", ""):
        pytest.fail("VLMQ_REQUIRE declares triton, which is not installed", pytrace=False)
    pytest.skip("no Triton here: tools/checks/triton.sh runs these", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(monkeypatch, w, a, diagonal, grid, *, drift=None, **options):
    """Solutions of the plain loop and of the kernel under the same Hessian."""
    w, a, diagonal = (t.to(DEVICE) for t in (w, a, diagonal))
    group, act_order = options["group"], options["act_order"]
    hessian = prepare(a, diagonal, group=group, act_order=act_order, damp=0.01)
    columns = None if drift is None else column_term(hessian, drift.to(DEVICE), 0.25)
    solutions, ran = [], []
    inner = kernels.round_block
    monkeypatch.setattr(kernels, "round_block", lambda *args: (ran.append(1), inner(*args)))
    for use in (False, True):
        monkeypatch.setattr(kernels, "usable", lambda *_, use=use: use)
        solutions.append(solve(w, hessian, grid, block=128, column_term=columns, **options))
        assert bool(ran) is use
    return solutions


@pytest.mark.parametrize("act_order", ["off", "static", "gar", "dynamic"])
@pytest.mark.parametrize(
    ("rows", "n", "bits", "group"),
    [(48, 96, 3, 32), (33, 160, 2, 160), (7, 256, 4, 128), (70, 192, 2, 48)],
)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_same_codes_and_loss_as_the_plain_loop(
    monkeypatch, act_order, rows, n, bits, group, asymmetric
):
    w, a, d, diagonal = problem(rows, n, seed=n + bits)
    options = {"group": group, "act_order": act_order, "drift": d if asymmetric else None}
    plain, fused = both(monkeypatch, w, a, diagonal, Affine(bits), **options)
    assert float((plain.codes == fused.codes).float().mean()) >= SAME
    assert float((plain.scales == fused.scales).float().mean()) >= SAME
    assert torch.equal(plain.g_idx, fused.g_idx)
    losses = [weighted_loss(s.decode().cpu(), w, a) for s in (plain, fused)]
    assert losses[1] == pytest.approx(losses[0], rel=LOSS)


@pytest.mark.parametrize("grid", [Affine(4, symmetric=True), Affine(4, portable=True), Affine(8)])
def test_every_affine_grid(monkeypatch, grid):
    w, a, _, diagonal = problem(40, 128, seed=1)
    plain, fused = both(monkeypatch, w, a, diagonal, grid, group=64, act_order="gar")
    assert float((plain.codes == fused.codes).float().mean()) >= SAME


def test_against_optimal_brain_quantization(monkeypatch):
    w, a, d, diagonal = problem(16, 64, seed=2)
    codes, _, _ = brain_surgeon(
        w.numpy(), damped(a), 2, 32, drift=d.numpy(), alpha=0.25, inside=128
    )
    _, fused = both(monkeypatch, w, a, diagonal, Affine(2), drift=d, group=32, act_order="off")
    assert float((fused.codes.cpu().numpy() == codes).mean()) >= SAME


def test_wild_weights_stay_in_range(monkeypatch):
    """Values far beyond the grid, and halves, round as PyTorch rounds them."""
    w, a, _, diagonal = problem(8, 32)
    w[:, ::2] *= 1e6
    a = torch.diag(a.diagonal())
    plain, fused = both(monkeypatch, w, a, diagonal, Affine(3), group=32, act_order="static")
    assert torch.equal(plain.codes, fused.codes)


def test_a_block_too_wide_is_refused():
    wide, index = torch.zeros(kernels.BLOCK + 1, 4), torch.zeros(129, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 128"):
        kernels.round_block(wide, wide, wide.byte(), wide, wide, index, wide, None, 3)
