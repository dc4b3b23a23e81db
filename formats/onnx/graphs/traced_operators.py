"""Standard operators of opset 23 that a trace would spell out, as functions of torch.

They are written as in mobius' graphs. So what a runtime fuses, or what another pass replaces, looks
the same whichever library made the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.onnx.ops import symbolic

OPSET = 23


def rms_norm(norm: Any, x: torch.Tensor, gain: float = 0.0) -> torch.Tensor:
    """`norm` of x [..., width], as one operator of the graph. It multiplies by gain + weight."""
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return scaled_to_rms(x, gain + norm.weight if gain else norm.weight, epsilon)


def scaled_to_rms(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight · x / √(mean x² + epsilon) over the last axis of x [..., width]."""
    return symbolic(
        "::RMSNormalization",
        (x, weight),
        {"axis": -1, "epsilon": float(epsilon)},
        dtype=x.dtype,
        shape=x.shape,
        version=OPSET,
    )


def rotate(
    x: torch.Tensor,  # [B, S, heads·head size]
    rotary: tuple[torch.Tensor, torch.Tensor],  # cosines and sines, [B, S, columns / 2]
    heads: int,
) -> torch.Tensor:
    """The two halves of each head rotated against each other, as one operator of the graph.

    With fewer `columns` than a head has, these first ones are rotated alone.
    """
    columns = 2 * rotary[0].shape[-1]
    partial = {} if columns * heads == x.shape[-1] else {"rotary_embedding_dim": columns}
    return symbolic(
        "::RotaryEmbedding",
        (x, *rotary),
        {"num_heads": heads, "interleaved": 0, **partial},
        dtype=x.dtype,
        shape=x.shape,
        version=OPSET,
    )
