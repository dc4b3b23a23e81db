"""How long a matrix takes to solve on each GGUF block type, and libggml's own quantizer beside it.

    python -m tools.bench.block_types

One linear with random weights and correlated inputs is solved by `exact`, with everything that a
run does for it, on the types in turns. The figure is the median of the CPU seconds; the ratio is to
the K type of that width. libggml quantizes the same weights with the inputs' energies as imatrix.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import typer

from tools.bench.gguf import quantized_by_ggml
from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.quantizer.calibration.collect import Evidence
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import Matrix
from vlmq_export.quantizer.layers.unit import solve_unit
from vlmq_export.quantizer.model.checkpoint import Checkpoint

# The K type of a width, and the I types beside it.
WIDTHS = {
    "Q2_K": ("IQ2_XXS", "IQ2_XS", "IQ2_S"),
    "Q3_K": ("IQ3_XXS", "IQ3_S"),
    "Q4_K": ("IQ4_XS",),
}


def seconds(run: Callable[[], object]) -> float:
    """The CPU seconds of a run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def inputs(columns: int, tokens: int) -> Evidence:
    """The statistics of correlated inputs in both streams, a fifth of the tokens put aside."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sums = [Statistics.empty(columns, drift=True, device=torch.device("cpu")) for _ in range(2)]
    for each, share in zip(sums, (4, 1)):
        full = torch.randn(share * tokens // 5, columns, generator=generator) @ mix
        each.add(full + 0.05 * torch.randn(full.shape, generator=generator), full)
    return Evidence(*sums).to_float32()


def main(rows: int = 512, columns: int = 1024, tokens: int = 8192, rounds: int = 3) -> None:
    """Print a row for each type."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    architecture = Checkpoint(REFERENCE_VLM).architecture
    name = architecture.linears[0]
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) / columns**0.5
    evidence = inputs(columns, tokens)
    energies = evidence.fitted.hessian.diagonal().float().contiguous().numpy()
    kinds = [kind for base, others in WIDTHS.items() for kind in (base, *others)]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    ggml: dict[str, list[float]] = {kind: [] for kind in kinds}
    matrix = [Matrix(name, weight)]
    for _ in range(rounds):
        for kind in kinds:
            job = Job.of(architecture, QuantConfig("exact", types={name: kind}))
            times[kind].append(seconds(partial(solve_unit, matrix, evidence, job)))
            theirs = partial(quantized_by_ggml, weight.numpy(), kind, energies)
            ggml[kind].append(seconds(theirs))
    print("| | CPU s | over the K type | libggml, CPU s |\n|---|---:|---:|---:|")
    for base, others in WIDTHS.items():
        own = statistics.median(times[base])
        for kind in (base, *others):
            mine, theirs = statistics.median(times[kind]), statistics.median(ggml[kind])
            print(f"| {kind} | {mine:.1f} | {mine / own:.2f} | {theirs:.1f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
