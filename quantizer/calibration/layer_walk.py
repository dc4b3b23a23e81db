"""Both streams through one decoder layer, in four steps.

    step      what enters its linears       what the step leaves
    QKV       x = norm(h)
    OUT       a, the attention's output     h₂ = h + o(a)
    GATE_UP   x₂ = norm(h₂)
    DOWN      m, the MLP's inner value      the layer's output h₂ + down(m)

The layer runs once with its source weights, for the full-precision stream, and once with its
quantized weights. The full-precision stream passes a step while its linears still have their source
weights, and the quantized stream once they have the decoded ones. Between two steps a batch keeps h
and, for a while, a. m is by far the widest and is never kept. No forward pass is repeated.

Every supported family's layer is of this kind; a test holds each against its own forward pass.
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
from vlmq_export.quantizer.calibration.hooks import input_of
from vlmq_export.quantizer.grids.linears import Linear

QKV, OUT, GATE_UP, DOWN = range(4)  # the steps, in order
RESIDUAL = (OUT, DOWN)  # the steps whose output is added to the residual stream


@dataclass(frozen=True)
class Inputs:
    """What enters the linears of one step in one batch, for the tokens of its valid samples."""

    quantized: torch.Tensor  # x, [tokens, in]
    full: torch.Tensor | None  # x̃, [tokens, in]; None where there is one stream
    residual: torch.Tensor | None = None  # r̃ − r, [tokens, hidden], if asked for


class LayerWalk:
    """One layer, which still has its source weights, and the batches at its input."""

    @torch.no_grad()
    @tensor_cores()
    def __init__(self, layer: Any, batches: list[Batch], *, two_streams: bool):
        self.layer, self.batches, self.two_streams = layer, batches, two_streams
        self._reached = -1  # the last step that the quantized stream has come to
        self._attended: dict[int, Callable] = {}  # batch → a of the quantized stream
        self._full_attended: dict[int, Callable] = {}  # the same of the full-precision stream
        self._source: list[tuple[nn.Parameter, torch.Tensor]] = []  # of gate and up, once replaced
        for index, batch in enumerate(batches if two_streams else ()):
            attended = attention_output(layer, batch.full, batch.kwargs)
            self._full_attended[index] = batch.aside(attended)

    @torch.no_grad()
    @tensor_cores()
    def attention_target(self, index: int) -> torch.Tensor:
        """h₂ of the full-precision stream in one batch, before any linear is replaced."""
        return self.batches[index].full + self.layer.self_attn.o_proj(self._full_attended[index]())

    @torch.no_grad()
    def inputs(self, step: int, *, residual: bool = False) -> Iterator[Inputs]:
        """What enters the linears of a step, batch after batch. Ask for every step once, in order.

        The linears of earlier steps have their decoded weights by now, those of this step and of
        later ones their source weights. With `residual`, the difference of what the linears' output
        is added to comes along, in the two steps that have one.
        """
        for index, batch in enumerate(self.batches):
            behind = full = None
            if residual and step in RESIDUAL:
                behind = batch.tokens(batch.full - batch.quantized)
            if self.two_streams:
                full = batch.tokens(self._pass_full(step, index))
            yield Inputs(batch.tokens(self._pass_quantized(step, index)), full, behind)
        self._reached = step

    @torch.no_grad()
    @tensor_cores()
    def again(self, step: int, index: int) -> torch.Tensor:
        """x of one batch once more, [samples, tokens, in], while its step lasts."""
        layer, hidden = self.layer, self.batches[index].quantized
        if step == OUT:
            return self._attended[index]()
        if step == DOWN:
            return mlp_inner(layer, hidden)
        return (layer.input_layernorm if step == QKV else layer.post_attention_layernorm)(hidden)

    def put(self, name: str, linear: Linear) -> None:
        """Give a linear the weights and the bias that will be on disk."""
        if self.two_streams and name in ("mlp.gate_proj", "mlp.up_proj"):
            # The full-precision stream has not passed them yet.
            source = self.layer.get_submodule(name).parameters()
            self._source += [(p, p.detach().clone()) for p in source]
        put(self.layer, name, linear)

    @torch.no_grad()
    @tensor_cores()
    def pass_full(self) -> None:
        """Take the full-precision stream past a layer that an earlier run has solved."""
        for index in range(len(self.batches)) if self.two_streams else ():
            self._pass_full(OUT, index)
            self._pass_full(DOWN, index)

    def rewind(self, entering: Sequence[Callable[[], torch.Tensor]]) -> None:
        """Put the quantized stream back to the layer's input, X of each batch.

        `advance` then takes it through whatever weights the layer has.
        """
        for batch, hidden in zip(self.batches, entering):
            batch.quantized = hidden()
        self._reached = -1

    @torch.no_grad()
    @tensor_cores()
    def advance(self) -> int:
        """Move both streams past the layer, which has its decoded weights by now.

        The quantized stream computes the same whether the layer was solved just now or in an
        earlier run. Returns how many samples were lost because their activations are not finite.
        """
        self._source.clear()
        for index, batch in enumerate(self.batches):
            for step in (OUT, GATE_UP):
                if step > self._reached:
                    self._pass_quantized(step, index)
            hidden = batch.quantized
            hidden = hidden + self.layer.mlp.down_proj(mlp_inner(self.layer, hidden))
            batch.pass_layer(hidden, batch.full if self.two_streams else None)
        return sum(batch.drop_non_finite() for batch in self.batches)

    @tensor_cores()
    def _pass_quantized(self, step: int, index: int) -> torch.Tensor:
        """Take the quantized stream of a batch to a step. Returns what enters its linears."""
        layer, batch = self.layer, self.batches[index]
        if step == QKV:
            return layer.input_layernorm(batch.quantized)
        if step == OUT:
            attended = attention_output(layer, batch.quantized, batch.kwargs)
            self._attended[index] = batch.aside(attended)
            return attended
        if step == GATE_UP:
            attended = self._attended.pop(index)()
            batch.quantized = batch.quantized + layer.self_attn.o_proj(attended)
            return layer.post_attention_layernorm(batch.quantized)
        return mlp_inner(layer, batch.quantized)

    @tensor_cores()
    def _pass_full(self, step: int, index: int) -> torch.Tensor:
        """Take the full-precision stream of a batch past a step. Returns what enters its linears.

        Its residual stream moves with OUT and DOWN, while these linears have their source weights.
        """
        layer, batch = self.layer, self.batches[index]
        if step == QKV:
            return layer.input_layernorm(batch.full)
        if step == OUT:
            attended = self._full_attended.pop(index)()
            batch.full = batch.full + layer.self_attn.o_proj(attended)
            return attended
        if step == GATE_UP:
            return layer.post_attention_layernorm(batch.full)
        with self._source_weights():
            inner = mlp_inner(layer, batch.full)
        batch.full = batch.full + layer.mlp.down_proj(inner)
        return inner

    @contextmanager
    def _source_weights(self):
        """gate_proj and up_proj as they were before they were replaced."""
        decoded = [parameter.data for parameter, _ in self._source]
        for parameter, source in self._source:
            parameter.data = source
        try:
            yield
        finally:
            for (parameter, _), value in zip(self._source, decoded):
                parameter.data = value


def attention_output(layer: Any, hidden: torch.Tensor, kwargs: Mapping) -> torch.Tensor:
    """a, the attention's output before o_proj, [samples, tokens, in of o_proj]."""
    attention = layer.self_attn
    return input_of(
        attention.o_proj,
        lambda: attention(hidden_states=layer.input_layernorm(hidden), **kwargs),
    )


def mlp_inner(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """m for h₂, [samples, tokens, in of down_proj]."""
    normed = layer.post_attention_layernorm(hidden)
    return input_of(layer.mlp.down_proj, lambda: layer.mlp(normed))


@torch.no_grad()
def put(layer: nn.Module, name: str, linear: Linear) -> None:
    """Give a linear of the layer the weights and the bias that will be on disk."""
    module: Any = layer.get_submodule(name)
    module.weight.copy_(linear.decode())
    if linear.bias is not None:
        module.bias.copy_(linear.bias)


def restore(layer: nn.Module, prefix: str, linears: Sequence[Linear]) -> None:
    """Give a layer what an earlier run solved. `prefix` is the layer's hub name with its dot."""
    for linear in linears:
        put(layer, linear.name.removeprefix(prefix), linear)
