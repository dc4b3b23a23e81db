"""Looking into a running module: what goes in, what comes out, and stopping there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn


class Stop(Exception):
    """Ends a forward pass once what was wanted is there."""


@contextmanager
def before(module: nn.Module, action: Callable[[tuple, dict], Any]):
    """Call action(args, kwargs) before each forward of the module."""
    handle = module.register_forward_pre_hook(
        lambda _module, args, kwargs: action(args, kwargs), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def inputs_of(module: nn.Module, call: Callable[[], object]) -> tuple:
    """The arguments that `call` would give the module. The call ends there."""
    caught: list[tuple] = []

    def catch(args: tuple, _kwargs: dict) -> None:
        caught.append(args)
        raise Stop

    with before(module, catch), suppress(Stop):
        call()
    return caught[0]


def input_of(module: nn.Module, call: Callable[[], object]) -> torch.Tensor:
    """The first of these arguments."""
    return inputs_of(module, call)[0]


@contextmanager
def leaf_output(module: nn.Module, leaves: dict[str, torch.Tensor], name: str, *, cut: bool = True):
    """Keep the module's latest output in leaves[name], for a gradient with respect to it.

    With `cut` the output becomes a leaf of the graph: nothing before the module gets a gradient.
    """

    def hook(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        leaves[name] = output.detach().requires_grad_() if cut else output
        return leaves[name]

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_output(linear: Any):
    """Do not compute what a linear puts out: it is zeros, and gradients pass as through the linear.

    For a backward pass where no value depends on the output.
    """
    linear.forward = lambda x: _WithoutOutput.apply(x, linear.weight)
    try:
        yield
    finally:
        del linear.forward


class _WithoutOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None
