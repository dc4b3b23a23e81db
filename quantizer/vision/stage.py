"""The vision tower and the projector, quantized before the decoder sees an image.

Their linears are solved as a whole, and written into one file. A run that is resumed reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch

from vlmq_export.quantizer.artifact.manifest import VISION, ModuleRecord, layer_file
from vlmq_export.quantizer.artifact.read import read_layer
from vlmq_export.quantizer.artifact.write import write_layer
from vlmq_export.quantizer.calibration.batches import HELD_OUT
from vlmq_export.quantizer.calibration.layer_walk import put
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import Matrix, Solved
from vlmq_export.quantizer.layers.unit import solve_unit
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel, WeightFiles, tower_linears
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.vision.padding import cut, filled, fitting, missing
from vlmq_export.quantizer.vision.tower import FINE, quantize_tower, tower_job
from vlmq_export.quantizer.vision.walk import Picture, TowerWalk

# A tower is calibrated on COUNTED samples. With FINE bits it is on so many that each linear sees
# ROWS rows for every input, and on FEWEST at least. With 128 and 86 of them the first reference's
# tower at 8 bits costs a KL of .6 and 1.2 · 10⁻⁶, and the second's 7.8 and 9.5 (to nearest: 4.6 and
# 65); at 4 bits it would be .23 and .37, and 2.1 and 3.0 · 10⁻³.
ROWS = 4
FEWEST = 32
COUNTED = 128


def tower_names(checkpoint: Checkpoint | WeightFiles, *, short: bool = False) -> list[str]:
    """Hub names of the tower's and the projector's linears that are to be quantized.

    A group has 32 columns. Linears whose rows groups do not fill stay float in every format of a
    run. Where the last group of a row may be `short`, the second matrix of an MLP is taken all the
    same: it reads what a linear before it in its module writes. ggml's blocks have 32 columns too,
    and only there can both sides be filled up with zeros.
    """
    shapes = {n: checkpoint.info(f"{n}.weight").shape for n in tower_linears(checkpoint)}
    taken, before = [], []  # before: (module, out, in)
    for name, (out, columns) in shapes.items():
        module = name.rpartition(".")[0]
        inner = any(m == module and wide == columns != own for m, wide, own in before)
        if not missing(columns) or (short and inner):
            taken.append(name)
        before.append((module, out, columns))
    return taken


def solve_vision(
    model: StreamedModel,
    names: Sequence[str],  # hub names of the linears that the recipe quantizes
    samples: Sequence[Sample],
    job: Job,
    folder: Path,  # of the artifact, which is this run's
    shelf: Shelf,
    ranks: Ranks = ALONE,
    tell: Callable[[int, int], None] = lambda *_: None,  # steps done, steps in all
) -> list[Linear]:
    """Solve these linears and write them. What an earlier run wrote is read.

    Raises ArtifactError where the file is damaged, CalibrationError where no sample has finite
    activations.
    """
    if not names:
        return []
    if (folder / layer_file(VISION)).is_file():
        return read_layer(folder, VISION)
    solved = solved_tower(model, names, samples, job, shelf, ranks, tell)
    linears = [linear for linear, _ in solved]
    if ranks.first:
        records = [ModuleRecord.of(linear, VISION, metrics) for linear, metrics in solved]
        write_layer(folder, VISION, linears, records)
    return linears


def solved_tower(
    model: StreamedModel,
    names: Sequence[str],  # hub names of the linears that are to be quantized
    samples: Sequence[Sample],
    job: Job,
    shelf: Shelf,
    ranks: Ranks = ALONE,
    tell: Callable[[int, int], None] = lambda *_: None,  # steps done, steps in all
) -> list[Solved]:
    """These linears, solved. One that no image comes by is left out, and stays float.

    Raises CalibrationError where no sample has finite activations.
    """
    own = tower_job(job)
    if not own.method.calibrated:
        return [_rounded(model, name, own) for name in names]
    modules = [job.family.module_name(name) for name in names]
    some = [sample for sample in samples if sample.pixel_values is not None]
    some.sort(key=lambda sample: len(sample.input_ids))
    with model.filled_prefix(torch.cat([sample.input_ids for sample in samples])) as prefix:
        usual = Picture(some[len(some) // 2].image_inputs())
        walk = TowerWalk(prefix, modules, [usual], shelf, two_streams=own.method.two_streams)
        wide = ((prefix.get_submodule(n).in_features, rows) for n, rows in walk.rows.items())
        count = max((enough(*each, own.config.vision_bits) for each in wide), default=FEWEST)
        walk.pictures = ranks.share(_pictures(some, count))
        return quantize_tower(walk, own, ranks, tell)


def enough(columns: int, rows: float, bits: int) -> int:
    """How many samples a linear is calibrated on that has so many inputs, and rows of a sample."""
    wanted = ceil(ROWS * columns / max(1, rows)) if bits >= FINE else COUNTED
    return min(COUNTED, max(FEWEST, wanted))


def put_tower(model: Any, tower: Sequence[Linear], job: Job) -> None:
    """Give transformers' model the tower that ships."""
    for linear in tower:
        put(model, job.family.module_name(linear.name), linear)


def _pictures(samples: Sequence[Sample], count: int) -> list[Picture]:
    """The images of so many samples, evenly spaced among them, or of all.

    The first pass takes all samples through the solved tower.
    """
    count = min(count, len(samples))
    return [
        Picture(
            samples[place * len(samples) // count].image_inputs(),
            held=place % HELD_OUT == HELD_OUT // 2,
        )
        for place in range(count)
    ]


def _rounded(model: StreamedModel, name: str, job: Job) -> Solved:
    """One linear rounded to nearest."""
    source, bias = model.checkpoint, f"{name}.bias"
    weight = source.tensor(f"{name}.weight").to(model.device)
    own = source.tensor(bias).to(model.device) if bias in source.tensors else None
    columns = weight.shape[1]
    (solved,) = solve_unit([Matrix(name, filled(weight), own)], None, fitting(job, columns))
    return cut(solved, columns)
