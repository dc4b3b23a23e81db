"""The kernels against the plain loops, under Triton's interpreter or on a GPU.

PyTorch's CPU build has no Triton, and its wheel has 286 MB, so `make setup` leaves it out.
tools/checks/triton.sh installs it into an environment of its own and runs this file. On a machine
with a GPU tools/checks/gpu.sh tests the compiled kernel.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.oracle import brain_surgeon
from tests.quantizer.solver.test_column_loop import damped, problem
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.solver import kernels
from vlmq_export.quantizer.solver.block_loop import solve_blocks
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.descent import descend
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


def ways(monkeypatch, kernel, work):
    """What `work` returns without the kernels and with them, which have to run `kernel` then."""
    found, ran = [], []
    inner = getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda *args: (ran.append(1), inner(*args)))
    for use in (False, True):
        monkeypatch.setattr(kernels, "usable", lambda *_, use=use: use)
        found.append(work())
        assert bool(ran) is use
    return found


def both(monkeypatch, w, a, diagonal, grid, *, drift=None, **options):
    """Solutions of the plain loop and of the kernel under the same Hessian."""
    w, a, diagonal = (t.to(DEVICE) for t in (w, a, diagonal))
    group, act_order = options["group"], options["act_order"]
    hessian = prepare(a, diagonal, group=group, act_order=act_order, damp=0.01)
    columns = None if drift is None else column_term(hessian, drift.to(DEVICE), 0.25)
    options |= {"block": 128, "column_term": columns}
    return ways(monkeypatch, "round_block", lambda: solve(w, hessian, grid, **options))


def alike(one, two, w, a) -> None:
    """The codes are the same but for ties, and so is the loss."""
    assert float((one.codes == two.codes).float().mean()) >= SAME
    losses = [weighted_loss(s.decode().cpu(), w, a) for s in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=LOSS)


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
    alike(plain, fused, w, a)
    assert float((plain.scales == fused.scales).float().mean()) >= SAME
    assert torch.equal(plain.g_idx, fused.g_idx)


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


BLOCK_TYPES = [g for g in GRIDS.values() if not g.levels]


def on_blocks(w, a, diagonal, grid):
    """(hessian, work of the column loop) on a block type."""
    w, a, diagonal = (t.to(DEVICE) for t in (w, a, diagonal))
    hessian = prepare(a, diagonal, group=grid.block, act_order="gar", damp=0.01)
    return hessian, lambda: solve_blocks(w, hessian, grid, block=128)


@pytest.mark.parametrize("grid", BLOCK_TYPES, ids=lambda g: g.name)
def test_block_types_have_the_codes_of_the_plain_loop(monkeypatch, grid):
    w, a, _, diagonal = problem(20, 256, seed=3)
    w[:3] = 0  # scales of 0
    _, work = on_blocks(w, a, diagonal, grid)
    alike(*ways(monkeypatch, "round_block", work), w, a)


@pytest.mark.parametrize("act_order", ["gar", "dynamic"])
@pytest.mark.parametrize("grid", [Affine(2), Affine(4, portable=True), Affine(8, symmetric=True)])
def test_the_descent_has_the_codes_of_the_plain_one(monkeypatch, grid, act_order):
    w, a, _, diagonal = problem(37, 160, seed=4)
    w, a, diagonal = (t.to(DEVICE) for t in (w, a, diagonal))
    hessian = prepare(a, diagonal, group=32, act_order=act_order, damp=0.01)
    start = solve(w, hessian, grid, group=32, act_order=act_order, block=128)

    def work():
        return descend(start, w, hessian, grid, sweeps=3, refit=True)

    plain, fused = ways(monkeypatch, "descend_block", work)
    alike(plain, fused, w.cpu(), a.cpu())
    assert not torch.equal(start.codes, fused.codes)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q8_0"])
def test_the_descent_on_block_types_too(monkeypatch, name):
    grid = GRIDS[name]
    w, a, _, diagonal = problem(20, 256, seed=5)
    w[:3] = 0
    hessian, work = on_blocks(w, a, diagonal, grid)
    start, target = work(), w.to(DEVICE)
    descents = ways(monkeypatch, "descend_block", lambda: descend(start, target, hessian, sweeps=3))
    alike(*descents, w, a)


def test_lattices_stay_with_the_plain_loop():
    assert not kernels.usable(torch.device("cuda"), GRIDS["IQ2_XXS"])
    assert not kernels.usable(torch.device("cuda"), GRIDS["IQ4_NL"])
    assert kernels.usable(torch.device("cuda"), GRIDS["Q4_K"])
    assert not kernels.usable(torch.device("cpu"), GRIDS["Q4_K"])


def test_a_block_too_wide_is_refused():
    wide, index = torch.zeros(kernels.BLOCK + 1, 4), torch.zeros(129, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 128"):
        kernels.round_block(wide, wide, wide.byte(), wide, wide, index, wide, None, Affine(2))
    with pytest.raises(ValueError, match="at most 128"):
        kernels.descend_block(wide, wide, wide.byte(), wide, wide, wide, index, wide, Affine(2))


# What the interpreter does not see: whether the compiler takes the kernels. It needs no GPU.
COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vlmq_export.quantizer.solver import triton_kernels as kernels
TYPES = {"codes": "*u8", "group_of": "*i32", "centre": "fp32", "top": "fp32"}
TYPES |= dict.fromkeys(("columns", "rows", "stride"), "i32")
for kernel, more in ((kernels.round_block, {"HAS_TERM": True}), (kernels.descend_block, {})):
    for blocks in (False, True):
        constants = {"BLOCKS": blocks, "COLUMNS": 128, "ROWS": 32, **more}
        types = {n: TYPES.get(n, "*fp32") for n in kernel.arg_names}
        types |= dict.fromkeys(constants, "constexpr")
        compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32))
        print("compiled")
"""


def test_the_kernels_compile_for_an_h100():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["compiled"] * 4, done.stderr
