"""The output head, after the last decoder layer.

    x = norm(h)    x̃ = norm(h̃)    logits = head(x)

It is calibrated on what leaves the final norm, and solved as every other linear. All tokens count
the same there: importance is measured in attention blocks, and none comes after the head. A
vocabulary is long, so rows are solved in slabs. They do not depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.calibration.collect import Evidence, collect, summed_on
from vlmq_export.quantizer.calibration.layer_walk import Inputs
from vlmq_export.quantizer.grids.linears import stacked
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import Matrix, Solved
from vlmq_export.quantizer.layers.unit import broadcast, solve_unit
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.ranks import ALONE, Ranks

SLAB = 2**13  # rows solved at once: fewer than a layer's gate and up projections have


def quantize_head(
    model: StreamedModel, batches: Sequence[Batch], job: Job, ranks: Ranks = ALONE
) -> Solved:
    """Solve the output head of `model`, from batches that have passed the last decoder layer."""
    # AWQ and MBQ have nothing before the head to scale against it.
    calibrated = job.method.solves
    job = replace(job, method=replace(job.method, importance="none", calibrated=calibrated))
    evidence = _evidence(model, batches, job, ranks) if calibrated else None
    solved = None
    if ranks.first:
        slabs, energies = [], []
        for start in range(0, model.head_shape[0], SLAB):
            rows = model.head_rows(start, start + SLAB)
            slabs += solve_unit([Matrix(job.head, rows)], evidence, job)
            energies.append(float(rows.double().square().sum()))
        linear = stacked([linear for linear, _ in slabs])
        solved = linear, _joined_metrics([metrics for _, metrics in slabs], energies)
    return broadcast(solved, ranks, 0)


def _evidence(
    model: StreamedModel, batches: Sequence[Batch], job: Job, ranks: Ranks
) -> Evidence | None:
    """The statistics of the head's inputs, on the rank that solves it."""
    with model.filled_norm() as norm:
        (found,) = collect(
            _inputs(norm, batches, two_streams=job.method.two_streams),
            batches,
            [None],
            job.method,
            in_features=model.head_shape[1],
            device=model.device,
        )
    total = summed_on(0, found, ranks)
    return None if total is None else total.to_float32()


@torch.no_grad()
@tensor_cores()
def _inputs(norm: Any, batches: Sequence[Batch], *, two_streams: bool) -> Iterator[Inputs]:
    """What enters the head, batch after batch."""
    for batch in batches:
        full = batch.tokens(norm(batch.full)) if two_streams else None
        yield Inputs(batch.tokens(norm(batch.quantized)), full)


def _joined_metrics(slabs: Sequence[dict], energies: Sequence[float]) -> dict:
    """Those of the whole matrix; `energies` are the sums of squares of each slab's weights."""
    joined = slabs[0] | {"weight_error": _mean([m["weight_error"] for m in slabs], energies)}
    if "loss" in joined:
        joined["loss"] = sum(m["loss"] for m in slabs)
        of_targets = [
            m["loss"] / m["relative_error"] ** 2 if m["relative_error"] > 0 else 0.0 for m in slabs
        ]
        for key in {"relative_error", "nearest_error"} & joined.keys():
            joined[key] = _mean([m[key] for m in slabs], of_targets)
    return joined


def _mean(errors: Sequence[float], energies: Sequence[float]) -> float:
    """Relative errors of parts → that of the whole."""
    squares = sum(e**2 * energy for e, energy in zip(errors, energies, strict=True))
    return math.sqrt(squares / max(sum(energies), 1e-300))
