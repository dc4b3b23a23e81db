"""How long the linears of a group take, from their inputs to integers.

Products are counted as floating-point operations, and everything else as passes over tensors. The
counts stand beside the constants, as read from the code that they are of.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.layers.damping import ROWS, trial
from vlmq_export.quantizer.layers.scaling.channel_scales import ROUNDS
from vlmq_export.quantizer.layers.vlm_ptq import MIXES
from vlmq_export.quantizer.methods import METHODS, Method
from vlmq_export.quantizer.run.machine import COLUMNS, LEAF
from vlmq_export.quantizer.run.work import Linears, Seconds, Work, add
from vlmq_export.quantizer.solver.ranges import SHRINK, rows_at_once

_INPUT_PASSES = 6  # over the inputs of a linear in its sums: weighted, squared, drift
_SUM_PASSES = 4  # over a sum for each batch: it is float64, and the product float32
_SQUARE_PASSES = 16  # over a Hessian: made, mirrored, to float32, ordered in float64, factor
_WEIGHT_PASSES = 40  # over the weights of a linear: target, order, decoded, metrics, packed
_RANGE_PASSES = 2  # over the rows under all ranges: repeated, and zeros for their errors
_JUDGE_PASSES = 7  # over their columns in the loop: v − ŵ, two squares that are weighed and added
_DAMPINGS = 10 / 3  # that a stack tries: three if the recipe's is the best, four beside it
_SCALE_PASSES = 10  # over weights for the slopes of scales: float32, scaled, |·|, max, powers, sums
_SEARCH_PASSES = 8  # over weights for one range that is judged before the loop: codes, error, sum


def solved_seconds(work: Work, group: Linears, *, first: bool = False) -> dict[str, float]:
    """The linears of a group, the first of its layer or another, from their inputs to integers."""
    found = Seconds(float)
    for names in _units(work, group, first=first):
        if work.method.calibrated:
            alone = group.rows[names[0]] if len(names) == 1 else 0
            found["statistics"] += statistics_seconds(work, group.columns, alone)
        # Linears of one type are solved as one matrix.
        stacks: Counter[str] = Counter()
        for i in names:
            stacks[group.types[i]] += group.rows[i]
        for kind, rows in stacks.items():
            for method in _attempts(work.method):
                add(found, _stack(work, method, rows, group.columns, kind))
    return found


def smoothing_seconds(work: Work, group: Linears, *, first: bool = False) -> float:
    """The scales of what enters the linears of a group: pivots in float32, then rounds over W."""
    m, weights = work.machine, sum(group.rows) * group.columns
    squares = len(_units(work, group, first=first))
    rounds = m.elementwise((ROUNDS + 1) * _SCALE_PASSES * weights)
    return squares * m.factorization(group.columns) / 2 + rounds


def _attempts(method: Method) -> list[Method]:
    """The methods that a stack is solved by: candidates, and the last of them once more."""
    tried = [METHODS[name] for name in method.candidates]
    return [*tried, *tried[-1:]] or [method]


def _units(work: Work, group: Linears, *, first: bool) -> list[list[int]]:
    """Linears that share their statistics. Those whose tokens are weighed have their own."""
    every = list(range(len(group.rows)))
    weighs = work.method.importance != "none" and (first or work.method.weighs == "all")
    return [[i] for i in every] if weighs else [every]


def statistics_seconds(work: Work, columns: int, alone: int = 0) -> float:
    """A, of which little more than half is computed, and D, or what an output should make up for.

    alone: outputs of a linear that shares these with no other.
    """
    m, batches = work.machine, len(work.batches)
    few = bool(alone) and work.method.sums_outputs(alone, columns)
    beside = 0 if work.method.drift == "plain" else alone if few else columns
    sums = min(1.0, 0.5 + 512 / columns) + beside / columns
    mean = work.lengths.tokens / max(1, batches)
    return (
        (work.through(alone, columns) if few else 0)
        + batches * m.product(columns, mean, columns * sums)
        + work.moved(_INPUT_PASSES, columns)
        + batches * m.elementwise(_SUM_PASSES * sums * columns**2, columns**2)
    )


def _stack(work: Work, method: Method, rows: int, columns: int, kind: str) -> dict[str, float]:
    """Linears that are solved as one matrix [rows, columns]."""
    m, found = work.machine, Seconds(float)
    found["metrics"] += m.elementwise(_WEIGHT_PASSES * rows * columns)
    if kind:  # what rounding to nearest would have left
        found["block types"] += m.fits[kind] * rows * columns
    if not method.solves:
        return found
    found["metrics"] += 3 * m.product(rows, columns, columns)
    add(found, solve_seconds(work, method, rows, columns, kind))
    if method.damping == "held-out":
        quick = trial(method, GRIDS.get(kind))
        few = replace(work, tries=len(quick.refine.shrink))
        some = solve_seconds(few, quick, min(rows, ROWS), columns, kind)
        add(found, {phase: _DAMPINGS * seconds for phase, seconds in some.items()})
    return found


def solve_seconds(
    work: Work, method: Method, rows: int, columns: int, kind: str
) -> dict[str, float]:
    """One solve of a matrix [rows, columns], from the sums to its codes."""
    m, found = work.machine, Seconds(float)
    square = m.product(rows, columns, columns)  # W·A
    if kind:
        found["block types"] += m.fits[kind] * rows * columns
    found["factorization"] += m.factorization(columns)
    found["factorization"] += m.elementwise(_SQUARE_PASSES * columns**2)
    if method.drift != "plain":
        # Two triangular solves of half as much as W·D, which is not formed where outputs are summed
        found["factorization"] += (2 - method.sums_outputs(rows, columns)) * square
    if method.drift == "columns":  # two triangular solves for each row, from the row's place on
        found["factorization"] += m.product(columns, columns, columns) / 3
    if method.ranges == "modality":
        searched = len(SHRINK) * (1 + len(MIXES)) * _SEARCH_PASSES
        found["ranges"] += m.elementwise(searched * rows * columns, COLUMNS * rows)
    many = max(1, work.tries) if method.refine.shrink and not kind else 1
    found["column loop"] += _loop(work, method, rows * many, columns, kind)
    if many > 1:
        at_once = many * min(rows, rows_at_once("cpu", many, columns))
        found["ranges"] += m.elementwise(_RANGE_PASSES * many * rows * columns, at_once * columns)
        found["ranges"] += m.elementwise(_JUDGE_PASSES * many * rows * columns, at_once)
    if method.refine.sweeps:
        found["descent"] += _descent(work, method, rows, columns, kind)
    return found


def _loop(work: Work, method: Method, rows: int, columns: int, kind: str) -> float:
    """The column loop on [rows, columns], as many rows at once as the search of ranges takes.

    On a lattice a point is searched as in a sweep.
    """
    m = work.machine
    at_once = min(rows, rows_at_once("cpu", 1, columns))
    each = m.sweep(at_once, on_lattice=True) if _on_lattice(kind) else m.column(at_once)
    own = columns * each * rows / at_once
    products, half = 0.0, columns / 2
    while half >= COLUMNS:
        products += columns / half / 2 * m.product(rows, half, half)
        half /= 2
    return own + products * (2 if method.drift == "columns" else 1)


def _on_lattice(kind: str) -> bool:
    return bool(kind) and GRIDS[kind].lattice is not None


def _descent(work: Work, method: Method, rows: int, columns: int, kind: str) -> float:
    """Sweeps over [rows, columns], each of which moves the gradient of every column along."""
    m, sweeps = work.machine, method.refine.sweeps
    each = columns * m.sweep(rows, on_lattice=_on_lattice(kind))
    moved = columns / LEAF * m.product(rows, LEAF, columns)
    return sweeps * (each + moved) + m.product(rows, columns, columns)
