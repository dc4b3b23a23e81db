"""How long a run would take on this machine: measured rates, counted samples, planned phases."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

from vlmq_export.errors import CalibrationError
from vlmq_export.formats.model_plan import ModelPlan
from vlmq_export.planning.run_plan import (
    RunPlan,
    fitted_types,
    linears_of,
    matrix_sizes,
    outside_of,
    shapes_of,
)
from vlmq_export.quantizer.config import TOWER
from vlmq_export.quantizer.run.machine import Clock, Machine, measured
from vlmq_export.quantizer.run.time_plan import (
    TimePlan,
    Tried,
    choosing_seconds,
    plan_seconds,
)
from vlmq_export.quantizer.samples.loading import START, Limit, worker_count
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.sample import Lengths
from vlmq_export.quantizer.type_budget import likeness
from vlmq_export.quantizer.type_budget.sensitivity import SAMPLES
from vlmq_export.quantizer.type_budget.tower import PICTURES

log = logging.getLogger("vlmq_export")
PROOF = "proof and fidelity"
CHOOSING = "choose types"
TUNING = "the steps of --tune"
_READ = 3  # rows that are read whole, to know what one costs
_WRITE_PASSES = 4  # over all weights, for each format: decoded or copied, packed, written
# Operations from which on a run is told beforehand: well over the two seconds that measuring takes.
_LONG = 2e12


@dataclass(frozen=True)
class Reading:
    """How the rows of a run become samples."""

    preprocessor: Preprocessor
    rows: Sequence[Row]
    limit: Limit
    workers: int | None = None  # as of read_samples
    clock: Clock = time.perf_counter


def plan_time(
    plan: RunPlan,
    reading: Reading,
    device: torch.device,
    tried: Mapping[str, Iterable[str | int]] = MappingProxyType({}),  # matrix → kinds to measure
) -> TimePlan | None:
    """Seconds of a run by phase, but for `left_out`; None where it is not planned for.

    That is a method that scales.

    The machine is measured for about two seconds, once in a process.
    """
    if plan.model.job.method.scaling:
        return None
    kinds = {kind for each in tried.values() for kind in each if isinstance(kind, str)}
    machine = _machine(device, frozenset(fitted_types(plan.model) | kinds))
    taken = phases_of(plan, reading, machine)
    taken = {CHOOSING: choosing(plan, tried, machine), **taken}
    phases = {phase: seconds for phase, seconds in taken.items() if seconds}
    tuning = (TUNING,) if plan.model.job.method.tuned else ()
    return TimePlan(sum(phases.values()), phases, (*tuning, PROOF))


def phases_of(plan: RunPlan, reading: Reading, machine: Machine) -> dict[str, float]:
    """Seconds of each phase, in order, from the first row to the last file."""
    assert plan.lengths is not None, "samples are counted before their time is planned"
    passes = _WRITE_PASSES * len(plan.formats)
    room = plan.memory.room if plan.memory else 0
    return {
        "read samples": read_seconds(reading),
        **quantize_seconds(plan.model, plan.lengths, machine, room),
        "write": machine.elementwise(passes * shapes_of(plan.model).weights),
    }


def choosing(plan: RunPlan, tried: Mapping[str, Iterable[str | int]], machine: Machine) -> float:
    """Seconds in which the costs of kinds are measured; 0 where there is nothing to choose."""
    if not tried or plan.lengths is None:
        return 0.0
    model, sizes = plan.model, matrix_sizes(plan.model)
    counts = Counter(
        (*sizes[name], tuple(likeness.quick(kinds)))
        for name, kinds in tried.items()
        if name != TOWER
    )
    matrices = [Tried(rows, columns, kinds, n) for (rows, columns, kinds), n in counts.items()]
    most = 2 * SAMPLES
    towers = [int(bits) for bits in tried.get(TOWER, ())]
    shapes, config = shapes_of(model), model.config
    given = shapes, matrices, config, plan.lengths, most, likeness.PLAIN, towers, PICTURES
    return choosing_seconds(*given, machine)


def quantize_seconds(
    model: ModelPlan,
    lengths: Lengths,
    machine: Machine,
    room: int,  # bytes of memory for what MLPs have made
) -> dict[str, float]:
    """Seconds of quantizing a model, by phase."""
    parts = linears_of(model), outside_of(model)
    return plan_seconds(shapes_of(model), *parts, model.config, lengths, machine, room)


def tell_time(model: ModelPlan, lengths: Lengths, device: torch.device, room: int) -> None:
    """Log how long quantizing takes, where that is so long that a user may want to know."""
    work = 6 * lengths.tokens * sum(x.out_features * x.in_features for x in model.linears)
    if work > _LONG and not model.job.method.scaling:
        machine = _machine(device, fitted_types(model))
        total = sum(quantize_seconds(model, lengths, machine, room).values())
        log.info("quantizing takes about %s on this machine", spoken(total))


def read_seconds(reading: Reading) -> float:
    """Seconds in which the samples are read, from a few rows that are read now."""
    rows, limit = reading.rows, reading.limit
    tried = rows[:: max(1, len(rows) // _READ)][:_READ]
    start = reading.clock()
    for row in tried:
        try:
            reading.preprocessor.sample(row, seq_len=limit.seq_len if limit.scale else None)
        except CalibrationError:
            continue  # the run says what is wrong with it
    each = (reading.clock() - start) / max(1, len(tried))
    workers = reading.workers or worker_count(len(rows))
    return each * len(rows) / workers + (START if workers > 1 else 0)


def spoken(seconds: float) -> str:
    """A time as one says it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(round(minutes, -1), 60)
    return f"{hours} h {minutes} min" if minutes and hours < 24 else f"{hours} h"


@cache
def _machine(device: torch.device, types: frozenset[str]) -> Machine:
    return measured(device, types)
