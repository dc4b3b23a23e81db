"""Experts of a decoder layer, of which each token takes some: a linear is a linear here as well.

A published file has all experts of a layer in two tensors, and transformers 5 has two parameters:

    file             gate_up_proj [experts, hidden, 2·inner], down_proj [experts, inner, hidden]
    transformers     gate_up_proj [experts, 2·inner, hidden], down_proj [experts, hidden, inner]

Everywhere else an expert has the three linears of an MLP, and they are named as in a checkpoint
that was never fused: `mlp.experts.7.gate_proj`. Tensors of the file are read in parts, and modules
hold views of transformers' parameters, so that nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from vlmq_export.quantizer.storage.tensors import DTYPES, Part, TensorInfo

GATE_UP, DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"
Shape = tuple[int, ...]


class Expert(nn.Module):
    """The MLP of one expert, down(act(gate(x)) · up(x))."""

    def __init__(
        self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activation: nn.Module
    ):  # weights [out, in]
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))
        self.act_fn = activation
        # The tokens of the latest pass that came here, counted through all samples: int64 [n].
        self.tokens: torch.Tensor | None = None

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        """What enters `down_proj`, [tokens, inner]."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.mixed(x))


class Experts(nn.ModuleList):
    """The experts of a layer, in place of transformers' own module."""

    def forward(
        self,
        hidden: torch.Tensor,  # [tokens, hidden]
        chosen: torch.Tensor,  # int64 [tokens, k]: the experts of each token
        shares: torch.Tensor,  # [tokens, k]
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, slots = (chosen == number).nonzero(as_tuple=True)
            expert.tokens = tokens
            out.index_add_(0, tokens, expert(hidden[tokens]) * shares[tokens, slots, None])
        return out


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A linear of this very weight [out, in]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def separate(model: nn.Module) -> dict[str, nn.Module]:
    """Replace the experts of transformers' model by modules with linears, which share its memory.

    Returns what was replaced, by name. Models without experts are left alone.
    """
    fused = {
        name: module
        for name, module in model.named_modules()
        if f".{name}.gate_up_proj".endswith(GATE_UP) and hasattr(module, "gate_up_proj")
    }
    for name, module in fused.items():
        model.set_submodule(name, _by_expert(module))
    return fused


@contextmanager
def separated(model: nn.Module) -> Iterator[None]:
    """The model has modules with linears for its experts inside the block."""
    fused = separate(model)
    try:
        yield
    finally:
        for name, module in fused.items():
            model.set_submodule(name, module)


@torch.no_grad()
def _by_expert(fused: nn.Module) -> Experts:
    """transformers' module of a layer's experts, by expert."""
    activation = fused.get_submodule("act_fn")
    experts = Experts()
    for both, down in zip(fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")):
        gate, up = both.chunk(2)
        experts.append(Expert(gate, up, down, activation))
    return experts


def reached(layer: nn.Module, linear: str) -> torch.Tensor | None:
    """The tokens of the latest pass that came to a linear; None where all tokens do.

    linear: its name in the layer.
    """
    parent = layer.get_submodule(linear.rpartition(".")[0])
    return parent.tokens if isinstance(parent, Expert) else None


def parts_of(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a file, where those of fused experts are one for each linear."""
    return {part.name: part for info in infos.values() for part in _parts(info)}


def _parts(info: TensorInfo) -> Iterator[TensorInfo]:
    """One tensor, or the linears that it holds side by side, [experts, in, out]."""
    names = ("gate_proj", "up_proj") if info.name.endswith(GATE_UP) else ("down_proj",)
    if not info.name.endswith((GATE_UP, DOWN)) or len(info.shape) != 3:
        yield info
        return
    number, rows, columns = info.shape
    size, each = rows * columns * DTYPES[info.dtype].itemsize, columns // len(names)
    module = info.name.rpartition(".")[0]
    for expert in range(number):
        for place, name in enumerate(names):
            yield replace(
                info,
                name=f"{module}.{expert}.{name}.weight",
                shape=(each, rows),
                offset=info.offset + expert * size,
                part=Part(rows, columns, place * each),
            )
