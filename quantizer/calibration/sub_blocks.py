"""What a residual step of a decoder layer computes, by its description in the family's entry.

x ← x + post(out(mix(ins(norm(x))))). The mix is whatever transformers' own module does between
the linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlmq_export.quantizer.calibration.hooks import input_of, inputs_of
from vlmq_export.quantizer.model.families import SubBlock

_POSITIONS = ("position_embeddings", "position_ids")


def normed(layer: Any, block: SubBlock, hidden: torch.Tensor) -> torch.Tensor:
    """norm(x), which enters `ins`, [samples, tokens, hidden]."""
    return layer.get_submodule(block.norm)(hidden)


def inner(layer: Any, block: SubBlock, x: torch.Tensor, kwargs: Mapping) -> torch.Tensor:
    """out(mix(ins(x))) of what has passed the norm, [samples, tokens, hidden]."""
    module = layer.get_submodule(block.module)
    if not block.attends:
        return module(x)
    if block.kind == "recurrent":  # it hands on to its kernels whatever else it is given
        return module(hidden_states=x, **{k: v for k, v in kwargs.items() if k not in _POSITIONS})
    return module(hidden_states=x, **kwargs)[0]


def mixed(layer: Any, block: SubBlock, hidden: torch.Tensor, kwargs: Mapping) -> torch.Tensor:
    """mix(ins(norm(x))), which enters `out`, [samples, tokens, in of out]. The step ends there."""
    return input_of(
        layer.get_submodule(block.out),
        lambda: inner(layer, block, normed(layer, block, hidden), kwargs),
    )


def chosen(layer: Any, block: SubBlock, x: torch.Tensor, kwargs: Mapping) -> torch.Tensor:
    """The experts that the router chooses for what has passed the norm, [samples, tokens, k]."""
    module = layer.get_submodule(block.holder)
    choice = inputs_of(module, lambda: inner(layer, block, x, kwargs))[1]
    return choice.view(*x.shape[:2], -1)


def closed(layer: Any, block: SubBlock, entering: torch.Tensor) -> torch.Tensor:
    """post(out(·)) of what enters `out`: what is added to the residual stream."""
    return _after(layer, block, layer.get_submodule(block.out)(entering))


def passed(layer: Any, block: SubBlock, hidden: torch.Tensor, kwargs: Mapping) -> torch.Tensor:
    """The residual stream behind the step, [samples, tokens, hidden]."""
    found = inner(layer, block, normed(layer, block, hidden), kwargs)
    return hidden + _after(layer, block, found)


def _after(layer: Any, block: SubBlock, found: torch.Tensor) -> torch.Tensor:
    """The norm behind `out`, where there is one."""
    return layer.get_submodule(block.post)(found) if block.post else found
