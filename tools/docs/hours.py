"""The hours and the memory of README's table, for a 3B and a 7B of published shape.

    OMP_NUM_THREADS=1 python -m tools.docs.hours          # prints the table

Nothing is quantized. As in `sizes.py`, a checkpoint is its headers. The hours are the plan of
`--dry-run` for samples of 512 tokens, in CPU time of one thread of this machine.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from tools.docs.sizes import MODELS, headers
from vlmq_export import Recipe
from vlmq_export.planning.run_plan import fitted_types, plan_memory
from vlmq_export.planning.run_time import quantize_seconds
from vlmq_export.quantizer.run.machine import measured
from vlmq_export.quantizer.samples.sample import Length, Lengths
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.locate import open_source

TOKENS, IMAGE = 512, 384  # of a sample, and those of its image
SAMPLES = (128, 512)
FORMATS = ("gguf", "gptq")
GB = 10**9


def rows(folder: Path, name: str) -> list[str]:
    """The table's lines of one model."""
    source, lines = open_source(str(folder)), []
    for form in FORMATS:
        recipe = Recipe(model=str(folder), format=[form])
        recipe = source.recipe_for(recipe, CalibrationRows(recipe))
        model = source.plan(recipe).model
        types = fitted_types(model)
        machine = measured(torch.device("cpu"), types, time.process_time)
        for samples in SAMPLES:
            lengths = Lengths((Length(TOKENS, IMAGE),) * samples)
            most = plan_memory(model, lengths, 1000 * GB, 0)
            seconds = quantize_seconds(model, lengths, machine, most.room)
            hours = sum(seconds.values()) / 3600
            least = plan_memory(model, lengths, 0, 0)  # activations rest on disk
            lines.append(
                f"| {name} | `--format {form}` | {samples} | {hours:.1f} |"
                f" {most.host / GB:.0f} | {least.host / GB:.0f} + {least.disk / GB:.0f} on disk |"
            )
    return lines


def table() -> list[str]:
    """The lines of the table."""
    lines = [
        "| Model | Flags | Samples | Hours of one core | GB of memory | with activations on disk |",
        "|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in MODELS.items():
            headers(Path(scratch) / name, config)
            lines += rows(Path(scratch) / name, name)
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
