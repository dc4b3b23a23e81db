"""One decoder layer: statistics, solve, and the decoded weights put back (methods.md §1.3, steps 1-3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer import solver
from vlmq_export.quantizer.artifact import QuantizedLinear
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.grids import grid_for
from vlmq_export.quantizer.importance import PROJECTIONS, normalized, output_gradients, token_factors
from vlmq_export.quantizer.methods import Method, method_named
from vlmq_export.quantizer.model import tensor_cores
from vlmq_export.quantizer.statistics import Statistics
from vlmq_export.quantizer.walk import LayerWalk

Solved = tuple[QuantizedLinear, dict]  # with its metrics


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
        for names, owner, unit in zip(shared, owners, parts):
            solved += [exchanged(walk.layer, prefix, n, part, config, ranks, owner) for n, part in zip(names, unit)]
        for name, (linear, _) in zip(group, solved[-len(group) :]):
            walk.put(name, linear)
    return solved


def exchanged(
    layer: nn.Module, prefix: str, name: str, solved: Solved | None, config: QuantConfig, ranks: Ranks, owner: int
) -> Solved:
    """What the owner solved, on every rank."""
    if ranks.size == 1:
        return solved
    module = layer.get_submodule(name)
    groups = (module.out_features, config.groups(module.in_features))
    parts = solved[0] if solved else _linear(
        layer, prefix, name,
        solver.Solution(
            torch.empty(module.weight.shape, dtype=torch.uint8), torch.empty(groups, dtype=torch.float16),
            torch.empty(groups, dtype=torch.uint8), torch.empty(module.in_features, dtype=torch.int32),
        ), config,
    )  # fmt: skip
    tensors = {k: ranks.broadcast(getattr(parts, k), owner) for k in ("codes", "scales", "zero_points", "g_idx")}
    return replace(parts, **tensors), ranks.broadcast_json(solved and solved[1], owner)


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
    """Solve linears that share statistics, stacked by rows."""
    weights = torch.cat([layer.get_submodule(name).weight.float() for name in names])  # [out of all, in]
    grid = grid_for(config, weights.shape[1])
    group = config.group_columns(weights.shape[1])
    target, common, matrix = weights, {}, None
    if sums is None:
        solution = solver.round_to_nearest(weights, grid, group=group)
    else:
        hessian = solver.prepare(sums.hessian, sums.diagonal, group=group, act_order=config.act_order, damp=config.damp)
        alpha = config.alpha if method.alpha is None else method.alpha
        aim, columns = weights, None
        if sums.drift is not None and not hessian.fallback:
            target = solver.exact_target(weights, hessian, sums.drift, 1.0)
            if method.drift == "columns":
                columns = solver.column_term(hessian, sums.drift, alpha)
            else:
                aim = target if alpha == 1 else solver.exact_target(weights, hessian, sums.drift, alpha)
        solution = solver.solve(
            aim, hessian, grid, group=group, act_order=config.act_order, block=config.block_size, columns=columns
        )
        matrix = sums.hessian
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
        solved.append((_linear(layer, prefix, name, part, config), metrics))
        start = stop
    return solved


@tensor_cores()
def _losses(rounded: torch.Tensor, target: torch.Tensor, matrix: torch.Tensor) -> dict:
    """The weighted loss against the target of the method's objective, and relative to that target's own energy."""
    loss = solver.weighted_loss(rounded, target, matrix)
    energy = solver.weighted_loss(torch.zeros_like(target), target, matrix)
    return {"loss": loss, "relative_error": (max(loss, 0.0) / energy) ** 0.5 if energy > 0 else 0.0}


def _ratio(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return float(difference.double().norm() / whole.double().norm().clamp_min(1e-300))


def _linear(layer: nn.Module, prefix: str, name: str, part: solver.Solution, config: QuantConfig) -> QuantizedLinear:
    bias = layer.get_submodule(name).bias
    bias = None if bias is None else bias.detach().half()
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise CheckpointError(f"{prefix}{name}.bias exceeds float16's range, which every runtime format stores it in")
    return QuantizedLinear(
        prefix + name, part.codes, part.scales, part.zero_points, part.g_idx, bias,
        config.bits, config.group_size, config.symmetric,
    )  # fmt: skip
