"""The matrices outside the decoder layers: the embedding, where the recipe quantizes it.

It is rounded to nearest, because nothing calibrates it. The search for its scales is long on a
vocabulary of 150 000 rows, so each piece of rows is kept as soon as it is fitted, and a run that is
resumed fits what is missing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from vlmq_export.quantizer.artifact.manifest import OUTER, ModuleRecord, layer_file
from vlmq_export.quantizer.artifact.read import read_layer
from vlmq_export.quantizer.artifact.write import write_layer
from vlmq_export.quantizer.config import EMBEDDING_TYPES
from vlmq_export.quantizer.grids.blocks import GRIDS, BlockGrid
from vlmq_export.quantizer.grids.choice import GridChoice
from vlmq_export.quantizer.grids.linears import Linear, stacked
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import Rounded, linear_of
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks, nearest_in_groups

PIECES = ".outer"  # folder of the pieces, one file each, until the matrices are whole
ROWS = 4096  # rows of a piece: as many are in float32 at once


def solve_outer(
    checkpoint: Checkpoint,
    job: Job,
    folder: Path,  # of the artifact, which is this run's
    device: torch.device,
    ranks: Ranks = ALONE,
) -> list[Linear]:
    """Fit these matrices on the device, and write them. What an earlier run wrote is read.

    Raises ArtifactError where that is damaged, and CheckpointError for weights that no float16
    scale of the grid reaches.
    """
    if not job.outer:
        return []
    pieces, count = folder / PIECES, 0
    solved: list[Linear] = []
    if (folder / layer_file(OUTER)).is_file():
        solved = read_layer(folder, OUTER)
    else:
        if ranks.first:
            pieces.mkdir(exist_ok=True)
        for name in job.outer:
            found, weight = [], checkpoint.tensor(f"{name}.weight")
            choice = job.grid(name, weight.shape[1])
            for rows in weight.split(ROWS):
                found.append(_piece(pieces, count, name, choice, rows.to(device), ranks))
                count += 1
            solved.append(stacked(found))
    ranks.count(0)  # until here another rank may be reading a piece
    if ranks.first and count:
        write_layer(folder, OUTER, solved, [ModuleRecord.of(q, OUTER, {}) for q in solved])
    if ranks.first:
        shutil.rmtree(pieces, ignore_errors=True)
    return solved


def _piece(
    pieces: Path, number: int, name: str, choice: GridChoice, rows: torch.Tensor, ranks: Ranks
) -> Linear:
    """Some rows of a matrix on the CPU: read if they are there already, else fitted and written."""
    if (pieces / layer_file(number)).is_file():
        (linear,) = read_layer(pieces, number)
        return linear
    linear = linear_of(name, _fitted(rows, choice).each(lambda t: t.cpu()), None, choice)
    if ranks.first:
        write_layer(pieces, number, [linear], [ModuleRecord.of(linear, number, {})])
    return linear


def _fitted(rows: torch.Tensor, choice: GridChoice) -> Rounded:
    """Rows of a matrix on its grid."""
    if isinstance(choice.grid, BlockGrid):
        return nearest_in_blocks(rows, choice.grid)
    return nearest_in_groups(rows, GRIDS[EMBEDDING_TYPES[choice.grid.bits]])
