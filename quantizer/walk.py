"""Both streams through one decoder layer, stage by stage; nothing is computed twice that the method does not change.

    x = norm(h)    q, k, v and attention → a    h₂ = h + o(a)    x₂ = norm(h₂)    gate, up → m    h₂ + down(m)

Every supported family's layer is this; a test holds each to its own forward. Its linears' inputs are x, a, x₂ and m. The
full-precision stream steps past a group of linears while they still have their source weights, the quantized stream once
they have the decoded ones. Between two groups a batch keeps h and, for a while, a; m, by far the widest, is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import nn

from vlmq_export.quantizer.artifact import QuantizedLinear
from vlmq_export.quantizer.model import tensor_cores
from vlmq_export.quantizer.streams import Batch, Stop, before, put

QKV, OUT, GATE_UP, DOWN = range(4)  # groups of linears that share an input, in order


class LayerWalk:
    """One layer, which still has its source weights, and the batches at its input."""

    @torch.no_grad()
    @tensor_cores()
    def __init__(self, layer: nn.Module, batches: list[Batch], *, two_streams: bool):
        self.layer, self.batches, self.two_streams = layer, batches, two_streams
        self._solved = False
        self.with_residual = False  # whether `inputs` leaves r̃ − r, what the output is added to, of each batch here:
        self.residual: torch.Tensor | None = None  # [tokens, hidden]
        self._attended: dict[int, Callable] = {}  # batch → a of the quantized stream
        self._full_attended: dict[int, Callable] = {}  # the same of the full-precision stream
        self._source: list[tuple[nn.Parameter, torch.Tensor]] = []  # of gate_proj and up_proj, once replaced
        for index, batch in enumerate(batches if two_streams else ()):
            self._full_attended[index] = batch.aside(attention_output(layer, batch.full, batch.kwargs))

    @torch.no_grad()
    @tensor_cores()
    def attention_target(self, index: int) -> torch.Tensor:
        """h₂ of the full-precision stream in one batch; before any linear is replaced."""
        return self.batches[index].full + self.layer.self_attn.o_proj(self._full_attended[index]())

    @torch.no_grad()
    def inputs(self, stage: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """(x, x̃) of a group's linears, [valid samples · tokens, in] each, batch after batch; every stage once, in order.

        The groups before this one have their decoded weights, this one and those after it their source weights.
        """
        for index, batch in enumerate(self.batches):
            if self.with_residual and stage in (OUT, DOWN):
                self.residual = batch.tokens(batch.full - batch.quantized)
            full = batch.tokens(self._full_input(stage, index)) if self.two_streams else None
            yield batch.tokens(self._input(stage, index)), full
        self._solved = stage == DOWN

    @torch.no_grad()
    @tensor_cores()
    def again(self, stage: int, index: int) -> torch.Tensor:
        """x of one batch, [samples, tokens, in], once more while its stage lasts."""
        layer, hidden = self.layer, self.batches[index].quantized
        if stage == OUT:
            return self._attended[index]()
        if stage == DOWN:
            return mlp_inner(layer, hidden)
        return (layer.input_layernorm if stage == QKV else layer.post_attention_layernorm)(hidden)

    def put(self, name: str, linear: QuantizedLinear) -> None:
        """Give a linear the weights and bias that will be on disk."""
        if self.two_streams and name in ("mlp.gate_proj", "mlp.up_proj"):  # the full-precision stream is not past them
            self._source += [(p, p.detach().clone()) for p in self.layer.get_submodule(name).parameters()]
        put(self.layer, name, linear)

    @torch.no_grad()
    @tensor_cores()
    def pass_full(self) -> None:
        """Take the full-precision stream past a layer that will get what an earlier run solved."""
        for index in range(len(self.batches)) if self.two_streams else ():
            self._full_input(OUT, index)
            self._full_input(DOWN, index)

    @torch.no_grad()
    @tensor_cores()
    def advance(self) -> int:
        """Move both streams past the layer, which has its decoded weights; how many samples were lost to NaN.

        The quantized stream computes the same whether the layer was solved just now or in an earlier run.
        """
        self._source.clear()
        for index, batch in enumerate(self.batches):
            for stage in () if self._solved else (OUT, GATE_UP):
                self._input(stage, index)
            hidden = batch.quantized
            hidden = hidden + self.layer.mlp.down_proj(mlp_inner(self.layer, hidden))
            batch.pass_layer(hidden, batch.full if self.two_streams else None)
        return sum(batch.drop_non_finite() for batch in self.batches)

    @tensor_cores()
    def _input(self, stage: int, index: int) -> torch.Tensor:
        layer, batch = self.layer, self.batches[index]
        if stage == QKV:
            return layer.input_layernorm(batch.quantized)
        if stage == OUT:
            attended = attention_output(layer, batch.quantized, batch.kwargs)
            self._attended[index] = batch.aside(attended)
            return attended
        if stage == GATE_UP:
            batch.quantized = batch.quantized + layer.self_attn.o_proj(self._attended.pop(index)())
            return layer.post_attention_layernorm(batch.quantized)
        return mlp_inner(layer, batch.quantized)

    @tensor_cores()
    def _full_input(self, stage: int, index: int) -> torch.Tensor:
        layer, batch = self.layer, self.batches[index]
        if stage == QKV:
            return layer.input_layernorm(batch.full)
        if stage == OUT:
            attended = self._full_attended.pop(index)()
            batch.full = batch.full + layer.self_attn.o_proj(attended)
            return attended
        if stage == GATE_UP:
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


def attention_output(layer: nn.Module, hidden: torch.Tensor, kwargs: Mapping) -> torch.Tensor:
    """a, [samples, tokens, in of o_proj]."""
    attention = layer.self_attn
    return _input_of(attention.o_proj, lambda: attention(hidden_states=layer.input_layernorm(hidden), **kwargs))


def mlp_inner(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """m of h₂, [samples, tokens, in of down_proj]."""
    return _input_of(layer.mlp.down_proj, lambda: layer.mlp(layer.post_attention_layernorm(hidden)))


def _input_of(module: nn.Module, call: Callable[[], object]) -> torch.Tensor:
    """What the module would get; the call ends there."""
    caught: list[torch.Tensor] = []

    def catch(args, _kwargs):
        caught.append(args[0])
        raise Stop

    with before(module, catch), suppress(Stop):
        call()
    return caught[0]
