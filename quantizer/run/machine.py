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
from vlmq_export.quantizer.grids.solutions import BlockSolution, Solution
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.descent import Descent
from vlmq_export.quantizer.solver.hessian import Hessian, prepare
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
    points: Table = field(default_factory=dict)  # as `sweeps`, on a lattice, if the run has one

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

    def sweep(self, rows: float, *, on_lattice: bool = False) -> float:
        """Seconds for one column of a sweep."""
        return rows * at(self.points if on_lattice else self.sweeps, rows)

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
    probe = _Probe(device, clock)
    grids = [GRIDS[kind] for kind in sorted(types)]
    lattice = next((g for g in grids if g.lattice is not None), None)
    grid = next((g for g in grids if g.lattice is None), Affine(4))
    return Machine(
        products={side: probe.product(side) for side in (32, 128, 512, 2048)},
        factors={size: probe.factor(size) for size in (128, 512, 1536)},
        passes={elements: probe.elementwise(elements) for elements in (2**14, 2**18, 2**24)},
        call=probe.call(),
        columns={rows: probe.column(rows) for rows in (64, 1024, 16384, 65536)},
        sweeps={rows: probe.sweep(rows, grid) for rows in (64, 1024, 8192)},
        fits={grid.name: probe.fit(grid) for grid in grids},
        points={rows: probe.sweep(rows, lattice) for rows in (64, 1024)} if lattice else {},
    )


@dataclass(frozen=True)
class _Probe:
    """Small pieces of a run's work on one device, and how long they take."""

    device: torch.device
    clock: Clock

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """The shortest of several runs of `work`."""
        taken = []
        for _ in range(repeats):
            _wait(self.device)
            start = self.clock()
            work()
            _wait(self.device)
            taken.append(self.clock() - start)
        return max(min(taken), 1e-9)

    def drawn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device)

    def several(self, *shape: int) -> list[torch.Tensor]:
        """So many tensors that they do not fit into caches together."""
        return [self.drawn(*shape) for _ in range(max(1, 2**22 // math.prod(shape)))]

    def hessian(self, size: int) -> Hessian:
        x = self.drawn(2 * size, size)
        matrix = x.T @ x
        return prepare(matrix, matrix.diagonal(), group=size, act_order="off", damp=0.01)

    def product(self, side: int) -> float:
        """FLOP/s of a linear with so many inputs and outputs."""
        weight, inputs = self.drawn(side, side), self.several(_TOKENS, side)
        taken = self.seconds(lambda: [torch.nn.functional.linear(x, weight) for x in inputs])
        return 2 * _TOKENS * side**2 * len(inputs) / taken

    def factor(self, size: int) -> float:
        """FLOP/s of a factorization."""
        x = self.drawn(size, size)
        matrix = (x @ x.T / size + torch.eye(size, device=self.device)).double()
        return size**3 / 3 / self.seconds(lambda: torch.linalg.cholesky_ex(matrix))

    def elementwise(self, elements: int) -> float:
        """Seconds an element of what layers do: a product, a function, and a sum of squares.

        All results live until the last is there.
        """
        inputs = self.several(elements)
        taken = self.seconds(lambda: [(x * x, x.sigmoid(), x.square().sum()) for x in inputs])
        return taken / 4 / elements / len(inputs)

    def call(self) -> float:
        """Seconds of one small operation."""
        few, calls = self.drawn(1, 8), 200
        return self.seconds(lambda: [few.mul(few) for _ in range(calls)]) / calls

    def column(self, rows: int) -> float:
        """Seconds for one weight of the loop on an affine grid, from one group of columns."""
        weights, hessian = self.drawn(rows, COLUMNS), self.hessian(COLUMNS)

        def work() -> Solution:
            return solve(weights, hessian, Affine(4), group=COLUMNS, block=COLUMNS, act_order="off")

        return self.seconds(work, 3 if rows < 2**14 else 2) / weights.numel()

    def sweep(self, rows: int, grid: Affine | BlockGrid) -> float:
        """Seconds for one weight of a sweep, from one leaf of columns or one block of them."""
        columns = grid.block if isinstance(grid, BlockGrid) else LEAF
        weights, matrix = self.drawn(rows, columns), self.hessian(columns).matrix
        if isinstance(grid, BlockGrid):
            state = Descent(self.ones(rows, grid), weights, matrix, None)
        else:
            state = Descent(round_to_nearest(weights, grid, group=LEAF), weights, matrix, grid)
        return self.seconds(state.sweep, 2) / weights.numel()

    def ones(self, rows: int, grid: BlockGrid) -> BlockSolution:
        """One block a row, whose scales are ones."""
        unit = torch.ones(rows, 1, device=self.device).half()
        scales = torch.ones(rows, grid.block // grid.sub_block, device=self.device).to(torch.int16)
        params = Params(unit, scales, *((unit, scales) if grid.affine else ()))
        codes = torch.zeros(rows, grid.block, dtype=torch.uint8, device=self.device)
        return BlockSolution(grid, codes, params)

    def fit(self, grid: BlockGrid) -> float:
        """Seconds to fit the scales of one weight on a block type."""
        weights = self.drawn(2**15 // grid.block, grid.block)
        importance = torch.ones(grid.block, device=self.device)
        return self.seconds(lambda: fit_blocks(grid, weights, importance)) / weights.numel()


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
