"""What calibration leaves of a linear's inputs (methods.md §1.6).

    A = Σ g² x xᵀ        D = Σ g² (x̃ − x) xᵀ        sums over all tokens

x is the input in the quantized stream, x̃ in the full-precision stream, g the token's importance. Each batch's product is
made in float32 and added up in float64, then rounded once: the sums are the same whatever the order of the batches, and
so are the integers. (One code that differs in the last bit of a sum changes the inputs of every layer after it: with
float32 sums a run on two ranks kept 85 % of the codes.) Parts can be merged; A and D share weights and masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_BAND = 2048


@dataclass
class Statistics:
    """Sums over the tokens seen so far of one linear, or of linears that share input and weights."""

    hessian: torch.Tensor  # A, float64 [in, in] while it is added to
    drift: torch.Tensor | None  # D, likewise; None where the method has one stream only
    diagonal: torch.Tensor  # Σ x², unweighted, float64 [in]: 0 is a dead input, which a small g must not fake
    tokens: int = 0
    weight: float = 0.0  # Σ g²
    weight_squared: float = 0.0  # Σ g⁴

    @classmethod
    def empty(cls, in_features: int, *, drift: bool, device: torch.device | str = "cpu") -> Statistics:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            zeros(in_features, in_features), zeros(in_features, in_features) if drift else None, zeros(in_features)
        )

    def add(self, x: torch.Tensor, x_full: torch.Tensor | None = None, importance: torch.Tensor | None = None) -> None:
        """x, x_full: [tokens, in]; importance g: [tokens], None for ones."""
        x = x.float()
        weighted = x if importance is None else x * importance[:, None]
        _add_product(self.hessian, weighted, weighted)
        self.diagonal += x.square().sum(0)
        if self.drift is not None:
            if x_full is None:
                raise ValueError("these statistics need both streams")
            delta = x_full.float() - x
            _add_product(self.drift, delta if importance is None else delta * importance[:, None], weighted)
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

    def rounded(self) -> Statistics:
        """These sums in float32, which the solver works on; the float64 ones are given up."""
        self.hessian, self.diagonal = self.hessian.float(), self.diagonal.float()
        self.drift = None if self.drift is None else self.drift.float()
        return self

    @property
    def effective_tokens(self) -> float:
        """(Σg²)² / Σg⁴: how many equally weighted tokens carry as much; far below `in` the Hessian is thin (D5)."""
        return self.weight**2 / self.weight_squared if self.weight_squared else 0.0


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += leftᵀ·right, float64 += float32, in bands of rows so that the product takes little memory."""
    for start in range(0, len(total), _BAND):
        total[start : start + _BAND] += left[:, start : start + _BAND].T @ right
