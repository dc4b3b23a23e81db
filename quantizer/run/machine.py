"""What this machine does in a second, measured in about two seconds, for the plan of time.

A rate is measured at several sizes, because small tensors are slow, and is read off in between.
Steps that a count of operations would miss are measured on the solver's own functions.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from vlmq_export.quantizer.arithmetic import exact_arithmetic
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.block_fit import fit_blocks
from vlmq_export.quantizer.grids.blocks import GRIDS, BlockGrid, Params
from vlmq_export.quantizer.grids.solutions import BlockSolution
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.descent import Descent
from vlmq_export.quantizer.solver.hessian import prepare
from vlmq_export.quantizer.solver.nearest import round_to_nearest

Clock = Callable[[], float]
Table = Mapping[int, float]  # size → a figure there
COLUMNS = 128  # of a probe of the loop: one group, and so one leaf or several
LEAF = 64  # columns of a probe of the descent
_TOKENS = 1024  # rows of a probe's product


@dataclass(frozen=True)
class Machine:
    """Rates and costs of one device. A table is read between its sizes, and level outside them."""

    products: Table  # the smallest side of a float32 product → FLOP/s
    factors: Table  # columns → FLOP/s of the float64 factorization
    passes: Table  # elements → seconds for one element, read and written once, in float32
    call: float  # seconds of one operation on next to nothing
    # Rows → seconds for one weight of the loop, without the products between groups of columns.
    columns: Table
    sweeps: Table  # rows → seconds for one weight of a sweep of the descent, likewise
    fits: Mapping[str, float] = field(default_factory=dict)  # block type → seconds for a weight

    def product(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of a float32 product [rows, inner] · [inner, columns]."""
        if not rows * inner * columns:
            return 0.0
        return 2 * rows * inner * columns / at(self.products, min(rows, inner, columns))

    def factorization(self, size: int) -> float:
        """Seconds of the float64 Cholesky factorization of a matrix [size, size]."""
        return size**3 / 3 / at(self.factors, size)

    def column(self, rows: float) -> float:
        """Seconds for one column of the loop."""
        return rows * at(self.columns, rows)

    def sweep(self, rows: float) -> float:
        """Seconds for one column of a sweep."""
        return rows * at(self.sweeps, rows)

    def elementwise(self, elements: float, each: float | None = None) -> float:
        """Seconds of passes over so many elements, in tensors of `each` elements."""
        return elements * at(self.passes, elements if each is None else each)


def at(table: Table, size: float) -> float:
    """The figure at a size, on straight lines between the logarithms of the measured points."""
    sizes = sorted(table)
    place = bisect_left(sizes, size)
    if place in (0, len(sizes)):
        return table[sizes[max(0, place - 1)]]
    low, high = sizes[place - 1], sizes[place]
    share = math.log(size / low) / math.log(high / low)
    return table[low] ** (1 - share) * table[high] ** share


@torch.no_grad()
@exact_arithmetic()
def measured(
    device: torch.device,
    types: Collection[str] = (),  # block types that the run solves on
    clock: Clock = time.perf_counter,
) -> Machine:
    """The rates of this machine where nothing else runs: of equal probes the shortest counts."""

    def seconds(work: Callable[[], object], repeats: int = 3) -> float:
        taken = []
        for _ in range(repeats):
            _wait(device)
            start = clock()
            work()
            _wait(device)
            taken.append(clock() - start)
        return max(min(taken), 1e-9)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    def several(*shape: int) -> list[torch.Tensor]:
        """So many tensors that they do not fit into caches together."""
        return [drawn(*shape) for _ in range(max(1, 2**22 // math.prod(shape)))]

    def product(side: int) -> float:
        weight, inputs = drawn(side, side), several(_TOKENS, side)
        taken = seconds(lambda: [torch.nn.functional.linear(x, weight) for x in inputs])
        return 2 * _TOKENS * side**2 * len(inputs) / taken

    def factor(size: int) -> float:
        x = drawn(size, size)
        a = (x @ x.T / size + torch.eye(size, device=device)).double()
        return size**3 / 3 / seconds(lambda: torch.linalg.cholesky_ex(a))

    def each(elements: int) -> float:
        # What layers do: a product, a function, a sum. All results live until the last is there.
        inputs = several(elements)
        taken = seconds(lambda: [(x * x, torch.sigmoid(x), x.square().sum()) for x in inputs])
        return taken / 4 / elements / len(inputs)

    grid = GRIDS[min(types)] if types else Affine(4)
    few = drawn(1, 8)
    calls = 200
    call = seconds(lambda: [few.mul(few) for _ in range(calls)]) / calls
    return Machine(
        products={side: product(side) for side in (32, 128, 512, 2048)},
        factors={size: factor(size) for size in (128, 512, 1536)},
        passes={elements: each(elements) for elements in (2**14, 2**18, 2**24)},
        call=call,
        columns={rows: _column(rows, drawn, seconds) for rows in (64, 1024, 16384, 65536)},
        sweeps={rows: _sweep(rows, grid, drawn, seconds) for rows in (64, 1024, 8192)},
        fits={kind: _fit(kind, drawn, seconds) for kind in sorted(types)},
    )


def _column(rows: int, drawn: Callable, seconds: Callable) -> float:
    """Seconds for one weight of the loop on an affine grid, from one group of columns."""
    grid, weights = Affine(4), drawn(rows, COLUMNS)
    hessian = _hessian(COLUMNS, drawn)
    options = {"group": COLUMNS, "act_order": "off", "block": COLUMNS}
    repeats = 3 if rows < 2**14 else 2
    return seconds(lambda: solve(weights, hessian, grid, **options), repeats) / weights.numel()


def _sweep(rows: int, grid: Affine | BlockGrid, drawn: Callable, seconds: Callable) -> float:
    """Seconds for one weight of a sweep, from one leaf of columns or one block of them."""
    columns = grid.block if isinstance(grid, BlockGrid) else LEAF
    weights, hessian = drawn(rows, columns), _hessian(columns, drawn)
    if isinstance(grid, BlockGrid):
        sub = torch.ones(rows, columns // grid.sub_block, dtype=torch.int16)
        ones = torch.ones(rows, 1).half()
        affine = (ones, sub) if grid.affine else ()
        params = Params(ones, sub, *affine).each(lambda p: p.to(weights.device))
        codes = torch.zeros(rows, columns, dtype=torch.uint8, device=weights.device)
        state = Descent(BlockSolution(grid, codes, params), weights, hessian.matrix, None)
    else:
        start = round_to_nearest(weights, grid, group=LEAF)
        state = Descent(start, weights, hessian.matrix, grid)
    return seconds(state.sweep, 2) / weights.numel()


def _hessian(size: int, drawn: Callable):
    x = drawn(2 * size, size)
    matrix = x.T @ x
    options = {"group": size, "act_order": "off", "damp": 0.01}
    return prepare(matrix, matrix.diagonal(), **options)


def _fit(kind: str, drawn: Callable, seconds: Callable) -> float:
    """Seconds to fit the scales of one weight on a block type."""
    grid = GRIDS[kind]
    weights = drawn(2**15 // grid.block, grid.block)
    importance = torch.ones(grid.block, device=weights.device)
    return seconds(lambda: fit_blocks(grid, weights, importance)) / weights.numel()


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
