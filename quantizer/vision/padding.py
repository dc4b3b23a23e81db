"""Rows that groups of 32 columns do not fill: solved with columns of zeros behind them.

A column of zeros in the weights and in the inputs is dead: no other column sees it, it does not
count in the damping, and it does not widen the range of its group. What is cut off after the solve
is nothing but zeros. The last group of a row is then shorter than the others, and its integers are
those that it would have without the padding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from vlmq_export.quantizer.config import VISION_GROUP
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import Solved


def missing(columns: int) -> int:
    """How many columns a row lacks to whole groups."""
    return -columns % VISION_GROUP


def filled(rows: torch.Tensor) -> torch.Tensor:
    """[..., in] → [..., whole groups], with zeros behind each row."""
    return pad(rows, (0, missing(rows.shape[-1]))) if missing(rows.shape[-1]) else rows


def fitting(job: Job, columns: int) -> Job:
    """The job for rows of so many columns: those that are filled are on an affine grid.

    They may be as wide as a block type wants, and are not in the source.
    """
    config = job.config
    if not missing(columns):
        return job
    return replace(job, config=replace(config, vision_bits=config.vision.bits, vision_type=""))


def cut(solved: Solved, columns: int) -> Solved:
    """The solution of a matrix that was filled, with its first `columns` columns alone."""
    linear, metrics = solved
    if not missing(columns):
        return solved
    assert isinstance(linear, QuantizedLinear), "filled rows are on an affine grid"
    s = linear.solution
    codes = s.codes[:, :columns].contiguous()
    energy = None if linear.energy is None else linear.energy[:columns].contiguous()
    if "dead_columns" in metrics:
        metrics = metrics | {"dead_columns": metrics["dead_columns"] - missing(columns)}
    own = replace(s, codes=codes, g_idx=s.g_idx[:columns].contiguous())
    return replace(linear, solution=own, energy=energy), metrics
