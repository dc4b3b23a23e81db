"""The innermost step of the loop and of the descent on the CPU, by NumPy on the tensors' memory.

A column of a few hundred weights is rounded by about ten operations, and a call of PyTorch takes
longer than the arithmetic in it. NumPy's calls take a third of that. They are the same IEEE
operations in the same order as `encode` and `decode` of the grid, so that the bytes are the same.
"""

from __future__ import annotations

import numpy as np
import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid

# PyTorch splits longer columns among its threads. (at::internal::GRAIN_SIZE)
LONGEST = 2**15


def usable(columns: torch.Tensor, grid: Affine | BlockGrid) -> bool:
    """Whether columns, [columns, out], are rounded here: to levels that are evenly spaced."""
    uneven = isinstance(grid, BlockGrid) and bool(grid.levels)
    return columns.device.type == "cpu" and columns.shape[1] <= LONGEST and not uneven


class Rounding:
    """Rounds one column after another. `use` comes first, and again where the scales change."""

    def __init__(self, grid: Affine | BlockGrid, rows: int):
        self._top = np.float32(grid.top)
        self._centre = None if isinstance(grid, Affine) else np.float32(grid.centre)
        self._decoded = np.empty(rows, np.float32)

    def use(self, scale: torch.Tensor, offset: torch.Tensor) -> None:
        """Scales and offsets (zero-points, or minima of a block type) of the columns to come."""
        self._scale, self._offset = scale.numpy(), offset.numpy()
        if self._centre is None:
            self._shift, self._divisor, self._zeros = self._offset, self._scale, None
            return
        zeros = self._scale == 0
        self._shift = self._centre
        self._divisor = np.where(zeros, np.float32(1), self._scale)
        self._zeros = zeros if zeros.any() else None

    def __call__(self, weights: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Fill `codes` for the weights, float32 [out] both. Returns what they decode to.

        The result is overwritten by the next call.
        """
        work = self._decoded
        if self._centre is not None:
            weights = np.add(weights, self._offset, out=work)
        np.divide(weights, self._divisor, out=work)
        if self._zeros is not None:
            work[self._zeros] = 0
        np.rint(work, out=work)
        np.add(work, self._shift, out=work)
        np.maximum(work, np.float32(0), out=codes)
        np.minimum(codes, self._top, out=codes)
        np.subtract(codes, self._shift, out=work)
        np.multiply(work, self._scale, out=work)
        if self._centre is not None:
            np.subtract(work, self._offset, out=work)
        return work


class Left:
    """What the loop leaves of each row under A, float32 [out], column after column.

    Under A + λI it is Σ_j d_j·(v_j − ŵ_j)², of which λ·Σ_j (t_j − ŵ_j)² is the damping's part. The
    letters are those of column_loop.py.
    """

    def __init__(self, rows: int, pivots: torch.Tensor, ridge: float):
        self.error = np.zeros(rows, np.float32)
        self._pivots, self._ridge = pivots.numpy(), np.float32(-ridge)
        self._term = np.empty(rows, np.float32)

    def add(self, column: int, free: np.ndarray, apart: np.ndarray) -> None:
        """Count a column of the loop's order: v_j − ŵ_j and t_j − ŵ_j, float32 [out] both."""
        for error, share in ((free, self._pivots[column]), (apart, self._ridge)):
            np.multiply(error, error, out=self._term)
            np.multiply(self._term, share, out=self._term)
            np.add(self.error, self._term, out=self.error)
