"""The experts of a decoder layer, solved some at a time.

An expert does not depend on the others: what it is given comes from before the sub-block, and what
its last linear is given from its own first ones. So as many are collected and solved at once as
have sums that fit into memory, and the samples are passed once more for the next ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vlmq_export.quantizer.calibration.collect import Evidence, TokenFactors
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk, put
from vlmq_export.quantizer.calibration.routed import RoutedTokens, portion
from vlmq_export.quantizer.host import give_back
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import Solved
from vlmq_export.quantizer.layers.unit import solve_units
from vlmq_export.quantizer.ranks import ALONE, Ranks

log = logging.getLogger("vlmq_export")


def quantize_experts(
    walk: LayerWalk,
    number: int,  # of the sub-block in the chain
    prefix: str,  # hub name of the layer, with the dot
    job: Job,
    factors: TokenFactors,
    ranks: Ranks = ALONE,
) -> list[Solved]:
    """Solve the linears of every expert, in their order, and leave the decoded weights there."""
    block = walk.blocks[number]
    tokens = RoutedTokens(walk, number, ranks)
    if job.method.calibrated:
        _tell(tokens, prefix)
    solved: list[Solved] = []
    every = range(block.experts)
    rows, columns = tokens.expert(0).gate_proj.weight.shape
    size = portion(len(every), rows, columns, job.method)
    for start in range(0, len(every), size):
        solved += _portion(tokens, every[start : start + size], prefix, job, factors)
    tokens.leave()
    return solved


def _portion(
    tokens: RoutedTokens, experts: Sequence[int], prefix: str, job: Job, factors: TokenFactors
) -> list[Solved]:
    """The linears of some experts, expert by expert."""
    layer, block, method = tokens.walk.layer, tokens.block, job.method
    source: dict[int, list] = {}
    if method.two_streams:
        for e in experts:
            modules = [layer.get_submodule(name) for name in block.expert(e)[0]]
            source[e] = [(m.weight, m.weight.detach().clone()) for m in modules]
    found: dict[int, list[Solved]] = {e: [] for e in experts}
    for closing in (False, True):
        steps = {e: block.expert(e)[closing] for e in experts}
        units: list[Sequence[str]] = [*steps.values()]
        evidence: list[Evidence | None] = [None] * len(units)
        if method.calibrated:
            sums = tokens.collect(steps, factors, method, closing=closing, source=source)
            if len(sums) > len(units):  # linears with token weights of their own
                units = [[name] for names in units for name in names]
            evidence = [*sums]
            del sums
            give_back()
        owners = [e for e, names in steps.items() for _ in names]
        done = solve_units(layer, prefix, units, evidence, job, tokens.ranks)
        for e, (linear, metrics) in zip(owners, done):
            put(layer, linear.name.removeprefix(prefix), linear)
            found[e].append((linear, metrics | _reached(tokens, e, job)))
    return [each for e in experts for each in found[e]]


def _reached(tokens: RoutedTokens, expert: int, job: Job) -> dict:
    """What the manifest says of an expert: how many tokens came, and whether these were few."""
    if not job.method.calibrated:
        return {}
    few = {"few": tokens.few} if tokens.starved(expert) else {}
    return {"routed": tokens.counts[expert], **few}


def _tell(tokens: RoutedTokens, prefix: str) -> None:
    """Log how many experts of a layer few tokens came to."""
    starved = [tokens.counts[e] for e in range(tokens.block.experts) if tokens.starved(e)]
    if starved:
        log.info(
            "%s: %d of %d experts had fewer than %d tokens, the least %d;"
            " all others were added with a small weight",
            prefix.removesuffix("."),
            len(starved),
            tokens.block.experts,
            tokens.few,
            min(starved),
        )
