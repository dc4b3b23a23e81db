"""What calibration leaves of a linear's inputs (methods.md §1.6).

    A = Σ g² x xᵀ        D = Σ g² (x̃ − x) xᵀ        sums over all tokens

x is the input in the quantized stream, x̃ in the full-precision stream, g the token's importance. Plain sums in float32:
their order does not matter beyond rounding, parts can be merged, and A and D share weights, masks and precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Statistics:
    """Sums over the tokens seen so far of one linear, or of linears that share input and weights."""

    hessian: torch.Tensor  # A, float32 [in, in]
    drift: torch.Tensor | None  # D, float32 [in, in]; None where the method has one stream only
    diagonal: torch.Tensor  # Σ x², unweighted, float32 [in]: 0 is a dead input, which a small g must not fake
    tokens: int = 0
    weight: float = 0.0  # Σ g²
    weight_squared: float = 0.0  # Σ g⁴

    @classmethod
    def empty(cls, in_features: int, *, drift: bool, device: torch.device | str = "cpu") -> Statistics:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(
            zeros(in_features, in_features), zeros(in_features, in_features) if drift else None, zeros(in_features)
        )

    def add(self, x: torch.Tensor, x_full: torch.Tensor | None = None, importance: torch.Tensor | None = None) -> None:
        """x, x_full: [tokens, in]; importance g: [tokens], None for ones."""
        x = x.float()
        weighted = x if importance is None else x * importance[:, None]
        self.hessian.addmm_(weighted.T, weighted)
        self.diagonal += x.square().sum(0)
        if self.drift is not None:
            if x_full is None:
                raise ValueError("these statistics need both streams")
            delta = x_full.float() - x
            self.drift.addmm_((delta if importance is None else delta * importance[:, None]).T, weighted)
        squares = torch.ones(len(x), dtype=torch.float64) if importance is None else importance.double().square()
        self.tokens += len(x)
        self.weight += float(squares.sum())
        self.weight_squared += float(squares.square().sum())

    def merge(self, other: Statistics) -> None:
        """Add the sums of another part of the tokens."""
        self.hessian += other.hessian
        self.diagonal += other.diagonal
        if self.drift is not None:
            self.drift += other.drift
        self.tokens += other.tokens
        self.weight += other.weight
        self.weight_squared += other.weight_squared

    @property
    def effective_tokens(self) -> float:
        """(Σg²)² / Σg⁴: how many equally weighted tokens carry as much; far below `in` the Hessian is thin (D5)."""
        return self.weight**2 / self.weight_squared if self.weight_squared else 0.0
