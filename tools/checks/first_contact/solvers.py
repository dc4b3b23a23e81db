"""Descent, the choice of ranges and block types on one matrix, without anything around them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tools.bench.solver import hessian
from tools.checks.first_contact.report import Report, Setting
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.solver.block_loop import solve_blocks
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.descent import descend
from vlmq_export.quantizer.solver.hessian import prepare, weighted_loss
from vlmq_export.quantizer.solver.ranges import best_range

TYPES = ("Q4_K", "Q6_K", "Q3_K")


@torch.no_grad()
def solvers(report: Report, at: Setting) -> None:
    """Each part once on weights [rows, columns], with its time and the loss that it leaves."""
    rows, columns = (64, 256) if at.small else (4608, 3584)
    draws = torch.Generator().manual_seed(0)
    matrix, diagonal = hessian(columns, draws, str(at.device))
    weights = (torch.randn(rows, columns, generator=draws) * 0.02).to(at.device)
    refine = METHODS["exact"].refine
    grid, group = Affine(4), 128
    ready = prepare(matrix, diagonal, group=group, act_order="gar", damp=0.01)

    def loop(target, fit=None, tries=1):
        options = {"group": group, "act_order": "gar", "block": 128}
        return solve(target, ready, grid, fit=fit, tries=tries, **options)

    def tell(name: str, call: Callable):
        start = _now(at)
        solution = call()
        taken = _now(at) - start
        loss = weighted_loss(solution.decode(), weights, matrix)
        line = f"{name}, {rows} × {columns}: {taken:.2f} s, loss {loss:.6g}"
        report.tell(line, name=name, rows=rows, columns=columns, taken=taken, loss=loss)
        return solution

    loop(weights[:32])  # compiles
    solution = tell("column loop", lambda: loop(weights))
    tell("descent", lambda: descend(solution, weights, ready, grid, sweeps=refine.sweeps))
    tell("judging ranges", lambda: best_range(loop, weights, grid, refine.shrink))
    for kind in TYPES:
        block = GRIDS[kind]
        held = prepare(matrix, diagonal, group=block.block, act_order="gar", damp=0.01)
        tell(kind, lambda g=block, h=held: solve_blocks(weights, h, g, block=128))


def _now(at: Setting) -> float:
    if at.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
