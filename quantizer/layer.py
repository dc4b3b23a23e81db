"""One decoder layer: statistics, solve, and the decoded weights put back (methods.md §1.3, steps 1-3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from vlmq_export.quantizer.artifact import ModuleRecord
from vlmq_export.quantizer.checkpoint import DTYPES
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.families import Family
from vlmq_export.quantizer.grids import Affine, grid_for
from vlmq_export.quantizer.importance import (
    MLP,
    PROJECTIONS,
    clipped,
    floored,
    mlp_gradients,
    normalized,
    output_gradients,
    token_factors,
)
from vlmq_export.quantizer.memory import give_back
from vlmq_export.quantizer.methods import Method, method_named
from vlmq_export.quantizer.pictured import importance_facts
from vlmq_export.quantizer.scaling import scaled_layer
from vlmq_export.quantizer.solving import Solved, linear_of, nearest, ratio, solve_unit
from vlmq_export.quantizer.statistics import Statistics
from vlmq_export.quantizer.walk import DOWN, OUT, LayerWalk


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
    factors = importance_factors(walk, method, ranks)
    facts = importance_facts(factors, walk.batches, ranks)
    solved: list[Solved] = []
    for stage, group in enumerate(groups):
        shared = [[name] for name in group] if group[0] in factors else [list(group)]
        sums = collect(walk, stage, shared, factors, method) if method.calibrated else [(None, None)] * len(shared)
        give_back()  # or the freed pieces of every step would add up to more than its peak
        owners = [ranks.owner(unit) for unit in range(len(shared))]
        sums = [[part and ranks.collect(part, owner) for part in pair] for pair, owner in zip(sums, owners)]
        parts: list[list[Solved | None]] = []
        for names, owner in zip(shared, owners):  # first everybody solves, then results go round
            own, held = (part and part.rounded() for part in sums.pop(0))
            parts.append(
                solve_unit(walk.layer, prefix, names, own, held, config, method)
                if ranks.rank == owner
                else [None] * len(names)
            )
        for owner, unit in zip(owners, parts):
            solved += [exchanged(part, ranks, owner) for part in unit]
        for name, (linear, metrics) in zip(group, solved[-len(group) :]):
            walk.put(name, linear)
            metrics |= {"importance": facts[name]} if name in facts else {}
    return solved


def scale_layer(
    walk: LayerWalk,
    prefix: str,
    family: Family,
    config: QuantConfig,
    ratios: tuple[float, float] | None,
    stored: Callable[[str, torch.Tensor], torch.Tensor],  # of a hub name
    ranks: Ranks = ALONE,
) -> tuple[list[Solved], dict[str, torch.Tensor]]:
    """Round a layer's linears to nearest after AWQ's or MBQ's scaling: they, and the norms that ship in place of the source's.

    The layer keeps its source weights: these methods calibrate on the full-precision stream.
    """

    def grid_of(columns: int) -> tuple[Affine, int]:
        return grid_for(config, columns), config.group_columns(columns)

    scaled = scaled_layer(
        walk, family.groups, grid_of, ratios=ratios, stored=lambda name, value: stored(prefix + name, value),
        norms=family.norms, ranks=ranks,
    )  # fmt: skip
    solved = []
    for name, weights in scaled.weights.items():
        solution = nearest(weights, "", config)
        metrics = {"weight_error": ratio(solution.decode() - weights, weights)}
        if name in scaled.powers:
            metrics["power"] = scaled.powers[name]
        solved.append((linear_of(prefix, name, scaled.biases.get(name), solution, config), metrics))
    return solved, {prefix + name: value for name, value in scaled.norms.items()}


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


def importance_factors(walk: LayerWalk, method: Method, ranks: Ranks = ALONE) -> dict[str, list[torch.Tensor]]:
    """projection → one factor a valid token, a tensor a batch, normalized over all of them; as the method wants them."""
    if method.importance == "none":
        return {}
    names = {"qkv": PROJECTIONS[:-1], "qkvo": PROJECTIONS, "all": PROJECTIONS + MLP}[method.weighs]
    raw: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for index, batch in enumerate(walk.batches):
        hidden = batch.quantized
        if torch.equal(hidden, batch.full):  # layer 0: exactly no gradient, whatever kernel computes the two attentions
            none = torch.zeros(len(batch.tokens(hidden)), device=hidden.device)
            factors = dict.fromkeys(names, none)
        else:
            target = walk.attention_target(index)
            gradients = output_gradients(walk.layer, hidden, target, batch.kwargs)
            if method.weighs == "all":
                gradients |= mlp_gradients(walk.layer, target + gradients[PROJECTIONS[-1]] / 2, target)
            factors = {name: batch.tokens(token_factors(gradients[name], method.importance)) for name in names}
        for name in names:
            raw[name].append(factors[name])
    weights = {name: normalized(factors, ranks) for name, factors in raw.items()}
    if method.clip:
        weights = {name: clipped(factors, method.clip, ranks) for name, factors in weights.items()}
    if method.effective:
        least = {name: method.effective * walk.layer.get_submodule(name).in_features for name in names}
        weights = {name: floored(factors, least[name], ranks) for name, factors in weights.items()}
    return weights


@torch.no_grad()
def collect(
    walk: LayerWalk, stage: int, shared: list[list[str]], factors: dict[str, list[torch.Tensor]], method: Method
) -> list[tuple[Statistics, Statistics | None]]:
    """Statistics of one group's input, a set for each list of linears that also share their token weights.

    The second of a pair is of the samples put aside, where the method chooses by them.
    """
    module, drift, modal = walk.layer.get_submodule(shared[0][0]), method.drift != "plain", method.ranges == "modality"
    residual = module.out_features if method.residual and stage in (OUT, DOWN) else 0

    def empty() -> Statistics:
        device = module.weight.device
        return Statistics.empty(module.in_features, drift=drift, device=device, modal=modal, residual=residual)

    walk.with_residual = bool(residual)
    sums = [(empty(), empty() if method.holds_out else None) for _ in shared]
    for i, (x, x_full) in enumerate(walk.inputs(stage)):
        batch = walk.batches[i]
        image, behind = batch.tokens(batch.image) if modal else None, walk.residual if residual else None
        aside = batch.tokens(batch.held[:, None].expand_as(batch.image)) if method.holds_out else None
        for names, (part, held) in zip(shared, sums):
            weigh = factors[names[0]][i] if names[0] in factors else None
            each = (x, x_full if drift else None, weigh, image, behind)
            if held is None:
                part.add(*each)
            else:
                part.add(*(v if v is None else v[~aside] for v in each))
                held.add(*(v if v is None else v[aside] for v in each))
    return sums
