"""From a walk through a layer to what the solver needs: token weights, and summed statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import nn

from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.calibration.importance import (
    Reached,
    clipped,
    floored,
    normalized,
    output_gradients,
    per_sample,
    token_factors,
)
from vlmq_export.quantizer.calibration.layer_walk import Inputs, LayerWalk
from vlmq_export.quantizer.calibration.statistics import Statistics, outputs_apart
from vlmq_export.quantizer.calibration.sub_blocks import passed
from vlmq_export.quantizer.methods import Method
from vlmq_export.quantizer.model.experts import reached
from vlmq_export.quantizer.model.families import groups_of
from vlmq_export.quantizer.ranks import ALONE, Ranks

# By projection, for each batch: those of all tokens, or at an expert of those that come there.
TokenFactors = dict[str, list[torch.Tensor | Reached]]
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

    def divide(self, scale: torch.Tensor) -> None:
        """Make them the sums of inputs that are divided by a scale, [in]."""
        for part in (self.fitted, self.held):
            if part is not None:
                part.divide(scale)

    def to_float32(self) -> Evidence:
        """The same, ready for the solver. The float64 sums are given up."""
        held = None if self.held is None else self.held.to_float32()
        return Evidence(self.fitted.to_float32(), held)


def raw_factors(
    walk: LayerWalk, method: Method, answers: TokenFactors | None = None
) -> TokenFactors:
    """projection → its factors in each batch, not normalized over all of them.

    answers: the factors that the answers' loss gives this layer, for a method that weighs by them.
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
            raw[name].append(_as_wanted(factors, method))
    return raw


def importance_factors(
    walk: LayerWalk, raw: TokenFactors, method: Method, ranks: Ranks = ALONE
) -> dict[str, list[torch.Tensor]]:
    """projection → the factors of all valid tokens, one tensor a batch, as the method wants them.

    Experts are left out, because the router chooses again once the attention is quantized
    (routed.py).
    """
    found = {}
    for name in [n for block in walk.blocks if block.kind != "experts" for n in block.linears]:
        if name in raw:
            every = [batch.tokens(spread(g)) for g, batch in zip(raw[name], walk.batches)]
            width = walk.layer.get_submodule(name).in_features
            found[name] = finished(every, method, width, ranks)
    return found


def finished(
    factors: Sequence[torch.Tensor], method: Method, in_features: int, ranks: Ranks = ALONE
) -> list[torch.Tensor]:
    """Factors of the tokens that come to a linear, normalized over all batches of all ranks."""
    weights = normalized(factors, ranks)
    if method.clip:
        weights = clipped(weights, method.clip, ranks)
    return floored(weights, method.effective * in_features, ranks) if method.effective else weights


def spread(factors: torch.Tensor | Reached) -> torch.Tensor:
    """The factors of all tokens of a batch, [samples, tokens]."""
    return factors.spread() if isinstance(factors, Reached) else factors


def _weighed(walk: LayerWalk, method: Method) -> tuple[str, ...]:
    """The linears that importance is for. The paper weighs the attention, and leaves the MLP."""
    first = walk.blocks[0]
    if method.weighs == "all":
        return tuple(name for group in groups_of(walk.blocks) for name in group)
    return first.ins if method.weighs == "qkv" else (*first.ins, first.out)


def _batch_factors(
    walk: LayerWalk, index: int, batch: Batch, names: Sequence[str], method: Method
) -> dict[str, torch.Tensor | Reached]:
    """projection → g of one batch, [samples, tokens], not normalized."""
    hidden = batch.quantized
    # Nothing was quantized before the first layer. The gradient is exactly 0 then, whatever kernel
    # computes the two attentions, and whichever samples are lost: NaN equals nothing.
    if batch.equal_streams:
        none = torch.zeros(hidden.shape[:2], device=hidden.device)
        return dict.fromkeys(names, none)
    target, kwargs, tokens = walk.target(index), batch.kwargs, hidden.shape[:2]
    gradients, hidden = output_gradients(walk.layer, walk.blocks[0], hidden, target, kwargs)
    # This is ours; no paper tells of it. Behind the first sub-block the loss is that of the others.
    for block in walk.blocks[1:] if method.weighs == "all" else ():
        with torch.no_grad():
            target = passed(walk.layer, block, target, kwargs)
        found, hidden = output_gradients(walk.layer, block, hidden, target, kwargs)
        gradients |= found
    norm = method.importance
    factors = {name: token_factors(gradients[name], norm) for name in names}
    come = {name: reached(walk.layer, name) for name in names}
    return {
        name: g if (some := come[name]) is None else Reached(g, some, tokens)
        for name, g in factors.items()
    }


def _as_wanted(factors: torch.Tensor | Reached, method: Method) -> torch.Tensor | Reached:
    """Factors of one batch, raised to the method's power and made comparable."""
    if isinstance(factors, Reached):
        powered = replace(factors, factors=factors.factors**method.power)
        return powered.per_sample() if method.per_sample else powered
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
    few: Sequence[torch.Tensor | None] = (),  # W of each whose drift is summed at the outputs
    device: torch.device | str = "cpu",
) -> list[Evidence]:
    """The statistics of one step's inputs, once for each of the token weights."""
    few = few or [None] * len(weights)
    found = [nothing(method, in_features, device, residual, own) for own in few]
    # `inputs` comes first, so that it is run to its end.
    for index, (entering, batch) in enumerate(zip(inputs, batches)):
        marks = Marks.of(batch, method)
        own = [None if weigh is None else weigh[index] for weigh in weights]
        add(found, entering, own, marks, method, few)
    return found


def summed_at_outputs(
    layer: nn.Module, units: Iterable[Sequence[str]], method: Method
) -> list[torch.Tensor | None]:
    """W of each unit of linears, where that is one linear, whose drift is summed at its outputs."""
    found: list[torch.Tensor | None] = []
    for names in units:
        weights = layer.get_parameter(f"{names[0]}.weight")
        few = len(names) == 1 and method.sums_outputs(*weights.shape)
        found.append(weights if few else None)
    return found


def nothing(
    method: Method,
    in_features: int,
    device: torch.device | str,
    residual: int = 0,
    few: torch.Tensor | None = None,  # W, where the drift is summed at the outputs
) -> Evidence:
    """The sums of no tokens."""
    drift, modal = method.drift != "plain" and few is None, method.ranges == "modality"
    pull = residual if few is None else len(few)

    def empty() -> Statistics:
        return Statistics.empty(in_features, drift=drift, device=device, modal=modal, pull=pull)

    return Evidence(empty(), empty() if method.holds_out else None)


@dataclass(frozen=True)
class Marks:
    """What is known of the tokens of a batch, where the method asks for it."""

    image: torch.Tensor | None  # bool [tokens]
    held: torch.Tensor | None  # bool [tokens]: those of the samples put aside

    @classmethod
    def of(cls, batch: Batch, method: Method) -> Marks:
        """Those of the valid tokens of a batch."""
        image = batch.tokens(batch.image) if method.ranges == "modality" else None
        held = batch.held[:, None].expand_as(batch.image) if method.holds_out else None
        return cls(image, None if held is None else batch.tokens(held))

    def at(self, tokens: torch.Tensor) -> Marks:
        """Those of some tokens."""
        return Marks(*_rows((self.image, self.held), tokens))


def add(
    found: Sequence[Evidence],
    entering: Inputs,
    weights: Sequence[torch.Tensor | None],  # g [tokens], of each of `found`; None: all ones
    marks: Marks,
    method: Method,
    few: Sequence[torch.Tensor | None] = (),  # W of each whose drift is summed at the outputs
) -> None:
    """Add the inputs of one batch to several sums."""
    full = entering.full if method.drift != "plain" else None
    kept = aside = None
    if marks.held is not None:
        kept, aside = ((marks.held == which).nonzero().flatten() for which in (False, True))
    for own, sums, matrix in zip(weights, found, few or [None] * len(found)):
        pull = entering.residual
        if matrix is not None and full is not None:
            apart = outputs_apart(matrix, entering.quantized, full)
            pull = apart if pull is None else apart.add_(pull)
        each = (entering.quantized, full, own, marks.image, pull)
        if sums.held is None or kept is None or aside is None:
            sums.fitted.add(*each)
        else:
            sums.fitted.add(entering.quantized[kept], *_rows(each[1:], kept))
            sums.held.add(entering.quantized[aside], *_rows(each[1:], aside))


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
