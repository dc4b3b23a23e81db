"""One decoder layer: statistics, solve, and the decoded weights put back.

docs/methods.md §1.3, steps 1 to 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmq_export.quantizer.calibration.collect import (
    Evidence,
    TokenFactors,
    collect,
    importance_factors,
    raw_factors,
    summed_at_outputs,
)
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk, put
from vlmq_export.quantizer.calibration.token_weights import importance_facts
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.host import give_back
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.experts import quantize_experts
from vlmq_export.quantizer.layers.measures import weight_error
from vlmq_export.quantizer.layers.scaling.awq_mbq import scaled_layer
from vlmq_export.quantizer.layers.scaling.smoothing import Smoothing, Stored
from vlmq_export.quantizer.layers.stack import Solved, linear_of, nearest
from vlmq_export.quantizer.layers.tuning import tune_layer
from vlmq_export.quantizer.layers.unit import gathered, solve_units
from vlmq_export.quantizer.ranks import ALONE, Ranks


def quantize_layer(
    walk: LayerWalk,  # of a layer that has its source weights
    prefix: str,  # hub name of the layer, with the dot
    job: Job,
    ranks: Ranks = ALONE,
    answers: TokenFactors | None = None,
    stored: Stored = lambda _, value: value,
) -> tuple[list[Solved], dict[str, torch.Tensor]]:
    """Solve every linear of a layer, and leave the decoded weights in the layer.

    Step by step, so that each linear is calibrated on inputs that the linears before it have
    already disturbed. Of several ranks each solves its share of a step, from the sums of all.
    Tuning then looks at the layer as a whole.

    answers: what the answers' loss says of this layer's tokens, where the method weighs by it.
    stored: a float tensor of the layer as its file holds it.

    Returns the linears, and the floats that ship in place of the source's, by hub name.
    """
    names = [n for block in walk.blocks for n in block.linears] if job.method.tuned else []
    source = {n: walk.layer.get_submodule(n).weight.detach().clone() for n in names}
    smoothing = Smoothing(walk, prefix, job, stored, ranks)
    entering = [b.aside(b.quantized) for b in walk.batches] if job.method.tuned else []
    raw = raw_factors(walk, job.method, answers)
    factors = importance_factors(walk, raw, job.method, ranks)
    facts = importance_facts(factors, walk.batches, ranks)
    solved: list[Solved] = []
    for number, block in enumerate(walk.blocks):
        if block.kind == "experts":
            solved += quantize_experts(walk, number, prefix, job, raw, ranks)
            continue
        for step, names in enumerate(block.steps, start=2 * number):
            # Linears with token weights of their own have statistics of their own.
            own = all(name in factors for name in names)
            units: list[list[str]] = [[name] for name in names] if own else [list(names)]
            found = gathered(_evidence(walk, step, units, factors, job), ranks)
            scale = smoothing.divide(step, units, found, solved) if job.smooth else None
            done = solve_units(walk.layer, prefix, units, found, job, ranks, scale)
            for name, (linear, metrics) in zip(names, done):
                walk.put(name, linear)
                metrics |= {"importance": facts[name]} if name in facts else {}
                solved.append((linear, metrics))
    if job.method.tuned:
        source = {f"{n}.weight": smoothing.scaled(n, w) for n, w in source.items()}
        solved = tune_layer(walk, entering, source, solved, prefix, job)
        for linear, _ in solved:
            put(walk.layer, linear.name.removeprefix(prefix), linear)
        walk.rewind(entering)
    return solved, {prefix + name: value for name, value in smoothing.floats.items()}


def _evidence(
    walk: LayerWalk,
    step: int,
    units: Sequence[Sequence[str]],
    factors: dict[str, list[torch.Tensor]],
    job: Job,
) -> list[Evidence | None]:
    """The statistics of each unit, from the samples of this rank."""
    if not job.method.calibrated:
        return [None] * len(units)
    module = walk.layer.get_submodule(units[0][0])
    block, closing = walk.step(step)
    residual = job.method.residual and closing and not block.post
    found = collect(
        walk.inputs(step, residual=residual),
        walk.batches,
        [factors.get(names[0]) for names in units],
        job.method,
        in_features=module.in_features,
        residual=module.out_features if residual else 0,
        few=summed_at_outputs(walk.layer, units, job.method),
        device=module.weight.device,
    )
    give_back()  # or the freed pieces of every step would add up to more than its peak
    return [*found]


def scale_layer(
    walk: LayerWalk,
    prefix: str,
    job: Job,
    ratios: Sequence[float] | None,  # MBQ's, one for each sub-block
    stored: Stored,
    ranks: Ranks = ALONE,
) -> tuple[list[Solved], dict[str, torch.Tensor]]:
    """Round a layer's linears to nearest after AWQ's or MBQ's scaling.

    Returns the linears, and the floats that ship in place of the source's, by hub name. The layer
    keeps its source weights, because these methods calibrate on the full-precision stream.
    """

    def grid_of(name: str, columns: int) -> tuple[Affine, int]:
        choice = job.grid(prefix + name, columns)
        assert isinstance(choice.grid, Affine), "refused before the run: see run/refusals.py"
        return choice.grid, choice.group

    scaled = scaled_layer(
        walk,
        grid_of,
        ratios=ratios,
        stored=stored,
        offset=job.family.gain,
        ranks=ranks,
    )
    solved = []
    for name, weights in scaled.weights.items():
        choice = job.grid(prefix + name, weights.shape[1])
        solution = nearest(weights, choice)
        metrics = weight_error(solution, weights)
        if name in scaled.powers:
            metrics["power"] = scaled.powers[name]
        linear = linear_of(prefix + name, solution, scaled.biases.get(name), choice)
        solved.append((linear, metrics))
    return solved, {prefix + name: value for name, value in scaled.floats.items()}
