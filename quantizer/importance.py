"""One importance factor per token and attention projection (VLMQ, arXiv 2508.03351; methods.md §1.2, Eq. 8-11).

The local loss compares the attention block, residual included, on the two streams, with full-precision weights in both:

    L = ‖Attn(X) − Attn(X̃)‖²_F        Attn(X) = X + MHSA(norm(X))

g_n is the mean absolute gradient of L over the channels of token n at the projection's output (ℓ1), or its ℓ2 norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.model import tensor_cores

# As named in every supported family; the paper weighs these four and leaves the MLP alone.
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def attention_block(layer: nn.Module, hidden: torch.Tensor, kwargs: Mapping) -> torch.Tensor:
    """hidden + MHSA(input_layernorm(hidden)), [batch, tokens, hidden]."""
    return hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]


@tensor_cores()
def output_gradients(
    layer: nn.Module, hidden: torch.Tensor, target: torch.Tensor, kwargs: Mapping
) -> dict[str, torch.Tensor]:
    """∂L/∂Z at the output Z of each projection: name → float32 [batch, tokens, out]; `target` is Attn(X̃).

    L is a sum over tokens and channels, so samples do not weigh on each other. o_proj's output enters L additively: its
    gradient is 2·(Attn(X) − Attn(X̃)), without a backward pass. The parameters are left alone.
    """
    return _gradients(layer, PROJECTIONS, lambda: attention_block(layer, hidden, kwargs), target)


@tensor_cores()
def mlp_gradients(layer: nn.Module, hidden: torch.Tensor, full: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of the MLP's projections, for the whole layer's L = ‖Layer(X) − Layer(X̃)‖²; no paper tells of it.

    hidden, full: Attn(X) and Attn(X̃), [batch, tokens, hidden]. down_proj's gradient is the closed one here.
    """

    def block(x: torch.Tensor) -> torch.Tensor:
        return x + layer.mlp(layer.post_attention_layernorm(x))

    with torch.no_grad():
        target = block(full)
    return _gradients(layer, MLP, lambda: block(hidden), target)


def _gradients(
    layer: nn.Module, names: Sequence[str], block: Callable[[], torch.Tensor], target: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Of ‖block() − target‖² at the outputs of the modules, of which the last one's enters the block additively."""
    leaves: dict[str, torch.Tensor] = {}
    with torch.enable_grad(), ExitStack() as stack:
        for name in names[:-1]:
            stack.enter_context(leaf_output(layer.get_submodule(name), leaves, name))
        # The fused backward adds in no fixed order on CUDA; this one does, and a resumed run must match.
        if target.is_cuda:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        student = block()
        error = 2 * (student.detach() - target)
        gradients = torch.autograd.grad(student, list(leaves.values()), grad_outputs=error)
    return dict(zip(leaves, gradients)) | {names[-1]: error}


@contextmanager
def leaf_output(module: nn.Module, leaves: dict[str, torch.Tensor], name: str, *, cut: bool = True):
    """Remember the module's latest output, which becomes a leaf of the graph if it is cut off from what is before."""

    def hook(_module, _inputs, output: torch.Tensor) -> torch.Tensor:
        leaves[name] = output.detach().requires_grad_() if cut else output
        return leaves[name]

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def token_factors(gradient: torch.Tensor, norm: str) -> torch.Tensor:
    """g, float32 [..., tokens], of a gradient [..., tokens, channels]: `l1` mean |P| or `l2` ‖P‖₂ over channels."""
    return gradient.abs().mean(-1) if norm == "l1" else gradient.norm(dim=-1)


def floored(factors: Iterable[torch.Tensor], least: float, ranks: Ranks = ALONE) -> list[torch.Tensor]:
    """Normalized factors with as much of a constant mixed in, g² ← (g² + ε)/(1 + ε), as leaves `least` effective tokens.

    N = (Σg²)²/Σg⁴ (D5). Over n tokens with mean(g²) = 1 and mean(g⁴) = m it becomes n·(1 + ε)²/(m + 2ε + ε²).
    """
    factors = list(factors)
    count, fourth = ranks.total(
        sum(g.numel() for g in factors), sum(float(g.double().square().square().sum()) for g in factors)
    )
    least = min(least, count / 2)
    if not count or count**2 / fourth >= least:
        return factors
    # with y = (1 + ε)²: n·y/(y + m − 1) = least
    epsilon = (least * (fourth / count - 1) / (count - least)) ** 0.5 - 1
    return [((g.double().square() + epsilon) / (1 + epsilon)).sqrt().float() for g in factors]


def clipped(factors: Iterable[torch.Tensor], most: float, ranks: Ranks = ALONE) -> list[torch.Tensor]:
    """Normalized factors whose squares are cut off at `most` times their mean, normalized again."""
    return normalized([g.clamp_max(most**0.5) for g in factors], ranks)


def normalized(factors: Iterable[torch.Tensor], ranks: Ranks = ALONE) -> list[torch.Tensor]:
    """The factors of one projection over all samples of all ranks, scaled to mean(g²) = 1 (D1); all ones if the largest is 0 (D3).

    The scale of g has no influence on the integers; this one keeps float32 sums in range.
    """
    factors = list(factors)
    largest = ranks.largest(max((float(g.max()) for g in factors if g.numel()), default=0.0))
    if largest == 0:
        return [torch.ones_like(g) for g in factors]
    total, count = ranks.total(
        sum(float((g.double() / largest).square().sum()) for g in factors), sum(g.numel() for g in factors)
    )
    scale = (count / total) ** 0.5 / largest
    return [(g.double() * scale).float() for g in factors]
