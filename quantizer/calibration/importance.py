"""One importance factor per token and linear of a sub-block (VLMQ, arXiv 2508.03351).

The local loss compares a sub-block, residual included, on the two streams. Both sides have
full-precision weights. The paper's is the attention:

    L = ‖Attn(X) − Attn(X̃)‖²_F        Attn(X) = X + MHSA(norm(X))

    X   the block's input in the quantized stream
    X̃   the block's input in the full-precision stream

With P = ∂L/∂Z at the output Z of a projection, g_n is the mean of |P| over the channels of token n
(ℓ1), or the ℓ2 norm of P over them. docs/methods.md §1.2, Eq. 8-11.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.hooks import leaf_output
from vlmq_export.quantizer.calibration.sub_blocks import passed
from vlmq_export.quantizer.model.families import SubBlock
from vlmq_export.quantizer.ranks import ALONE, Ranks


@tensor_cores()
def output_gradients(
    layer: Any,
    block: SubBlock,
    hidden: torch.Tensor,  # X, [batch, tokens, hidden]
    target: torch.Tensor,  # what the sub-block makes of X̃, same shape
    kwargs: Mapping,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """P of each linear, name → float32 [batch, tokens, out], and what the sub-block makes of X.

    That of an expert's linears is of the tokens that come there alone, [tokens, out].

    L is a sum over tokens and channels, so samples do not weigh on each other. Where nothing stands
    between `out` and the residual stream, its output enters L additively: its gradient is twice the
    difference, without a backward pass. The parameters are left alone.
    """
    leaves: dict[str, torch.Tensor] = {}
    # Behind an expert's output its token's share of the expert is multiplied.
    asked = bool(block.post) or block.kind == "experts"
    with torch.enable_grad(), ExitStack() as stack:
        for place, names in enumerate(block.steps):
            closing = place % 2 == 1
            for name in names if asked or not closing else ():
                module = layer.get_submodule(name)
                stack.enter_context(leaf_output(module, leaves, name, cut=not closing))
        # On CUDA the fused backward adds in no fixed order, and a resumed run must match.
        if target.is_cuda:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        student = passed(layer, block, hidden, kwargs)
        error = 2 * (student.detach() - target)
        gradients = torch.autograd.grad(student, list(leaves.values()), grad_outputs=error)
    found = dict(zip(leaves, gradients))
    return found if asked else found | {block.out: error}, student.detach()


def token_factors(gradient: torch.Tensor, norm: str) -> torch.Tensor:
    """g, float32 [..., tokens], of a gradient P [..., tokens, channels].

    `norm` is `l1` for the mean of |P| over the channels, or `l2` for ‖P‖₂ over them.
    """
    return gradient.abs().mean(-1) if norm == "l1" else gradient.norm(dim=-1)


def per_sample(factors: torch.Tensor) -> torch.Tensor:
    """Factors [samples, tokens] scaled to mean(g²) = 1 in each sample; 0 where all are (D2)."""
    mean = factors.double().square().mean(1, keepdim=True).sqrt()
    return torch.where(mean > 0, factors / mean, 0.0).float()


@dataclass(frozen=True)
class Reached:
    """The factors of the tokens of a batch that come to an expert."""

    factors: torch.Tensor  # g, float32 [n]
    tokens: torch.Tensor  # int64 [n], counted through all samples
    shape: torch.Size  # of the batch: samples and tokens

    def per_sample(self) -> Reached:
        """Scaled to mean(g²) = 1 over those of each sample; 0 where all are (D2)."""
        samples = self.tokens // self.shape[1]
        squares = self.factors.double().square()
        total = squares.new_zeros(self.shape[0]).index_add_(0, samples, squares)
        mean = (total / samples.bincount(minlength=self.shape[0])).sqrt()[samples]
        return replace(self, factors=torch.where(mean > 0, self.factors / mean, 0.0).float())

    def spread(self) -> torch.Tensor:
        """The factors of all tokens, [samples, tokens]; 0 where a token does not come."""
        everywhere = self.factors.new_zeros(self.shape.numel())
        everywhere[self.tokens] = self.factors
        return everywhere.view(self.shape)

    def to(self, device: torch.device | str) -> Reached:
        """The same on a device."""
        return replace(self, factors=self.factors.to(device), tokens=self.tokens.to(device))


def normalized(factors: Iterable[torch.Tensor], ranks: Ranks = ALONE) -> list[torch.Tensor]:
    """The factors of one projection, over all samples of all ranks, scaled to mean(g²) = 1.

    The scale of g has no influence on the integers; this one keeps float32 sums in range (D1). All
    factors become 1 where the largest is 0 (D3).
    """
    factors = list(factors)
    own = max(_each([g.max() for g in factors if g.numel()]), default=0.0)
    largest = ranks.largest(own)
    if largest == 0:
        return [torch.ones_like(g) for g in factors]
    total, count = ranks.total(
        sum(_each([(g.double() / largest).square().sum() for g in factors])),
        sum(g.numel() for g in factors),
    )
    scale = (count / total) ** 0.5 / largest
    return [(g.double() * scale).float() for g in factors]


def _each(numbers: Sequence[torch.Tensor]) -> list[float]:
    """Numbers of the device, which is asked once for all of them."""
    return torch.stack(list(numbers)).tolist() if numbers else []


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
        sum(_each([g.double().square().square().sum() for g in factors])),
    )
    least = min(least, count / 2)
    if not count or count**2 / fourth >= least:
        return factors
    # With y = (1 + ε)² this is the equation n·y/(y + m − 1) = least.
    epsilon = (least * (fourth / count - 1) / (count - least)) ** 0.5 - 1
    return [((g.double().square() + epsilon) / (1 + epsilon)).sqrt().float() for g in factors]
