"""A gated delta net, the linear attention of Qwen3.5, for a graph that torch.onnx traces.

Its convolution and its recurrence are one operator each of ONNX Runtime (com.microsoft), and
`functions` has both in standard operators, for runtimes that lack them. What lies between the
linears is float32 in graphs of either type, and so are both states, which sum over every token.
transformers computes the recurrence in float32 too.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.nn.functional import silu, softplus
from torch.onnx.ops import symbolic_multi_out

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.graphs.traced_operators import OPSET, rms_norm, scaled_to_rms

STATES = ("conv_state", "recurrent_state")  # onnxruntime-genai finds both by these names
# Ends of the names of parameters that are float32 in graphs of either type.
WIDE = tuple(f".linear_attn.{p}" for p in ("A_log", "dt_bias", "conv1d.weight", "norm.weight"))
_EPSILON = 1e-6  # that transformers adds to the squared length of a query and a key


def require_silu(net: Any) -> None:
    """Raises FormatError for an activation behind the convolution that its operator lacks."""
    if net.activation not in ("silu", "swish"):
        raise FormatError(
            f"ONNX graphs have no {net.activation} in a linear attention, which config.json asks"
            " for (hidden_act); leave out --format onnx"
        )


def empty_states(net: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both states before the first token, float32.

    They are the last inputs of the convolution, [B, channels, kernel − 1], and what the keys have
    written, [B, value heads, key size, value size].
    """
    conv = torch.zeros(batch, net.conv_dim, net.conv_kernel_size - 1)
    return conv, torch.zeros(batch, net.num_v_heads, net.head_k_dim, net.head_v_dim)


def delta_net(
    net: Any,
    x: torch.Tensor,  # [B, S, hidden]
    real: torch.Tensor,  # [B, S]: 1 at tokens, and 0 at what fills up a batch
    past: list[torch.Tensor],  # both states, as in `empty_states`
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output [B, S, hidden], and both states with the new tokens.

    Padding is a row of zeros, which leaves a state of zeros as it is.
    """
    x = x * real[..., None].to(x.dtype)
    mixed, z = net.in_proj_qkv(x).float(), net.in_proj_z(x).float()
    a, b = net.in_proj_a(x).float(), net.in_proj_b(x).float()
    mixed, conv_state = _convolve(net, mixed.transpose(1, 2), past[0])
    keys, value = mixed.transpose(1, 2).split([2 * net.key_dim, net.value_dim], dim=-1)
    query, key = _unit(net, keys).chunk(2, dim=-1)
    decay = -net.A_log.exp() * softplus(a + net.dt_bias)  # [B, S, value heads], ≤ 0
    attended, state = _attend(net, query, key, value, decay, b.sigmoid(), past[1])
    attended = rms_norm(net.norm, attended.unflatten(-1, (net.num_v_heads, net.head_v_dim)))
    return net.out_proj((attended.flatten(2) * silu(z)).to(x.dtype)), conv_state, state


def _unit(net: Any, keys: torch.Tensor) -> torch.Tensor:
    """Every head of queries and keys divided by its length √(Σx² + ε), [B, S, heads·key size].

    That is an RMS norm whose weights are 1/√size.
    """
    size = net.head_k_dim
    weight = torch.full((size,), size**-0.5)
    heads = keys.unflatten(-1, (2 * net.num_k_heads, size))
    return scaled_to_rms(heads, weight, _EPSILON / size).flatten(2)


def _convolve(
    net: Any, mixed: torch.Tensor, past: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The causal convolution of each channel and SiLU, [B, channels, S], and its new state."""
    bias = torch.zeros(net.conv_dim)  # the operator could do without, its function could not
    convolved, state = symbolic_multi_out(
        "com.microsoft::CausalConvWithState",
        (mixed, net.conv1d.weight, bias, past),
        {"activation": "silu"},
        dtypes=(mixed.dtype, past.dtype),
        shapes=(mixed.shape, past.shape),
        version=1,
    )
    return convolved, state


def _attend(
    net: Any,
    query: torch.Tensor,  # [B, S, key heads·key size], of length 1 in each head
    key: torch.Tensor,  # the same
    value: torch.Tensor,  # [B, S, value heads·value size]
    decay: torch.Tensor,  # [B, S, value heads]: logarithms
    step: torch.Tensor,  # [B, S, value heads]: how much of a value is written
    past: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the queries read, [B, S, value heads·value size], and the new state.

    For each token S ← e^decay·S, then S ← S + step · key ⊗ (value − Sᵀ key). What is read is
    Sᵀ query / √size. Value heads that follow each other share a query and a key.
    """
    read, state = symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (query, key, value, past, decay, step),
        {
            "q_num_heads": net.num_k_heads,
            "kv_num_heads": net.num_v_heads,
            "scale": float(net.head_k_dim**-0.5),
            "update_rule": "gated_delta",
        },
        dtypes=(value.dtype, past.dtype),
        shapes=(value.shape, past.shape),
        version=1,
    )
    return read, state


def functions(net: Any) -> list[ir.Function]:
    """Both operators in standard ones, from mobius: the recurrence is a Scan over the tokens.

    The delta nets of a model have one shape.
    """
    from mobius.functions import causal_conv_nd_with_state, linear_attention

    convolution = causal_conv_nd_with_state(
        kernel_size=net.conv_kernel_size, channels=net.conv_dim, activation="silu"
    )
    recurrence = linear_attention(
        q_num_heads=net.num_k_heads, kv_num_heads=net.num_v_heads, scale=float(net.head_k_dim**-0.5)
    )
    for function in (convolution, recurrence):
        function.opset_imports[""] = OPSET  # mobius' graphs are of the next one
    return [convolution, recurrence]
