"""A unit of work: linears that share their statistics, from sums to integers on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from vlmq_export.quantizer.artifact.manifest import ModuleRecord
from vlmq_export.quantizer.calibration.collect import Evidence, summed_on
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers import measures
from vlmq_export.quantizer.layers.attempt import Attempt, Prepared, attempt, prepared
from vlmq_export.quantizer.layers.damping import damped_best
from vlmq_export.quantizer.layers.hold_out import best_of
from vlmq_export.quantizer.layers.stack import Matrix, Solved, Stack, linear_of, nearest
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.storage.tensors import DTYPES


@torch.no_grad()
def solve_unit(
    matrices: Sequence[Matrix],
    evidence: Evidence | None,  # None: nothing is calibrated, and weights are rounded to nearest
    job: Job,
    scale: torch.Tensor | None = None,  # of the columns, [in]; the sums are divided by it
) -> list[Solved]:
    """Solve linears that share statistics. Those of one grid are solved together.

    With a scale W·s is solved. The energies are those of the undivided inputs.
    """
    energy = None  # of the inputs, float32 [in]
    if evidence is not None and evidence.fitted.weight:
        energy = (evidence.fitted.hessian.diagonal() / evidence.fitted.weight).float()
        energy = energy if scale is None else energy * scale.square()
    biases = {m.name: m.bias for m in matrices}
    solved: dict[str, Solved] = {}
    for stack in _stacks(matrices, job):
        if scale is not None:
            stack.weights.mul_(scale)
        known, attempts = _attempts(stack, evidence, job)
        for name, found, metrics in zip(stack.names, attempts, _metrics(stack, known, attempts)):
            linear = linear_of(name, found.solution, biases[name], stack.choice, energy)
            solved[name] = linear, metrics
    return [solved[m.name] for m in matrices]


def gathered(found: list[Evidence | None], ranks: Ranks) -> list[Evidence | None]:
    """The sums of each unit over all ranks, on the rank that solves it; None on the others."""
    for unit, evidence in enumerate(found):  # one by one, so that the parts go as they are sent
        found[unit] = None if evidence is None else summed_on(ranks.owner(unit), evidence, ranks)
    return found


def solve_units(
    layer: nn.Module,
    prefix: str,  # hub name of the layer, with the dot
    units: Sequence[Sequence[str]],
    # The sums of each unit, gathered; emptied, so that they go as they are used.
    found: list[Evidence | None],
    job: Job,
    ranks: Ranks,
    scale: torch.Tensor | None = None,  # of the columns, [in]; the sums are divided by it
) -> list[Solved]:
    """The linears of one step, in order. First every rank solves, then the results go round."""
    owners = [ranks.owner(unit) for unit in range(len(units))]
    parts: list[Sequence[Solved | None]] = []
    for names, owner in zip(units, owners):
        evidence = found.pop(0)
        evidence = None if evidence is None else evidence.to_float32()
        if ranks.rank == owner:
            modules: dict[str, Any] = {name: layer.get_submodule(name) for name in names}
            matrices = [Matrix(prefix + n, m.weight, m.bias) for n, m in modules.items()]
            parts.append(solve_unit(matrices, evidence, job, scale))
        else:
            parts.append([None] * len(names))
    return [broadcast(part, ranks, owner) for owner, unit in zip(owners, parts) for part in unit]


def broadcast(solved: Solved | None, ranks: Ranks, owner: int) -> Solved:
    """The owner's linear with its metrics, on every rank. The others give None."""
    if not ranks.grouped:
        assert solved is not None
        return solved
    mine: dict[str, torch.Tensor] = {}
    described = None
    if solved is not None:
        linear, metrics = solved
        described = asdict(ModuleRecord.of(linear, 0, metrics))
        mine = linear.tensors() | ({} if linear.bias is None else {"bias": linear.bias})
    record = ModuleRecord(**ranks.broadcast_json(described, owner))
    tensors = {}
    for part, (kind, shape) in record.stored().items():
        empty = torch.empty(shape, dtype=DTYPES[kind])
        tensors[f"{record.name}.{part}"] = ranks.broadcast(mine.get(part, empty), owner)
    return record.linear(tensors.__getitem__), record.metrics


def _stacks(matrices: Sequence[Matrix], job: Job) -> list[Stack]:
    """Matrices of one grid together, grids in the order in which they come first."""
    by_grid: dict[tuple[str, int], list[Matrix]] = {}
    for m in matrices:
        choice = job.grid(m.name, m.weight.shape[1])
        by_grid.setdefault((choice.block_type, choice.grid.bits), []).append(m)
    return [
        Stack.of(alike, job.grid(alike[0].name, alike[0].weight.shape[1]))
        for alike in by_grid.values()
    ]


def _attempts(
    stack: Stack, evidence: Evidence | None, job: Job
) -> tuple[Prepared | None, list[Attempt]]:
    """The statistics of a stack, factorized, and the attempt that is kept for each linear."""
    if evidence is None:
        plain = stack.parts(nearest(stack.weights, stack.choice))
        return None, [Attempt(part, {}) for part in plain]
    if job.method.candidates:
        return best_of(job.method.candidates, stack, evidence, job.config)
    if job.method.damping == "held-out":
        return damped_best(stack, evidence, job.method, job.config)
    known = prepared(stack, evidence.fitted, job.config)
    return known, attempt(stack, known, evidence.held, job.method, job.config)


def _metrics(stack: Stack, known: Prepared | None, attempts: Sequence[Attempt]) -> list[dict]:
    """The metrics of each linear of a stack."""
    weights = stack.split(stack.weights)
    if known is None:
        return [measures.weight_error(a.solution, w) for a, w in zip(attempts, weights)]
    target = stack.weights if known.shift is None else stack.weights + known.shift
    common = measures.of_stack(known)
    return [
        measures.weight_error(a.solution, w)
        | common
        | a.chosen
        | measures.losses(a.solution, w, aim, known.sums, stack.choice)
        for a, w, aim in zip(attempts, weights, stack.split(target))
    ]
