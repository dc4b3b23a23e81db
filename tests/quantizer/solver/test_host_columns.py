"""The columns rounded by NumPy on the CPU, against the tensors' own functions: the same bytes."""

import pytest
import torch

from tests.quantizer.solver.test_column_loop import problem
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.solver import host_columns
from vlmq_export.quantizer.solver.block_loop import solve_blocks
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.descent import descend
from vlmq_export.quantizer.solver.hessian import column_term, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def both(monkeypatch, call):
    """What `call` returns with the tensors' own functions, and with NumPy."""
    used = []
    rounding = host_columns.Rounding
    monkeypatch.setattr(host_columns, "Rounding", lambda *a: used.append(1) or rounding(*a))
    found = []
    for usable in (lambda *_: False, lambda *_: True):
        monkeypatch.setattr(host_columns, "usable", usable)
        found.append(call())
        assert bool(used) is usable(None)
    return found


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("grid", "act_order"),
    [
        (Affine(4), "gar"),
        (Affine(2), "dynamic"),
        (Affine(3, symmetric=True), "static"),
        (Affine(4, portable=True), "off"),
    ],
)
def test_an_affine_grid(monkeypatch, grid, act_order, asymmetric):
    w, a, d, diagonal = problem(37, 128, seed=3)
    w[5] = 0  # scales of 1
    hessian = prepare(a, diagonal, group=32, act_order=act_order, damp=0.01)
    term = column_term(hessian, d, 0.25) if asymmetric else None

    def call():
        options = {"group": 32, "act_order": act_order, "block": 64, "column_term": term}
        solution = solve(w, hessian, grid, **options)
        return descend(solution, w, hessian, grid, sweeps=3, refit=True)

    tensors, numbers = both(monkeypatch, call)
    for field in ("codes", "scales", "zero_points"):
        assert torch.equal(getattr(tensors, field), getattr(numbers, field))


@pytest.mark.parametrize("kind", sorted(kind for kind, grid in GRIDS.items() if not grid.levels))
def test_a_block_type(monkeypatch, kind):
    grid = GRIDS[kind]
    w, a, _, diagonal = problem(19, 256, seed=4)
    w[3], w[4, :64] = 0, 0  # a scale of 0, where all codes decode alike
    hessian = prepare(a, diagonal, group=grid.block, act_order="gar", damp=0.01)

    def call():
        return descend(solve_blocks(w, hessian, grid, block=128), w, hessian, sweeps=2)

    tensors, numbers = both(monkeypatch, call)
    assert torch.equal(tensors.codes, numbers.codes)
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors.params.fields(), numbers.params.fields())
        if a is not None
    )
