"""Codes and scales as real numbers, so that gradients can move them.

A code q = clamp(round(u), 0, top) is a step function of its latent u, whose derivative is 0 or
undefined. The straight-through estimator takes the derivative of clamp(u, −½, top + ½) instead
(Bengio et al., arXiv 1308.3432; for rounding offsets AutoRound, arXiv 2309.05516). A scale is
s·exp(δ): it cannot change its sign, and δ is relative, so that one step size serves all scales.
docs/methods.md §5.7 has the equations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.solutions import Solution


class _Decoded(torch.autograd.Function):
    """Ŵ = s·(q(u) − z), with the gradient of the straight-through estimator."""

    @staticmethod
    def forward(
        ctx: Any,
        latents: torch.Tensor,  # u, [out, in]
        scales: torch.Tensor,  # s, [out, groups]
        zeros: torch.Tensor,  # z, [out, groups]
        top: int,
    ) -> torch.Tensor:
        steps = latents.round().clamp_(0, top).view(*scales.shape, -1)
        steps.sub_(zeros[..., None])  # [out, groups, columns of a group]
        ctx.save_for_backward(latents, steps, scales)
        ctx.top = top
        return (steps * scales[..., None]).view_as(latents)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        latents, steps, scales = ctx.saved_tensors
        grouped = gradients[0].reshape(steps.shape)
        inside = (latents >= -0.5) & (latents <= ctx.top + 0.5)
        own = (grouped * scales[..., None]).view_as(latents).mul_(inside)
        return own, (grouped * steps).sum(-1), None, None


def decoded(
    latents: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> torch.Tensor:
    """The weights [out, in] of latents [out, in], scales and zero-points [out, groups].

    Groups are runs of neighbouring columns. Gradients reach the latents and the scales.
    """
    weights = _Decoded.apply(latents, scales, zeros, top)
    assert isinstance(weights, torch.Tensor)
    return weights


@dataclass(frozen=True)
class Latents:
    """A solution that is being moved. Gradients may be asked for of `codes` and `logs`."""

    codes: torch.Tensor  # u, float32 [out, in]
    logs: torch.Tensor  # δ, float32 [out, groups]
    start: Solution
    grid: Affine

    @classmethod
    def of(cls, solution: Solution, grid: Affine) -> Latents:
        """Latents that decode to the solution. Its groups are runs of neighbouring columns."""
        assert solution.natural_order, "groups that are not runs of columns are refused before"
        codes, logs = solution.codes.float(), torch.zeros_like(solution.scales.float())
        return cls(codes.requires_grad_(), logs.requires_grad_(), solution, grid)

    def weights(self) -> torch.Tensor:
        """The weights [out, in] for a step, with scales that are not rounded yet."""
        scales = self.start.scales.float() * self.logs.exp()
        return decoded(self.codes, scales, self.start.zero_points.float(), self.grid.top)

    @torch.no_grad()
    def solution(self) -> Solution:
        """The integers, and the scales as they will be stored."""
        codes = self.codes.round().clamp_(0, self.grid.top).to(torch.uint8)
        # A scale that has not moved is stored as it was: a zero has no place on the grid.
        moved = self.grid.storable(self.start.scales.float() * self.logs.exp()).half()
        scales = torch.where(self.logs == 0, self.start.scales, moved)
        return replace(self.start, codes=codes, scales=scales)
