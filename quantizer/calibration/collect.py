"""From a walk through a layer to what the solver needs: token weights, and summed statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.calibration.importance import (
    MLP,
    PROJECTIONS,
    clipped,
    floored,
    mlp_gradients,
    normalized,
    output_gradients,
    token_factors,
)
from vlmq_export.quantizer.calibration.layer_walk import Inputs, LayerWalk
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.methods import Method
from vlmq_export.quantizer.ranks import ALONE, Ranks

TokenWeights = Sequence[torch.Tensor] | None  # g, [tokens], one tensor a batch; None: all ones


@dataclass(frozen=True)
class Evidence:
    """The statistics that linears are solved with."""

    fitted: Statistics  # of the samples that the solver sees
    held: Statistics | None = None  # of the samples put aside, where a method chooses by them

    @cached_property
    def everything(self) -> Statistics:
        """The statistics of all samples."""
        return self.fitted if self.held is None else self.fitted.plus(self.held)

    def to_float32(self) -> Evidence:
        """The same, ready for the solver. The float64 sums are given up."""
        held = None if self.held is None else self.held.to_float32()
        return Evidence(self.fitted.to_float32(), held)


def importance_factors(
    walk: LayerWalk, method: Method, ranks: Ranks = ALONE
) -> dict[str, list[torch.Tensor]]:
    """projection → the factors of all valid tokens, one tensor a batch, as the method wants them.

    They are normalized over all batches of all ranks.
    """
    if method.importance == "none":
        return {}
    names = {"qkv": PROJECTIONS[:-1], "qkvo": PROJECTIONS, "all": PROJECTIONS + MLP}[method.weighs]
    raw: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for index, batch in enumerate(walk.batches):
        for name, factors in _batch_factors(walk, index, batch, names, method).items():
            raw[name].append(factors)
    weights = {name: normalized(factors, ranks) for name, factors in raw.items()}
    if method.clip:
        weights = {name: clipped(factors, method.clip, ranks) for name, factors in weights.items()}
    if method.effective:
        least = {n: method.effective * walk.layer.get_submodule(n).in_features for n in names}
        weights = {name: floored(factors, least[name], ranks) for name, factors in weights.items()}
    return weights


def _batch_factors(
    walk: LayerWalk, index: int, batch: Batch, names: Sequence[str], method: Method
) -> dict[str, torch.Tensor]:
    """projection → g of the valid tokens of one batch, not normalized."""
    hidden = batch.quantized
    # Nothing was quantized before the first layer. The gradient is exactly 0 then, whatever kernel
    # computes the two attentions, and whichever samples are lost: NaN equals nothing.
    if batch.equal_streams:
        none = torch.zeros(len(batch.tokens(hidden)), device=hidden.device)
        return dict.fromkeys(names, none)
    target = walk.attention_target(index)
    gradients = output_gradients(walk.layer, hidden, target, batch.kwargs)
    if method.weighs == "all":
        error = gradients[PROJECTIONS[-1]] / 2  # Attn(X) − Attn(X̃)
        gradients |= mlp_gradients(walk.layer, target + error, target)
    norm = method.importance
    return {name: batch.tokens(token_factors(gradients[name], norm)) for name in names}


@torch.no_grad()
def collect(
    inputs: Iterable[Inputs],
    batches: Sequence[Batch],
    weights: Sequence[TokenWeights],
    method: Method,
    *,
    in_features: int,
    residual: int = 0,  # outputs of the linears, where their statistics take the residual in
    device: torch.device | str = "cpu",
) -> list[Evidence]:
    """The statistics of one step's inputs, once for each of the token weights."""
    drift, modal = method.drift != "plain", method.ranges == "modality"

    def empty() -> Statistics:
        return Statistics.empty(
            in_features, drift=drift, device=device, modal=modal, residual=residual
        )

    found = [Evidence(empty(), empty() if method.holds_out else None) for _ in weights]
    # `inputs` comes first, so that it is run to its end.
    for index, (entering, batch) in enumerate(zip(inputs, batches)):
        image = batch.tokens(batch.image) if modal else None
        full = entering.full if drift else None
        aside = None
        if method.holds_out:
            aside = batch.tokens(batch.held[:, None].expand_as(batch.image))
        for weigh, sums in zip(weights, found):
            own = None if weigh is None else weigh[index]
            each = (entering.quantized, full, own, image, entering.residual)
            if sums.held is None or aside is None:
                sums.fitted.add(*each)
            else:
                sums.fitted.add(entering.quantized[~aside], *_rows(each[1:], ~aside))
                sums.held.add(entering.quantized[aside], *_rows(each[1:], aside))
    return found


def _rows(parts: Sequence[torch.Tensor | None], which: torch.Tensor) -> list[torch.Tensor | None]:
    return [part if part is None else part[which] for part in parts]


def summed_on(owner: int, evidence: Evidence, ranks: Ranks) -> Evidence | None:
    """The sums over all ranks on the rank that solves with them, None on the others."""
    if ranks.size == 1:
        return evidence
    for part in (evidence.fitted, evidence.held):
        if part is not None:
            _sum_on(owner, part, ranks)
    return evidence if ranks.rank == owner else None


def _sum_on(owner: int, sums: Statistics, ranks: Ranks) -> None:
    """Make of the parts of all ranks what `Statistics.plus` would, on one of them and in place."""
    for field in fields(sums):
        if isinstance(value := getattr(sums, field.name), torch.Tensor):
            ranks.sum_on(owner, value)
    tokens, sums.weight, sums.weight_squared = ranks.total(
        sums.tokens, sums.weight, sums.weight_squared
    )
    sums.tokens = int(tokens)
