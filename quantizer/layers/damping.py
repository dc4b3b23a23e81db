"""The damping that serves a stack best on samples that were put aside.

What a Hessian of few tokens says of the directions with little energy is mostly chance. A solve
that believes all of it does better on these samples than on any others. Damping is how much of it
is not believed, and no one share serves every linear: docs/methods.md §5.8 has figures. So each
stack looks for its own, from the recipe's damping up or down for as long as that helps:

1. The method solves some rows, from the samples that were not put aside, with less care (`trial`).
2. The damping that errs least on those that were is kept.
3. All rows are solved with it, from all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vlmq_export.quantizer.calibration.collect import Evidence
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid
from vlmq_export.quantizer.layers.attempt import Attempt, Prepared, attempt, prepared
from vlmq_export.quantizer.layers.stack import Stack
from vlmq_export.quantizer.methods import Method

TIMES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # dampings that may be chosen, of the recipe's
ROWS = 256  # most rows of a stack that the choice is made by
COARSE = 3  # bits per weight below which a lattice has few points


def damped_best(
    stack: Stack, evidence: Evidence, method: Method, config: QuantConfig
) -> tuple[Prepared, list[Attempt]]:
    """The statistics, factorized with the damping that was found, and the solved matrices.

    Gradients that follow (`--tune`) are stopped by the samples put aside, so that the solve before
    them does not see these. Where nothing was put aside, the damping is the recipe's.
    """
    fitted, held = evidence.fitted, evidence.held
    assert held is not None, "a method that looks for its damping puts samples aside"
    step = max(1, -(-len(stack.weights) // ROWS))
    some, quick = _one_matrix(stack, step), trial(method, stack.choice.grid)
    seen, unseen = fitted.of_rows(step), held.of_rows(step)

    def error(times: float) -> float:
        tried = replace(config, damp=times * config.damp)
        (part,) = attempt(some, prepared(some, seen, tried), unseen, quick, tried)
        return unseen.error(part.solution.decode(), some.weights)

    if fitted.tokens and held.tokens:
        config = replace(config, damp=lowest(error) * config.damp)
    known = prepared(stack, fitted if method.tuned else evidence.everything, config)
    return known, attempt(stack, known, held, method, config)


def trial(method: Method, grid: Affine | BlockGrid | None) -> Method:
    """The method with one sweep of the descent, and no moved zero-points.

    What these gain is nearly the same at every damping: comparing dampings with them takes up to
    twice as long, and chooses no better. The points of 2-bit lattices are so far apart that sweeps
    gain more at one damping than at another, and all are taken there (docs/performance.md).
    """
    sweeps = min(1, method.refine.sweeps)
    blocks = grid if isinstance(grid, BlockGrid) else None
    if blocks and blocks.lattice is not None and blocks.bits_per_weight < COARSE:
        sweeps = method.refine.sweeps
    return replace(method, neighbours=False, refine=replace(method.refine, sweeps=sweeps))


def lowest(error: Callable[[float], float]) -> float:
    """The element of TIMES with the least error, which has one valley: found from 1 on."""
    best = TIMES.index(1.0)
    least = error(TIMES[best])
    for step in (1, -1):
        start = best
        while 0 <= best + step < len(TIMES) and (now := error(TIMES[best + step])) < least:
            best, least = best + step, now
        if best != start:
            break
    return TIMES[best]


def _one_matrix(stack: Stack, step: int) -> Stack:
    """Every so many-th row of a stack, as one matrix."""
    rows = stack.weights[::step]
    return Stack([stack.names[0]], rows, [len(rows)], stack.choice)
