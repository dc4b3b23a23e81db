"""The matrices outside the decoder layers: the embedding, where the recipe names a block type.

It is rounded to nearest, because nothing calibrates it. The search for a block's scales is long on
a vocabulary of 150 000 rows, so each piece of rows is kept as soon as it is fitted, and a run that
is resumed fits what is missing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from vlmq_export.quantizer.artifact.manifest import OUTER, ModuleRecord, layer_file
from vlmq_export.quantizer.artifact.read import read_layer
from vlmq_export.quantizer.artifact.write import write_layer
from vlmq_export.quantizer.grids.blocks import GRIDS, BlockGrid, Params
from vlmq_export.quantizer.grids.linears import BlockLinear
from vlmq_export.quantizer.grids.solutions import BlockSolution
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import linear_of
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks

PIECES = ".outer"  # folder of the pieces, one file each, until the matrices are whole
ROWS = 4096  # rows of a piece: as many are in float32 at once


def solve_outer(
    checkpoint: Checkpoint,
    job: Job,
    folder: Path,  # of the artifact, which is this run's
    device: torch.device,
    ranks: Ranks = ALONE,
) -> list[BlockLinear]:
    """Fit these matrices on the device, and write them. What an earlier run wrote is read.

    Raises ArtifactError where that is damaged, and CheckpointError for weights that no float16 unit
    of the type reaches.
    """
    calibrated = {*job.linears, job.head}
    types = {n: GRIDS[kind] for n, kind in job.config.types.items() if n not in calibrated}
    if not types:
        return []
    pieces, count = folder / PIECES, 0
    solved: list[BlockLinear] = []
    if (folder / layer_file(OUTER)).is_file():
        solved = [linear for linear in read_layer(folder, OUTER) if isinstance(linear, BlockLinear)]
    else:
        if ranks.first:
            pieces.mkdir(exist_ok=True)
        for name, grid in types.items():
            found, weight = [], checkpoint.tensor(f"{name}.weight")
            for rows in weight.split(ROWS):
                found.append(_piece(pieces, count, name, grid, rows.to(device), ranks))
                count += 1
            linear = linear_of(name, _joined(grid, found), None, job.grid(name, weight.shape[1]))
            assert isinstance(linear, BlockLinear), "the recipe names a block type"
            solved.append(linear)
    ranks.count(0)  # until here another rank may be reading a piece
    if ranks.first and count:
        write_layer(folder, OUTER, solved, [ModuleRecord.of(q, OUTER, {}) for q in solved])
    if ranks.first:
        shutil.rmtree(pieces, ignore_errors=True)
    return solved


def _piece(
    pieces: Path, number: int, name: str, grid: BlockGrid, rows: torch.Tensor, ranks: Ranks
) -> BlockSolution:
    """Some rows of a matrix on the CPU: read if they are there already, else fitted and written."""
    if (pieces / layer_file(number)).is_file():
        (linear,) = read_layer(pieces, number)
        assert isinstance(linear, BlockLinear)
        return linear.solution
    fitted = nearest_in_blocks(rows, grid)
    params = fitted.params.each(lambda p: p.cpu())
    linear = BlockLinear(name, BlockSolution(grid, fitted.codes.cpu(), params), None)
    if ranks.first:
        write_layer(pieces, number, [linear], [ModuleRecord.of(linear, number, {})])
    return linear.solution


def _joined(grid: BlockGrid, pieces: list[BlockSolution]) -> BlockSolution:
    """Pieces one below the other."""
    params = Params.joined([piece.params for piece in pieces], 0)
    return BlockSolution(grid, torch.cat([piece.codes for piece in pieces]), params)
