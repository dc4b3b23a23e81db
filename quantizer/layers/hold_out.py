"""The best of several methods for each linear, by the error on samples that were put aside.

1. Every candidate solves from the samples that were not put aside.
2. Each linear takes the candidate that errs least on those that were. The first candidate is kept
   where others are equal.
3. The winner solves once more, from all samples. Its second solution is kept where it errs no more
   on the samples put aside than the first candidate did, and its first solution otherwise. On these
   samples the outcome is therefore never worse than the first candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vlmq_export.quantizer.calibration.collect import Evidence
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.layers.attempt import Attempt, Prepared, attempt, prepared
from vlmq_export.quantizer.layers.stack import Stack
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.solver.hessian import weighted_loss


def best_of(
    candidates: Sequence[str], stack: Stack, evidence: Evidence, config: QuantConfig
) -> tuple[Prepared, list[Attempt]]:
    """The statistics of all samples, factorized, and the attempt that won for each linear."""
    held = evidence.held
    assert held is not None, "a method with candidates puts samples aside"
    known = prepared(stack, evidence.fitted, config)
    tried = {name: attempt(stack, known, held, METHODS[name], config) for name in candidates}
    weights = stack.split(stack.weights)
    errors = [
        {name: held.error(parts[i].solution.decode(), w) for name, parts in tried.items()}
        for i, w in enumerate(weights)
    ]
    winners = [min(each, key=each.__getitem__) for each in errors]
    shares = [tried[name][i].chosen.get("alpha", 0.0) for i, name in enumerate(winners)]
    known = prepared(stack, evidence.everything, config)
    again = {
        name: attempt(stack, known, held, METHODS[name], config, shares)
        for name in dict.fromkeys(winners)
    }
    kept = []
    for i, (name, each, w) in enumerate(zip(winners, errors, weights)):
        first = next(iter(each.values()))
        part = again[name][i]
        if not held.error(part.solution.decode(), w) <= first:
            part = tried[name][i]
        energy = weighted_loss(torch.zeros_like(w), w, held.hessian)
        gain = (first - each[name]) / energy if energy > 0 and math.isfinite(each[name]) else 0.0
        kept.append(Attempt(part.solution, part.chosen | {"method": name, "held_out_gain": gain}))
    return known, kept
