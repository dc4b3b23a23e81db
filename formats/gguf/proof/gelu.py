"""The proof of a twin with GELU in its MLPs, which llama.cpp takes from a table.

The table has the values of GELU for float16 inputs below 10. Above 10 it is the input, and below
−10 it is zero. Where an input falls between two entries is settled by its last bits, so that no
reference agrees with such a model to more than 1e-4.

Two comparisons take the place of one:

    out of the table's reach    The gate's matrix is multiplied by 2¹² and the other by 2⁻¹², in the
                                twin and in the reference alike, which changes no digit. Nearly all
                                inputs of GELU are then beyond 10, and nothing else of the model is
                                changed. What is left agrees to 1e-6.
    as it ships                 The reference rounds as the table does. This row says that the
                                activation is GELU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.proof.reference import Reference

SCALE = 2.0**12  # of a gate; inputs of a usual size become a thousand
# Most relative error of logits with the table. Random models have 2e-5 at two layers and 3e-4 at
# 34; with SiLU in the place of GELU they have 1e-1.
TABLE = 1e-3
REACH = 10.0  # from here on, llama.cpp takes nothing from the table


def beyond(name: str, array: np.ndarray) -> np.ndarray:
    """A tensor of the twin, by its GGUF name, with the inputs of GELU out of the table's reach."""
    return array * np.float32(_factor(name))


def _factor(name: str) -> float:
    if name.endswith("ffn_gate.weight"):
        return SCALE
    return 1 / SCALE if name.endswith("ffn_up.weight") else 1.0


@contextmanager
def beyond_table(reference: Reference, layout: Layout) -> Iterator[None]:
    """The reference with the same."""
    factors = {place.module: _factor(name) for name, place in layout.text.items()}
    with reference.changed():
        try:
            _scale(reference, factors)
            yield
        finally:
            _scale(reference, {module: 1 / f for module, f in factors.items()})


def _scale(reference: Reference, factors: dict[str, float]) -> None:
    """Multiply weights in place. Powers of two can be taken back."""
    for module, factor in factors.items():
        if factor != 1:
            reference.model.get_parameter(module).data.mul_(factor)


@contextmanager
def from_table(reference: Reference) -> Iterator[None]:
    """The reference with GELU as llama.cpp takes it from its table."""
    hooks = [
        _looked_up(module)
        for module in reference.model.get_decoder().modules()
        if "GELU" in type(module).__name__
    ]
    assert hooks, "the model has GELU, and transformers a module for it"
    with reference.changed():
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _looked_up(module: torch.nn.Module) -> RemovableHandle:
    def action(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], _: torch.Tensor):
        x = args[0]
        entry = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < REACH, entry, x.clamp(min=0))

    return module.register_forward_hook(action)
