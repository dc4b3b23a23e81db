"""One importance factor per token and attention projection (VLMQ, arXiv 2508.03351).

The local loss compares the attention block, residual included, on the two streams. Both sides have
full-precision weights:

    L = ‖Attn(X) − Attn(X̃)‖²_F        Attn(X) = X + MHSA(norm(X))

    X   the block's input in the quantized stream
    X̃   the block's input in the full-precision stream

With P = ∂L/∂Z at the output Z of a projection, g_n is the mean of |P| over the channels of token n
(ℓ1), or the ℓ2 norm of P over them. docs/methods.md §1.2, Eq. 8-11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.hooks import leaf_output
from vlmq_export.quantizer.ranks import ALONE, Ranks

# As named in every supported family. The paper weighs these four and leaves the MLP alone.
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def attention_block(layer: Any, hidden: torch.Tensor, kwargs: Mapping) -> torch.Tensor:
    """hidden + MHSA(input_layernorm(hidden)), [batch, tokens, hidden]."""
    return hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]


@tensor_cores()
def output_gradients(
    layer: Any,
    hidden: torch.Tensor,  # X, [batch, tokens, hidden]
    target: torch.Tensor,  # Attn(X̃), same shape
    kwargs: Mapping,
) -> dict[str, torch.Tensor]:
    """P of each projection: name → float32 [batch, tokens, out].

    L is a sum over tokens and channels, so samples do not weigh on each other. The output of o_proj
    enters L additively: its gradient is 2·(Attn(X) − Attn(X̃)), without a backward pass. The
    parameters are left alone.
    """
    return _gradients(layer, PROJECTIONS, lambda: attention_block(layer, hidden, kwargs), target)


@tensor_cores()
def mlp_gradients(
    layer: Any,
    hidden: torch.Tensor,  # Attn(X), [batch, tokens, hidden]
    full: torch.Tensor,  # Attn(X̃), same shape
) -> dict[str, torch.Tensor]:
    """P of the MLP's linears, for the loss of the whole layer, ‖Layer(X) − Layer(X̃)‖².

    This is ours; no paper tells of it. Here down_proj has the gradient in closed form.
    """

    def block(x: torch.Tensor) -> torch.Tensor:
        return x + layer.mlp(layer.post_attention_layernorm(x))

    with torch.no_grad():
        target = block(full)
    return _gradients(layer, MLP, lambda: block(hidden), target)


def _gradients(
    layer: Any,
    names: Sequence[str],  # of modules; the output of the last one enters the block additively
    block: Callable[[], torch.Tensor],
    target: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The gradients of ‖block() − target‖² at the outputs of the modules."""
    leaves: dict[str, torch.Tensor] = {}
    with torch.enable_grad(), ExitStack() as stack:
        for name in names[:-1]:
            stack.enter_context(leaf_output(layer.get_submodule(name), leaves, name))
        # On CUDA the fused backward adds in no fixed order, and a resumed run must match.
        if target.is_cuda:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        student = block()
        error = 2 * (student.detach() - target)
        gradients = torch.autograd.grad(student, list(leaves.values()), grad_outputs=error)
    return dict(zip(leaves, gradients)) | {names[-1]: error}


def token_factors(gradient: torch.Tensor, norm: str) -> torch.Tensor:
    """g, float32 [..., tokens], of a gradient P [..., tokens, channels].

    `norm` is `l1` for the mean of |P| over the channels, or `l2` for ‖P‖₂ over them.
    """
    return gradient.abs().mean(-1) if norm == "l1" else gradient.norm(dim=-1)


def normalized(factors: Iterable[torch.Tensor], ranks: Ranks = ALONE) -> list[torch.Tensor]:
    """The factors of one projection, over all samples of all ranks, scaled to mean(g²) = 1.

    The scale of g has no influence on the integers; this one keeps float32 sums in range (D1). All
    factors become 1 where the largest is 0 (D3).
    """
    factors = list(factors)
    own = max((float(g.max()) for g in factors if g.numel()), default=0.0)
    largest = ranks.largest(own)
    if largest == 0:
        return [torch.ones_like(g) for g in factors]
    total, count = ranks.total(
        sum(float((g.double() / largest).square().sum()) for g in factors),
        sum(g.numel() for g in factors),
    )
    scale = (count / total) ** 0.5 / largest
    return [(g.double() * scale).float() for g in factors]


def clipped(
    factors: Iterable[torch.Tensor], most: float, ranks: Ranks = ALONE
) -> list[torch.Tensor]:
    """Normalized factors with g² cut off at `most` times its mean, and normalized again."""
    return normalized([g.clamp_max(most**0.5) for g in factors], ranks)


def floored(
    factors: Iterable[torch.Tensor], least: float, ranks: Ranks = ALONE
) -> list[torch.Tensor]:
    """Normalized factors with enough of a constant mixed in to leave `least` effective tokens.

    The mixture is g² ← (g² + ε)/(1 + ε), and the number of effective tokens is N = (Σg²)²/Σg⁴ (D5).
    Over n tokens with mean(g²) = 1 and mean(g⁴) = m, N becomes n·(1 + ε)²/(m + 2ε + ε²).
    """
    factors = list(factors)
    count, fourth = ranks.total(
        sum(g.numel() for g in factors),
        sum(float(g.double().square().square().sum()) for g in factors),
    )
    least = min(least, count / 2)
    if not count or count**2 / fourth >= least:
        return factors
    # With y = (1 + ε)² this is the equation n·y/(y + m − 1) = least.
    epsilon = (least * (fourth / count - 1) / (count - least)) ** 0.5 - 1
    return [((g.double().square() + epsilon) / (1 + epsilon)).sqrt().float() for g in factors]
