"""What calibration leaves of a linear's inputs (methods.md §1.6).

    A = Σ g² x xᵀ        D = Σ g² (x̃ − x) xᵀ        sums over all tokens

x is the input in the quantized stream, x̃ in the full-precision stream, g the token's importance. Each batch's product is
added up in float64, then rounded once: the sums are the same whatever the order of the batches, and so are the integers.
(One code that differs in the last bit of a sum changes the inputs of every layer after it: with float32 sums a run on two
ranks kept 85 % of the codes.) Parts can be merged; A and D share weights, masks and precision.

Products may take their factors in less than float32; what that costs is measured in docs/performance.md. x̃ − x is always
formed in float32 first: D has no large terms that cancel.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch

from vlmq_export.quantizer.model import tensor_cores

Precision = Literal["float32", "tf32", "bf16", "bf16x3"]
PRECISION: dict[str, Precision] = {"cpu": "float32", "cuda": "tf32"}  # by device type
_BAND = 1024  # rows of A that are summed together: what lies left of their diagonal is a mirror image


def product(x: torch.Tensor, y: torch.Tensor, precision: Precision) -> torch.Tensor:
    """xᵀ·y, float32 [n, k], of float32 x [tokens, n] and y [tokens, k]; sums are float32 whatever the factors are.

    `tf32` keeps 11 significant bits of each factor, `bf16` 8; `bf16x3` splits each into two bf16 terms and leaves out
    the product of the small ones (16 bits). On the CPU the factors are rounded and multiplied in float32.
    """
    if precision == "bf16x3":
        (x, x_low), (y, y_low) = _split(x), _split(y)
        return product(x, y, "bf16") + product(x, y_low, "bf16") + product(x_low, y, "bf16")
    if precision == "bf16":
        x, y = x.bfloat16(), y.bfloat16()
        return torch.mm(x.T, y, out_dtype=torch.float32) if x.is_cuda else x.float().T @ y.float()
    if precision == "tf32" and not x.is_cuda:
        return tf32(x).T @ tf32(y)
    with tensor_cores() if precision == "tf32" else nullcontext():
        return x.T @ y


def tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the 11 significant bits that tensor cores read, ties to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = x.bfloat16().float()
    return high, x - high


@dataclass
class Statistics:
    """Sums over the tokens seen so far of one linear, or of linears that share input and weights."""

    upper: torch.Tensor  # A, float64 [in, in] while it is added to, of which only bands from the diagonal on are summed
    drift: torch.Tensor | None  # D, float64 likewise; None where the method has one stream only
    diagonal: torch.Tensor  # Σ x², unweighted, float64 [in]: 0 is a dead input, which a small g must not fake
    precision: Precision = "float32"
    tokens: int = 0
    weight: float = 0.0  # Σ g²
    weight_squared: float = 0.0  # Σ g⁴
    modal: torch.Tensor | None = None  # Σ g² x² of image and of text tokens, float64 [2, in]; None where nobody asks
    modal_weight: torch.Tensor | None = None  # Σ g² of either, float64 [2]
    residual: torch.Tensor | None = None  # R = Σ g² (r̃ − r) xᵀ, r what the output is added to, float64 [out, in]
    _mirrored: bool = field(default=False, repr=False)  # whether A is below its diagonal what it is above

    @classmethod
    def empty(
        cls,
        in_features: int,
        *,
        drift: bool,
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
        modal: bool = False,
        residual: int = 0,
    ) -> Statistics:
        """`precision` of the products: the device's own unless given. `residual`: outputs of the linear, if R is wanted."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        square = (in_features, in_features)
        return cls(
            zeros(*square), zeros(*square) if drift else None, zeros(in_features),
            precision or PRECISION[torch.device(device).type],
            modal=zeros(2, in_features) if modal else None, modal_weight=zeros(2) if modal else None,
            residual=zeros(residual, in_features) if residual else None,
        )  # fmt: skip

    @property
    def hessian(self) -> torch.Tensor:
        """A, [in, in], symmetric to the bit."""
        for start in range(0, 0 if self._mirrored else len(self.upper), _BAND):
            stop = start + _BAND
            self.upper[stop:, start:stop] = self.upper[start:stop, stop:].T
        self._mirrored = True
        return self.upper

    def add(
        self,
        x: torch.Tensor,
        x_full: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> None:
        """x, x_full: [tokens, in]; importance g: [tokens], None for ones; image: bool [tokens], where modalities count;
        residual r̃ − r: [tokens, out], where it counts."""
        self._mirrored = False
        x = x.float()
        weighted = x if importance is None else x * importance[:, None]
        for start in range(0, len(self.upper), _BAND):
            stop = start + _BAND
            self.upper[start:stop, start:] += product(weighted[:, start:stop], weighted[:, start:], self.precision)
        self.diagonal += x.square().sum(0)
        if self.drift is not None:
            if x_full is None:
                raise ValueError("these statistics need both streams")
            delta = x_full.float().sub_(x) if x_full.dtype != torch.float32 else x_full - x
            delta = delta if importance is None else delta.mul_(importance[:, None])
            for start in range(0, len(self.drift), _BAND):
                stop = start + _BAND
                self.drift[start:stop] += product(delta[:, start:stop], weighted, self.precision)
        if self.residual is not None:
            behind = residual if importance is None else residual * importance[:, None]
            self.residual += product(behind.float(), weighted, self.precision)
        squares = torch.ones(len(x), dtype=torch.float64) if importance is None else importance.double().square()
        if self.modal is not None:
            for row, tokens in enumerate((image, ~image)):
                self.modal[row] += weighted[tokens].square().sum(0)
                self.modal_weight[row] += squares.to(x.device)[tokens].sum()
        self.tokens += len(x)
        self.weight += float(squares.sum())
        self.weight_squared += float(squares.square().sum())

    def merge(self, other: Statistics) -> None:
        """Add the sums of another part of the tokens."""
        self.upper += other.upper
        self._mirrored &= other._mirrored
        self.diagonal += other.diagonal
        if self.drift is not None:
            self.drift += other.drift
        for name in ("modal", "modal_weight", "residual"):
            if (mine := getattr(self, name)) is not None:
                mine += getattr(other, name)
        self.tokens += other.tokens
        self.weight += other.weight
        self.weight_squared += other.weight_squared

    def rounded(self) -> Statistics:
        """These sums in float32, which the solver works on; the float64 ones are given up."""
        self.upper, self.diagonal = self.upper.float(), self.diagonal.float()
        self.drift = None if self.drift is None else self.drift.float()
        self.residual = None if self.residual is None else self.residual.float()
        return self

    def mismatch(self, weights: torch.Tensor) -> torch.Tensor:
        """W·D, and R where it counts: what the linear's output should make up for, against its input; float32 [out, in]."""
        pull = weights @ self.drift
        return pull if self.residual is None else pull.add_(self.residual)

    def error(self, rounded: torch.Tensor, weights: torch.Tensor) -> float:
        """Σ g²·‖ŵ·x − w·x̃ − (r̃ − r)‖² over these tokens, but for a constant that does not depend on ŵ."""
        change = rounded - weights
        return float(((change @ self.hessian - 2 * self.mismatch(weights)) * change).sum(dtype=torch.float64))

    @property
    def effective_tokens(self) -> float:
        """(Σg²)² / Σg⁴: how many equally weighted tokens carry as much; far below `in` the Hessian is thin (D5)."""
        return self.weight**2 / self.weight_squared if self.weight_squared else 0.0
