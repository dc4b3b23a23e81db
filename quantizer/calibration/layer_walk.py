"""Both streams through one decoder layer, which is a chain of residual sub-blocks.

Each sub-block, x ← x + post(out(mix(ins(norm(x))))), takes two steps:

    what enters its linears          what the step leaves
    norm(x)                          mix(ins(norm(x)))
    mix(ins(norm(x)))                the residual stream x of the next sub-block

The layer runs once with its source weights, for the full-precision stream, and once with its
quantized weights. The full-precision stream passes a step while its linears still have their source
weights, and the quantized stream once they have the decoded ones. Between two steps a batch keeps x
and, for a while, what an attention has mixed. An MLP's inner value is by far the widest. It is kept
where there is room for it, and made again where there is none. No other forward pass is repeated.
Experts take no steps: `routed.py` walks them.

`Architecture.blocks` is the chain. A test holds each family's layer against its own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.calibration.sub_blocks import closed, mixed, normed, passed
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.model.families import SubBlock


@dataclass(frozen=True)
class Inputs:
    """What enters the linears of one step in one batch, for the tokens of its valid samples."""

    quantized: torch.Tensor  # x, [tokens, in]
    full: torch.Tensor | None  # x̃, [tokens, in]; None where there is one stream
    residual: torch.Tensor | None = None  # r̃ − r, [tokens, hidden], if asked for


class LayerWalk:
    """One layer, which still has its source weights, and the batches at its input.

    Its steps are counted through the chain: `ins` and `out` of the first sub-block are 0 and 1.
    """

    def __init__(
        self,
        layer: Any,
        blocks: Sequence[SubBlock],
        batches: list[Batch],
        *,
        two_streams: bool,
        room: int = 0,  # bytes of memory for what enters `out` of MLPs
    ):
        self.layer, self.blocks, self.batches = layer, blocks, batches
        self.two_streams, self._room = two_streams, room
        self._reached = -1  # the last step that the quantized stream has come to
        # Batch → what a sub-block has mixed, until `out` has taken it: one for each stream.
        self._mixed: dict[int, Callable] = {}
        self._full_mixed: dict[int, Callable] = {}
        self._source: list[tuple[nn.Parameter, torch.Tensor]] = []  # of an MLP's `ins`, once put

    def step(self, number: int) -> tuple[SubBlock, bool]:
        """The sub-block that a step belongs to, and whether the step is its `out`."""
        return self.blocks[number // 2], number % 2 == 1

    @torch.no_grad()
    @tensor_cores()
    def target(self, index: int) -> torch.Tensor:
        """The full-precision stream of one batch behind the first sub-block.

        It is to be asked for before any linear is replaced.
        """
        block = self.blocks[0]
        return self.batches[index].full + closed(self.layer, block, self._mix_full(block, index))

    @torch.no_grad()
    def inputs(self, step: int, *, residual: bool = False) -> Iterator[Inputs]:
        """What enters the linears of a step, batch after batch. Ask for every step once, in order.

        The linears of earlier steps have their decoded weights by now, those of this step and of
        later ones their source weights. With `residual`, the difference of what the linears' output
        is added to comes along, where it is added as it is.
        """
        block, closing = self.step(step)
        for index, batch in enumerate(self.batches):
            behind = full = None
            if residual and closing and not block.post:
                behind = batch.tokens(batch.full - batch.quantized)
            if self.two_streams:
                full = batch.tokens(self._pass_full(step, index))
            yield Inputs(batch.tokens(self._pass_quantized(step, index)), full, behind)
        self._reached = step

    @torch.no_grad()
    @tensor_cores()
    def again(self, step: int, index: int) -> torch.Tensor:
        """x of one batch once more, [samples, tokens, in], while its step lasts."""
        block, closing = self.step(step)
        if not closing:
            return normed(self.layer, block, self.batches[index].quantized)
        return self._mixed[index]() if index in self._mixed else self._mix(block, index)

    def put(self, name: str, linear: Linear) -> None:
        """Give a linear the weights and the bias that will be on disk."""
        if self.two_streams and any(name in b.ins for b in self.blocks if b.kind == "mlp"):
            # The full-precision stream has not passed them yet.
            source = self.layer.get_submodule(name).parameters()
            self._source += [(p, p.detach().clone()) for p in source]
        put(self.layer, name, linear)

    @torch.no_grad()
    def put_float(self, name: str, value: torch.Tensor) -> None:
        """Give a parameter that stays a float the value that will be on disk."""
        parameter = self.layer.get_parameter(name)
        if self.two_streams and any(
            name == f"{b.norm}.weight" for b in self.blocks if b.kind == "mlp"
        ):
            self._source.append((parameter, parameter.detach().clone()))
        parameter.copy_(value)

    def forget_mixed(self) -> None:
        """Make again what `out` is given, because linears before it have other weights by now."""
        self._mixed.clear()

    @torch.no_grad()
    @tensor_cores()
    def pass_full(self) -> None:
        """Take the full-precision stream past a layer that an earlier run has solved."""
        for index in range(len(self.batches)) if self.two_streams else ():
            for number, block in enumerate(self.blocks):
                if block.kind == "experts":
                    self.batches[index].full = self.behind(number, index)
                else:
                    self._pass_full(2 * number + 1, index)

    @torch.no_grad()
    @tensor_cores()
    def arrive(self, number: int, index: int) -> torch.Tensor:
        """Take the quantized stream of a batch to a sub-block. Returns what has passed its norm."""
        self._reached = 2 * number
        return self._pass_quantized(2 * number, index)

    @torch.no_grad()
    @tensor_cores()
    def behind(self, number: int, index: int) -> torch.Tensor:
        """The full-precision stream of one batch behind a sub-block, which it stands before."""
        batch = self.batches[index]
        return passed(self.layer, self.blocks[number], batch.full, batch.kwargs)

    def rewind(self, entering: Sequence[Callable[[], torch.Tensor]]) -> None:
        """Put the quantized stream back to the layer's input, X of each batch.

        `advance` then takes it through whatever weights the layer has.
        """
        for batch, hidden in zip(self.batches, entering):
            batch.quantized = hidden()
        self._reached = -1
        self._mixed.clear()

    @torch.no_grad()
    @tensor_cores()
    def advance(self) -> int:
        """Move both streams past the layer, which has its decoded weights by now.

        The quantized stream computes the same whether the layer was solved just now or in an
        earlier run. Returns how many samples were lost because their activations are not finite.
        """
        self._source.clear()
        for index, batch in enumerate(self.batches):
            for block in self.blocks[max(self._reached, 0) // 2 :]:
                self._close(block, index)
            batch.pass_layer(batch.quantized, batch.full if self.two_streams else None)
        return sum(batch.drop_non_finite() for batch in self.batches)

    @tensor_cores()
    def _pass_quantized(self, step: int, index: int) -> torch.Tensor:
        """Take the quantized stream of a batch to a step. Returns what enters its linears."""
        block, closing = self.step(step)
        if not closing:
            if step:
                self._close(self.blocks[step // 2 - 1], index)
            return normed(self.layer, block, self.batches[index].quantized)
        entering = self._mix(block, index)
        if block.attends:
            self._mixed[index] = self.batches[index].aside(entering)
        elif entering.nbytes <= self._room:
            self._room -= entering.nbytes
            self._mixed[index] = lambda: entering
        return entering

    def _mix(self, block: SubBlock, index: int) -> torch.Tensor:
        """What enters `out` in the quantized stream of a batch, computed."""
        batch = self.batches[index]
        return mixed(self.layer, block, batch.quantized, batch.kwargs)

    def _close(self, block: SubBlock, index: int) -> None:
        """Take the quantized stream of a batch past a sub-block."""
        batch = self.batches[index]
        if block.kind == "experts":
            batch.quantized = passed(self.layer, block, batch.quantized, batch.kwargs)
            return
        # What is popped is let go before the new stream is put away.
        kept = index in self._mixed
        entering = self._mixed.pop(index)() if kept else self._mix(block, index)
        batch.quantized = batch.quantized + closed(self.layer, block, entering)

    @tensor_cores()
    def _pass_full(self, step: int, index: int) -> torch.Tensor:
        """Take the full-precision stream of a batch past a step. Returns what enters its linears.

        Its residual stream moves with `out`, while that has its source weights.
        """
        (block, closing), batch = self.step(step), self.batches[index]
        if not closing:
            if block.attends:  # before its `ins` are replaced
                self._mix_full(block, index)
            return normed(self.layer, block, batch.full)
        with source_weights(self._source):
            entering = self._mix_full(block, index)
        self._full_mixed.pop(index, None)
        batch.full = batch.full + closed(self.layer, block, entering)
        return entering

    def _mix_full(self, block: SubBlock, index: int) -> torch.Tensor:
        """What enters `out` in the full-precision stream of a batch. An attention's is kept."""
        if kept := self._full_mixed.get(index):
            return kept()
        batch = self.batches[index]
        entering = mixed(self.layer, block, batch.full, batch.kwargs)
        if block.attends:
            self._full_mixed[index] = batch.aside(entering)
        return entering


@contextmanager
def source_weights(replaced: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Parameters as they were before they were replaced: each with its former value."""
    decoded = [parameter.data for parameter, _ in replaced]
    for parameter, source in replaced:
        parameter.data = source
    try:
        yield
    finally:
        for (parameter, _), value in zip(replaced, decoded):
            parameter.data = value


@torch.no_grad()
def put(layer: nn.Module, name: str, linear: Linear) -> None:
    """Give a linear of the layer the weights and the bias that will be on disk."""
    module: Any = layer.get_submodule(name)
    module.weight.copy_(linear.decode())
    if linear.bias is not None:
        module.bias.copy_(linear.bias)


@torch.no_grad()
def restore(
    layer: nn.Module,
    prefix: str,  # hub name of the layer, with the dot
    linears: Sequence[Linear],
    floats: Mapping[str, torch.Tensor],  # by hub name: those that took a scale
) -> None:
    """Give a layer what an earlier run solved."""
    for linear in linears:
        put(layer, linear.name.removeprefix(prefix), linear)
    for name, value in floats.items():
        layer.get_parameter(name.removeprefix(prefix)).copy_(value)
