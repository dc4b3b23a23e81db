"""Both streams at a sub-block of experts, and which tokens come to which expert.

The router keeps its source weights, and chooses on the stream that it is given: in the quantized
stream for what the quantized model will do. An expert's statistics are those of the tokens that
come to it there. Their inputs in the full-precision stream are what the source's expert would be
given and would make of them, whichever experts that stream's own router chooses.

An expert that few tokens come to is given all others as well, with a small weight:

    N         inputs of its first linears
    n, T      tokens that come to it, and all tokens
    g² = 1    on average for the n tokens, whatever the method weighs them by
    g² = (N − n) / (T − n), at most 1, for the others, where n < N

so that its statistics never weigh less than N tokens, where there are so many. docs/methods.md has
why (§5.10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.collect import (
    Evidence,
    Marks,
    TokenFactors,
    add,
    finished,
    nothing,
    spread,
    summed_at_outputs,
)
from vlmq_export.quantizer.calibration.layer_walk import Inputs, LayerWalk, source_weights
from vlmq_export.quantizer.calibration.sub_blocks import chosen, normed
from vlmq_export.quantizer.methods import Method
from vlmq_export.quantizer.model.experts import Expert
from vlmq_export.quantizer.ranks import ALONE, Ranks

AT_ONCE = 2 * 2**30  # bytes of sums that are there at once; experts beyond them wait


class RoutedTokens:
    """The batches of a walk at a sub-block of experts. The quantized stream is brought there."""

    @torch.no_grad()
    @tensor_cores()
    def __init__(self, walk: LayerWalk, number: int, ranks: Ranks = ALONE):
        self.walk, self.block, self.ranks = walk, walk.blocks[number], ranks
        self._chosen = []  # of each batch: the experts of its valid tokens, [tokens, k]
        self._behind = []  # of each batch: the full-precision stream behind the sub-block
        for index, batch in enumerate(walk.batches):
            x = walk.arrive(number, index)
            choice = chosen(walk.layer, self.block, x, batch.kwargs)
            self._chosen.append(batch.aside(batch.tokens(choice)))
            if walk.two_streams:
                self._behind.append(batch.aside(walk.behind(number, index)))
        choices = [choice() for choice in self._chosen]
        each = [sum(int((c == e).sum()) for c in choices) for e in range(self.block.experts)]
        *self.counts, self.tokens = map(int, ranks.total(*each, sum(len(c) for c in choices)))

    def expert(self, number: int) -> Expert:
        """The module of an expert."""
        return self.walk.layer.get_submodule(f"{self.block.holder}.{number}")

    @property
    def few(self) -> int:
        """How many tokens an expert should have: as many as its first linears have inputs."""
        return self.expert(0).gate_proj.in_features

    def starved(self, expert: int) -> bool:
        """Whether fewer tokens come to it."""
        return self.counts[expert] < self.few

    @torch.no_grad()
    @tensor_cores()
    def collect(
        self,
        steps: Mapping[int, Sequence[str]],  # expert → its linears of one step
        factors: TokenFactors,
        method: Method,
        *,
        closing: bool,  # whether the step is that of the linears behind the mix
        source: Mapping[int, list],  # expert → its first linears' parameters, with their source
    ) -> list[Evidence]:
        """The statistics of each expert, or of each linear where tokens have weights there."""
        own = all(name in factors for names in steps.values() for name in names)
        found: dict[int, list[Evidence]] = {}
        weights: dict[int, list[list[torch.Tensor] | None]] = {}
        few: dict[int, list[torch.Tensor | None]] = {}
        for expert, names in steps.items():
            linear = self.walk.layer.get_submodule(names[0])
            units = [[name] for name in names] if own else [names]
            weights[expert] = [self._weights(expert, n, factors, method, linear) for n, *_ in units]
            few[expert] = summed_at_outputs(self.walk.layer, units, method)
            device, width = linear.weight.device, linear.in_features
            found[expert] = [nothing(method, width, device, few=w) for w in few[expert]]
        for index, batch in enumerate(self.walk.batches):
            marks = Marks.of(batch, method)
            x = batch.tokens(normed(self.walk.layer, self.block, batch.quantized))
            full = None
            if self.walk.two_streams:
                full = batch.tokens(normed(self.walk.layer, self.block, batch.full))
            for expert in steps:
                rows = self._rows(expert, index)
                entering = Inputs(x[rows], None if full is None else full[rows])
                if closing:
                    entering = self._mixed(expert, entering, source.get(expert, []))
                at = [None if w is None else w[index] for w in weights[expert]]
                add(found[expert], entering, at, marks.at(rows), method, few[expert])
        return [sums for each in found.values() for sums in each]

    def leave(self) -> None:
        """Take the full-precision stream past the sub-block, whose weights do not matter now."""
        for batch, behind in zip(self.walk.batches, self._behind):
            batch.full = behind()

    def _own(self, expert: int, index: int) -> torch.Tensor:
        """The tokens of a batch that come to an expert, int64 [n], among the valid ones."""
        return (self._chosen[index]() == expert).any(-1).nonzero().flatten()

    def _rows(self, expert: int, index: int) -> torch.Tensor:
        """The tokens of a batch that an expert's statistics are of."""
        if not self.starved(expert):
            return self._own(expert, index)
        choice = self._chosen[index]()
        return torch.arange(len(choice), device=choice.device)

    def _mixed(self, number: int, entering: Inputs, replaced: list) -> Inputs:
        """What enters the last linear of an expert, for what enters its first ones."""
        expert, full = self.expert(number), entering.full
        with source_weights(replaced):
            full = None if full is None else expert.mixed(full)
        return Inputs(expert.mixed(entering.quantized), full)

    def _weights(
        self, expert: int, name: str, factors: TokenFactors, method: Method, linear: nn.Linear
    ) -> list[torch.Tensor] | None:
        """g of the tokens that a linear's statistics are of, one tensor a batch; None: all ones."""
        own = None
        if name in factors:
            every = self._everywhere(factors[name])
            here = [g[self._own(expert, index)] for index, g in enumerate(every)]
            own = finished(here, method, linear.in_features, self.ranks)
        if not self.starved(expert):
            return own
        others = self.tokens - self.counts[expert]
        share = min(1.0, (self.few - self.counts[expert]) / max(1, others)) ** 0.5
        weights = []
        for index, choice in enumerate(self._chosen):
            g = torch.full((len(choice()),), share, device=choice().device)
            g[self._own(expert, index)] = 1.0 if own is None else own[index]
            weights.append(g)
        return weights

    def _everywhere(self, factors: Sequence) -> Iterator[torch.Tensor]:
        """The factors of the valid tokens of each batch."""
        return (batch.tokens(spread(g)) for g, batch in zip(factors, self.walk.batches))


def portion(experts: int, rows: int, columns: int, method: Method) -> int:
    """How many experts are collected at once, whose first linears are [rows, columns]."""
    return max(1, min(experts, AT_ONCE // expert_bytes(rows, columns, method)))


def expert_bytes(rows: int, columns: int, method: Method) -> int:
    """Bytes of the sums of an expert: once, or for each of two linears whose tokens are weighed."""
    own = method.importance != "none" and method.weighs == "all"
    beside = 0
    if method.drift != "plain":
        beside = rows if own and method.sums_outputs(rows, columns) else columns
    return 8 * (1 + own) * (1 + method.holds_out) * columns * (columns + beside)
