"""From a walk through a layer to what the solver needs: token weights, and summed statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.calibration.importance import (
    clipped,
    floored,
    normalized,
    output_gradients,
    per_sample,
    token_factors,
)
from vlmq_export.quantizer.calibration.layer_walk import Inputs, LayerWalk
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.calibration.sub_blocks import passed
from vlmq_export.quantizer.methods import Method
from vlmq_export.quantizer.model.families import groups_of
from vlmq_export.quantizer.ranks import ALONE, Ranks

TokenFactors = dict[str, list[torch.Tensor]]  # by projection, one tensor a batch
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
    walk: LayerWalk, method: Method, ranks: Ranks = ALONE, answers: TokenFactors | None = None
) -> TokenFactors:
    """projection → the factors of all valid tokens, one tensor a batch, as the method wants them.

    answers: the factors that the answers' loss gives this layer, for a method that weighs by them.
    They are normalized over all batches of all ranks.
    """
    if method.importance == "none":
        return {}
    names = _weighed(walk, method) if answers is None else tuple(answers)
    raw: TokenFactors = {name: [] for name in names}
    for index, batch in enumerate(walk.batches):
        if answers is None:
            found = _batch_factors(walk, index, batch, names, method)
        else:
            found = {name: answers[name][index].to(batch.valid.device) for name in names}
        for name, factors in found.items():
            raw[name].append(batch.tokens(_as_wanted(factors, method)))
    weights = {name: normalized(factors, ranks) for name, factors in raw.items()}
    if method.clip:
        weights = {name: clipped(factors, method.clip, ranks) for name, factors in weights.items()}
    if method.effective:
        least = {n: method.effective * walk.layer.get_submodule(n).in_features for n in names}
        weights = {name: floored(factors, least[name], ranks) for name, factors in weights.items()}
    return weights


def _weighed(walk: LayerWalk, method: Method) -> tuple[str, ...]:
    """The linears that importance is for. The paper weighs the attention, and leaves the MLP."""
    first = walk.blocks[0]
    if method.weighs == "all":
        return tuple(name for group in groups_of(walk.blocks) for name in group)
    return first.ins if method.weighs == "qkv" else (*first.ins, first.out)


def _batch_factors(
    walk: LayerWalk, index: int, batch: Batch, names: Sequence[str], method: Method
) -> dict[str, torch.Tensor]:
    """projection → g of one batch, [samples, tokens], not normalized."""
    hidden = batch.quantized
    # Nothing was quantized before the first layer. The gradient is exactly 0 then, whatever kernel
    # computes the two attentions, and whichever samples are lost: NaN equals nothing.
    if batch.equal_streams:
        none = torch.zeros(hidden.shape[:2], device=hidden.device)
        return dict.fromkeys(names, none)
    target, kwargs = walk.target(index), batch.kwargs
    gradients, hidden = output_gradients(walk.layer, walk.blocks[0], hidden, target, kwargs)
    # This is ours; no paper tells of it. Behind the first sub-block the loss is that of the others.
    for block in walk.blocks[1:] if method.weighs == "all" else ():
        with torch.no_grad():
            target = passed(walk.layer, block, target, kwargs)
        found, hidden = output_gradients(walk.layer, block, hidden, target, kwargs)
        gradients |= found
    norm = method.importance
    return {name: token_factors(gradients[name], norm) for name in names}


def _as_wanted(factors: torch.Tensor, method: Method) -> torch.Tensor:
    """Factors of one batch, [samples, tokens], raised to the method's power and made comparable."""
    factors = factors if method.power == 1 else factors**method.power
    return per_sample(factors) if method.per_sample else factors


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
        kept = aside = None
        if method.holds_out:
            held = batch.tokens(batch.held[:, None].expand_as(batch.image))
            kept, aside = ((held == which).nonzero().flatten() for which in (False, True))
        for weigh, sums in zip(weights, found):
            own = None if weigh is None else weigh[index]
            each = (entering.quantized, full, own, image, entering.residual)
            if sums.held is None or kept is None or aside is None:
                sums.fitted.add(*each)
            else:
                sums.fitted.add(entering.quantized[kept], *_rows(each[1:], kept))
                sums.held.add(entering.quantized[aside], *_rows(each[1:], aside))
    return found


def _rows(parts: Sequence[torch.Tensor | None], which: torch.Tensor) -> list[torch.Tensor | None]:
    return [part if part is None else part[which] for part in parts]


def summed_on(owner: int, evidence: Evidence, ranks: Ranks) -> Evidence | None:
    """The sums over all ranks on the rank that solves with them, None on the others."""
    if not ranks.grouped:
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
    sums.tokens = ranks.count(sums.tokens)
