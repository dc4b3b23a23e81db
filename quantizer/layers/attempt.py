"""One attempt at a stack: the target, the terms and the ranges of a method, and the column loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.layers.stack import Rounded, Stack
from vlmq_export.quantizer.layers.vlm_ptq import modality_fit
from vlmq_export.quantizer.methods import Method
from vlmq_export.quantizer.solver import hessian as factored
from vlmq_export.quantizer.solver.block_loop import solve_blocks
from vlmq_export.quantizer.solver.column_loop import Fit, solve
from vlmq_export.quantizer.solver.descent import descend
from vlmq_export.quantizer.solver.hessian import Hessian
from vlmq_export.quantizer.solver.ranges import NEIGHBOURS, best_range


@dataclass(frozen=True)
class Prepared:
    """The statistics of a stack's inputs, factorized for its grid."""

    sums: Statistics
    hessian: Hessian
    # W' − W of the exact target with α = 1, [out, in]. None where the method has one stream, or
    # where the drift cannot be regressed on the inputs.
    shift: torch.Tensor | None


@dataclass(frozen=True)
class Attempt:
    """The solution of one matrix, and what the method chose on the way, for the manifest."""

    solution: Rounded
    chosen: dict


def prepared(stack: Stack, sums: Statistics, config: QuantConfig) -> Prepared:
    """Factorize A, and find where the exact target lies."""
    choice = stack.choice
    hessian = factored.prepare(
        sums.hessian,
        sums.diagonal,
        group=choice.group,
        act_order=choice.act_order,
        damp=config.damp,
        together=choice.together,
    )
    shift = None
    if sums.two_streams and not hessian.fallback:
        shift = factored.regression(sums.mismatch(stack.weights), hessian)
        shift = shift if bool(torch.isfinite(shift).all()) else None
    return Prepared(sums, hessian, shift)


def attempt(
    stack: Stack,
    known: Prepared,
    held: Statistics | None,  # of the samples put aside, for a method that finds α on them
    method: Method,
    config: QuantConfig,
    shares: Sequence[float] = (),  # α of each matrix, where it is known already
) -> list[Attempt]:
    """Solve every matrix of the stack by one method."""
    aim, shift, drift = stack.weights, known.shift, known.sums.drift
    terms = _Terms()
    chosen: list[dict] = [{} for _ in stack.sizes]
    alpha = config.alpha if method.alpha is None else method.alpha
    if shift is not None and drift is not None and method.drift == "columns":
        assert not isinstance(alpha, str), "α is found on held-out samples for exact targets alone"
        terms = _Terms(
            factored.column_term(known.hessian, drift, alpha),
            factored.own_term(known.hessian, drift, alpha) if method.own else None,
        )
    elif shift is not None and method.drift == "exact":
        shares = shares or _shares(stack, shift, held, alpha)
        parts = zip(stack.split(aim), shares, stack.split(shift))
        aim = torch.cat([w + a * s for w, a, s in parts])
        chosen = [{"alpha": round(share, 4)} for share in shares]
    grid = stack.choice.grid
    if isinstance(grid, BlockGrid):
        solution: Rounded = solve_blocks(
            aim,
            known.hessian,
            grid,
            block=config.block_size,
            column_term=terms.column,
            own_term=terms.own,
        )
        sweeps, refit = method.refine.sweeps, grid.lattice is not None
        solution = descend(solution, aim, known.hessian, sweeps=sweeps, refit=refit)
    else:
        fit, moves = None, moves_of(method, grid.bits, grid.symmetric)
        if method.ranges == "modality" and not known.hessian.fallback:
            fit, mixes = modality_fit(stack, grid, known.sums, moves)
            chosen = [{"mix": mix} for mix in mixes]
        solution = _affine(stack, grid, known.hessian, aim, terms, fit, moves, method, config)
    return [Attempt(part, found) for part, found in zip(stack.parts(solution), chosen)]


@dataclass(frozen=True)
class _Terms:
    """What the column loop adds for the drift between the streams."""

    column: torch.Tensor | None = None  # GPTAQ's P
    own: torch.Tensor | None = None  # VLM-PTQ's C


def _affine(
    stack: Stack,
    grid: Affine,
    hessian: Hessian,
    aim: torch.Tensor,  # [out, in]
    terms: _Terms,
    fit: Fit | None,
    moves: Sequence[int],
    method: Method,
    config: QuantConfig,
) -> Solution:
    """The column loop on an affine grid, with the method's ranges and descent."""
    choice, refine = stack.choice, method.refine

    def loop(target: torch.Tensor, fit: Fit | None, tries: int = 1) -> Solution:
        return solve(
            target,
            hessian,
            grid,
            group=choice.group,
            act_order=choice.act_order,
            block=config.block_size,
            column_term=terms.column,
            own_term=terms.own,
            fit=fit,
            tries=tries,
        )

    if refine.shrink:
        solution = best_range(loop, aim, grid, refine.shrink, moves)
    else:
        solution = loop(aim, fit)
    return descend(solution, aim, hessian, grid, sweeps=refine.sweeps, refit=refine.refit)


def moves_of(method: Method, bits: int, symmetric: bool) -> Sequence[int]:
    """Moves of the zero-point that a search of ranges tries."""
    return NEIGHBOURS if method.neighbours and bits <= 3 and not symmetric else (0,)


def _shares(
    stack: Stack, shift: torch.Tensor, held: Statistics | None, alpha: float | str
) -> list[float]:
    """α of each matrix: how much of the exact target's shift S = W' − W it takes.

    On samples put aside, ‖(W + αS)·X − W·X̃ − R‖² is least at α = ⟨S, W·D + R⟩/⟨S·A, S⟩, with A, D
    and R of those samples. α is then clamped to [0, 1].
    """
    if not isinstance(alpha, str):
        return [alpha] * len(stack.sizes)
    assert held is not None, "a method that finds α on held-out samples keeps some"
    pull = stack.split(held.mismatch(stack.weights) * shift)
    bend = stack.split((shift @ held.hessian) * shift)
    sums = [[float(x.sum(dtype=torch.float64)) for x in pair] for pair in zip(pull, bend)]
    return [min(max(p / b, 0.0), 1.0) if b > 0 else 0.0 for p, b in sums]
