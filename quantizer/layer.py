"""One decoder layer: statistics, solve, and the decoded weights put back (methods.md §1.3, steps 1-3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import nn

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer import kquants, solver
from vlmq_export.quantizer.artifact import ModuleRecord
from vlmq_export.quantizer.checkpoint import DTYPES
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.grids import grid_for
from vlmq_export.quantizer.importance import PROJECTIONS, normalized, output_gradients, token_factors
from vlmq_export.quantizer.linears import BlockLinear, Linear, QuantizedLinear
from vlmq_export.quantizer.methods import Method, method_named
from vlmq_export.quantizer.model import tensor_cores
from vlmq_export.quantizer.statistics import Statistics
from vlmq_export.quantizer.walk import LayerWalk

Solved = tuple[Linear, dict]  # with its metrics


def quantize_layer(
    walk: LayerWalk,  # of a layer that has its source weights
    prefix: str,  # hub name of the layer, with the dot
    groups: Sequence[Sequence[str]],  # linears that share an input, in the walk's order
    config: QuantConfig,
    ranks: Ranks = ALONE,
) -> list[Solved]:
    """Solve every linear of a layer, and leave the decoded weights in it.

    Group after group, so that each is calibrated on inputs that the groups before it have already disturbed. Of several
    ranks each solves its share of a group, from the sums of all.
    """
    method = method_named(config.method)
    factors = importance_factors(walk, method.importance, ranks)
    solved: list[Solved] = []
    for stage, group in enumerate(groups):
        shared = [[name] for name in group] if group[0] in factors else [list(group)]
        sums = collect(walk, stage, shared, factors, method) if method.calibrated else [None] * len(shared)
        owners = [ranks.owner(unit) for unit in range(len(shared))]
        sums = [part and ranks.collect(part, owner) for part, owner in zip(sums, owners)]
        parts: list[list[Solved | None]] = []
        for names, owner in zip(shared, owners):  # first everybody solves, then results go round
            own = (part := sums.pop(0)) and part.rounded()
            parts.append(
                _solve(walk.layer, prefix, names, own, config, method) if ranks.rank == owner else [None] * len(names)
            )
        for owner, unit in zip(owners, parts):
            solved += [exchanged(part, ranks, owner) for part in unit]
        for name, (linear, _) in zip(group, solved[-len(group) :]):
            walk.put(name, linear)
    return solved


def exchanged(solved: Solved | None, ranks: Ranks, owner: int) -> Solved:
    """What the owner solved, on every rank."""
    if ranks.size == 1:
        return solved
    linear = solved and solved[0]
    record = ModuleRecord(**ranks.broadcast_json(solved and asdict(ModuleRecord.of(linear, 0, solved[1])), owner))
    mine = linear.tensors() | ({} if linear.bias is None else {"bias": linear.bias}) if linear else {}
    tensors = {
        f"{record.name}.{part}": ranks.broadcast(mine.get(part, torch.empty(shape, dtype=DTYPES[kind])), owner)
        for part, (kind, shape) in record.stored().items()
    }
    return record.linear(tensors.__getitem__), record.metrics


def importance_factors(walk: LayerWalk, norm: str, ranks: Ranks = ALONE) -> dict[str, list[torch.Tensor]]:
    """projection → one factor a valid token, a tensor a batch, normalized over all of them."""
    if norm == "none":
        return {}
    raw: dict[str, list[torch.Tensor]] = {name: [] for name in PROJECTIONS}
    for index, batch in enumerate(walk.batches):
        hidden = batch.quantized
        if torch.equal(hidden, batch.full):  # layer 0: exactly no gradient, whatever kernel computes the two attentions
            none = torch.zeros(len(batch.tokens(hidden)), device=hidden.device)
            factors = dict.fromkeys(PROJECTIONS, none)
        else:
            gradients = output_gradients(walk.layer, hidden, walk.attention_target(index), batch.kwargs)
            factors = {name: batch.tokens(token_factors(g, norm)) for name, g in gradients.items()}
        for name in PROJECTIONS:
            raw[name].append(factors[name])
    return {name: normalized(factors, ranks) for name, factors in raw.items()}


@torch.no_grad()
def collect(
    walk: LayerWalk, stage: int, shared: list[list[str]], factors: dict[str, list[torch.Tensor]], method: Method
) -> list[Statistics]:
    """Statistics of one group's input, a set for each list of linears that also share their token weights."""
    module, drift = walk.layer.get_submodule(shared[0][0]), method.drift != "plain"
    sums = [Statistics.empty(module.in_features, drift=drift, device=module.weight.device) for _ in shared]
    for i, (x, x_full) in enumerate(walk.inputs(stage)):
        for names, part in zip(shared, sums):
            part.add(x, x_full if drift else None, factors[names[0]][i] if names[0] in factors else None)
    return sums


@torch.no_grad()
def _solve(
    layer: nn.Module, prefix: str, names: list[str], sums: Statistics | None, config: QuantConfig, method: Method
) -> list[Solved]:
    """Solve linears that share statistics: those of one grid together, stacked by rows."""
    kinds = {name: config.types.get(prefix + name, "") for name in names}
    solved = {}
    for kind in dict.fromkeys(kinds.values()):
        alike = [name for name in names if kinds[name] == kind]
        solved |= zip(alike, _solve_alike(layer, prefix, alike, kind, sums, config, method))
    return [solved[name] for name in names]


def _solve_alike(
    layer: nn.Module,
    prefix: str,
    names: list[str],
    kind: str,
    sums: Statistics | None,
    config: QuantConfig,
    method: Method,
) -> list[Solved]:
    weights = torch.cat([layer.get_submodule(name).weight.float() for name in names])  # [out of all, in]
    target, common, matrix, energy = weights, {}, None, None
    if sums is None:
        solution = _nearest(weights, kind, config)
    else:
        group = kquants.GRIDS[kind].block if kind else config.group_columns(weights.shape[1])
        order = "gar" if kind and config.act_order != "off" else config.act_order  # a block's columns stay together
        hessian = solver.prepare(sums.hessian, sums.diagonal, group=group, act_order=order, damp=config.damp)
        alpha = config.alpha if method.alpha is None else method.alpha
        aim, columns = weights, None
        if sums.drift is not None and not hessian.fallback:
            target = solver.exact_target(weights, hessian, sums.drift, 1.0)
            if method.drift == "columns":
                columns = solver.column_term(hessian, sums.drift, alpha)
            else:
                aim = target if alpha == 1 else solver.exact_target(weights, hessian, sums.drift, alpha)
        if kind:
            solution = solver.solve_blocks(aim, hessian, kquants.GRIDS[kind], block=config.block_size, columns=columns)
        else:
            solution = solver.solve(
                aim, hessian, grid_for(config, weights.shape[1]), group=group, act_order=order, block=config.block_size,
                columns=columns,
            )  # fmt: skip
        matrix = sums.hessian
        energy = (sums.hessian.diagonal() / sums.weight).float() if sums.weight else None
        common = {
            "damp": hessian.damp, "fallback": hessian.fallback, "dead_columns": int(hessian.dead.sum()),
            "tokens": sums.tokens, "effective_tokens": round(sums.effective_tokens, 1),
        }  # fmt: skip
    solved, start = [], 0
    for name in names:
        stop = start + layer.get_submodule(name).out_features
        part = solution.rows(start, stop)
        metrics = {"weight_error": _ratio(part.decode() - weights[start:stop], weights[start:stop]), **common}
        if matrix is not None:
            metrics |= _losses(part.decode(), target[start:stop], matrix)
        solved.append((_linear(layer, prefix, name, part, config, energy), metrics))
        start = stop
    return solved


def _nearest(weights: torch.Tensor, kind: str, config: QuantConfig) -> solver.Solution | solver.BlockSolution:
    if kind:
        return solver.nearest_in_blocks(weights, kquants.GRIDS[kind])
    columns = weights.shape[1]
    return solver.round_to_nearest(weights, grid_for(config, columns), group=config.group_columns(columns))


@tensor_cores()
def _losses(rounded: torch.Tensor, target: torch.Tensor, matrix: torch.Tensor) -> dict:
    """The weighted loss against the target of the method's objective, and relative to that target's own energy."""
    loss = solver.weighted_loss(rounded, target, matrix)
    energy = solver.weighted_loss(torch.zeros_like(target), target, matrix)
    return {"loss": loss, "relative_error": (max(loss, 0.0) / energy) ** 0.5 if energy > 0 else 0.0}


def _ratio(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return float(difference.double().norm() / whole.double().norm().clamp_min(1e-300))


def _linear(
    layer: nn.Module,
    prefix: str,
    name: str,
    part: solver.Solution | solver.BlockSolution,
    config: QuantConfig,
    energy: torch.Tensor | None,
) -> Linear:
    bias = layer.get_submodule(name).bias
    bias = None if bias is None else bias.detach().half()
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise CheckpointError(f"{prefix}{name}.bias exceeds float16's range, which every runtime format stores it in")
    if isinstance(part, solver.BlockSolution):
        return BlockLinear(prefix + name, part.codes, part.params, bias, part.grid.name, energy)
    return QuantizedLinear(
        prefix + name, part.codes, part.scales, part.zero_points, part.g_idx, bias,
        config.bits, config.group_size, config.symmetric, energy,
    )  # fmt: skip
