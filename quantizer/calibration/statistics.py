"""What calibration leaves of a linear's inputs.

    A = Σ g² x xᵀ        D = Σ g² (x̃ − x) xᵀ        R = Σ g² p xᵀ        sums over all tokens

    x   the input in the quantized stream
    x̃   the input in the full-precision stream
    g   the importance of the token
    p   what the linear's output should make up for: W(x̃ − x) where there is no D, and the drift
        of what the output is added to, where a method asks for it

The exact target needs no more of D than W·D, which R is where p is W(x̃ − x). A linear with few
outputs takes less time and memory so (`Method.sums_outputs`).

The product of each batch is added up in float64 and rounded once. The sums are then the same
whatever the order of the batches, and so are the integers. (One code that differs changes the
inputs of every layer after it: with float32 sums, a run on two ranks kept 85 % of the codes.)

Products may take their factors in less than float32; docs/performance.md has what that costs. The
difference x̃ − x is always formed in float32 first, so that D has no large terms that cancel.
docs/methods.md §1.6.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from vlmq_export.quantizer.arithmetic import tensor_cores

Precision = Literal["float32", "tf32", "bf16", "bf16x3"]
PRECISION: dict[str, Precision] = {"cpu": "float32", "cuda": "tf32"}  # by type of device
_BAND = 1024  # rows of A that are summed together; left of their diagonal lies a mirror image


def product(x: torch.Tensor, y: torch.Tensor, precision: Precision) -> torch.Tensor:
    """xᵀ·y, float32 [n, k], for float32 x [tokens, n] and y [tokens, k].

    Sums are float32 whatever the factors are: `tf32` keeps 11 significant bits of each factor and
    `bf16` keeps 8. `bf16x3` splits each factor into two bf16 terms and leaves out the product of
    the small ones (16 bits). On the CPU the factors are rounded and multiplied in float32.
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


@torch.no_grad()
def outputs_apart(
    weights: torch.Tensor,  # W, [out, in]
    x: torch.Tensor,  # [tokens, in]
    x_full: torch.Tensor,  # x̃, likewise
) -> torch.Tensor:
    """W(x̃ − x), float32 [tokens, out]."""
    delta = x_full.float() - x.float()
    return product(delta.T, weights.float().T, PRECISION[x.device.type])


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = x.bfloat16().float()
    return high, x - high


@dataclass
class Statistics:
    """Sums over the tokens seen so far, of one linear or of several that share input and weights.

    The sums are float64 while tokens are added. `to_float32` makes them ready for the solver.
    """

    upper: torch.Tensor  # A, [in, in], of which only bands from the diagonal on are summed
    drift: torch.Tensor | None  # D, [in, in]; None where the method needs one stream only
    diagonal: torch.Tensor  # Σ x² without weights, [in]; 0 tells a dead input, whatever g is
    # Σ g² and Σ g⁴, float64 [2]: a tensor, so that no batch waits for the device.
    moments: torch.Tensor
    precision: Precision = "float32"
    tokens: int = 0
    modal: torch.Tensor | None = None  # Σ g² x² of image and of text tokens, [2, in], if asked for
    modal_weight: torch.Tensor | None = None  # Σ g² of either, [2]
    pull: torch.Tensor | None = None  # R, [out, in], if asked for
    _mirrored: bool = field(default=False, repr=False)  # whether A is filled below its diagonal

    @classmethod
    def empty(
        cls,
        in_features: int,
        *,
        drift: bool,
        device: torch.device | str = "cpu",
        precision: Precision | None = None,  # of the products; None: the device's own
        modal: bool = False,
        pull: int = 0,  # outputs of the linear, where R is wanted
    ) -> Statistics:
        """Sums of nothing."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            zeros(in_features, in_features),
            zeros(in_features, in_features) if drift else None,
            zeros(in_features),
            zeros(2),
            precision or PRECISION[torch.device(device).type],
            modal=zeros(2, in_features) if modal else None,
            modal_weight=zeros(2) if modal else None,
            pull=zeros(pull, in_features) if pull else None,
        )

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
        x: torch.Tensor,  # [tokens, in]
        x_full: torch.Tensor | None = None,  # x̃, likewise; needed where there is a D
        importance: torch.Tensor | None = None,  # g, [tokens]; None: all ones
        image: torch.Tensor | None = None,  # bool [tokens]; needed where modalities are summed
        pull: torch.Tensor | None = None,  # p, [tokens, out]; needed where there is an R
    ) -> None:
        """Add the sums of some tokens."""
        self._mirrored = False
        x = x.float()
        weighted = x if importance is None else x * importance[:, None]
        for start in range(0, len(self.upper), _BAND):
            band = weighted[:, start : start + _BAND]
            self.upper[start : start + _BAND, start:] += product(
                band, weighted[:, start:], self.precision
            )
        self.diagonal += x.square().sum(0)
        if self.drift is not None:
            self._add_drift(self.drift, x, x_full, importance, weighted)
        if self.pull is not None:
            if pull is None:
                raise ValueError("these statistics need what the output should make up for")
            behind = pull if importance is None else pull * importance[:, None]
            self.pull += product(behind.float(), weighted, self.precision)
        squares = None if importance is None else importance.double().square()
        if self.modal is not None and self.modal_weight is not None:
            if image is None:
                raise ValueError("these statistics need to know the image tokens")
            for row, tokens in enumerate((image, ~image)):
                self.modal[row] += weighted[tokens].square().sum(0)
                self.modal_weight[row] += tokens.sum() if squares is None else squares[tokens].sum()
        self.tokens += len(x)
        if squares is None:
            self.moments += len(x)
        else:
            self.moments += torch.stack([squares.sum(), squares.square().sum()])

    def _add_drift(
        self,
        drift: torch.Tensor,
        x: torch.Tensor,
        x_full: torch.Tensor | None,
        importance: torch.Tensor | None,
        weighted: torch.Tensor,
    ) -> None:
        if x_full is None:
            raise ValueError("these statistics need both streams")
        same_type = x_full.dtype == torch.float32
        delta = x_full - x if same_type else x_full.float().sub_(x)
        delta = delta if importance is None else delta.mul_(importance[:, None])
        for start in range(0, len(drift), _BAND):
            band = delta[:, start : start + _BAND]
            drift[start : start + _BAND] += product(band, weighted, self.precision)

    def plus(self, other: Statistics) -> Statistics:
        """The sums of both parts of the tokens. Neither part is changed."""

        def both(name: str) -> torch.Tensor | None:
            mine = getattr(self, name)
            return None if mine is None else mine + getattr(other, name)

        return Statistics(
            self.upper + other.upper,
            both("drift"),
            self.diagonal + other.diagonal,
            self.moments + other.moments,
            self.precision,
            self.tokens + other.tokens,
            both("modal"),
            both("modal_weight"),
            both("pull"),
            self._mirrored and other._mirrored,
        )

    def divide(self, scale: torch.Tensor) -> None:
        """Make them the sums of x/s and x̃/s, in place, for s [in]."""
        inverse = 1 / scale.double()
        for square in (self.upper, self.drift):
            if square is not None:
                square.mul_(inverse[:, None]).mul_(inverse)
        if self.pull is not None:
            self.pull.mul_(inverse)
        for squares in (self.diagonal, self.modal):
            if squares is not None:
                squares.mul_(inverse.square())

    def to_float32(self) -> Statistics:
        """Turn the sums into float32, in place, and return them. The float64 sums are given up."""
        self.upper, self.diagonal = self.upper.float(), self.diagonal.float()
        self.drift = None if self.drift is None else self.drift.float()
        self.pull = None if self.pull is None else self.pull.float()
        return self

    @property
    def two_streams(self) -> bool:
        """Whether they know how far the streams have come apart."""
        return self.drift is not None or self.pull is not None

    def of_rows(self, step: int) -> Statistics:
        """The same for every so many-th row of the weights. The sums are shared."""
        return self if self.pull is None else replace(self, pull=self.pull[::step])

    def mismatch(self, weights: torch.Tensor) -> torch.Tensor:
        """W·D + R, float32 [out, in], each where it was summed.

        This is what the linear's output should make up for, times the linear's input.
        """
        if not self.two_streams:
            raise ValueError("these statistics have one stream only")
        found = torch.zeros_like(weights) if self.drift is None else weights @ self.drift
        return found if self.pull is None else found.add_(self.pull)

    def error(self, rounded: torch.Tensor, weights: torch.Tensor) -> float:
        """Σ g²·‖ŵ·x − w·x − p'‖² over these tokens, up to a term without ŵ.

        p' is p, and w(x̃ − x) with it where there is a D.
        """
        change = rounded - weights
        slope = change @ self.hessian
        if self.two_streams:
            slope -= 2 * self.mismatch(weights)
        return float((slope * change).sum(dtype=torch.float64))

    @property
    def weight(self) -> float:
        """Σ g²."""
        return float(self.moments[0])

    @property
    def effective_tokens(self) -> float:
        """(Σg²)² / Σg⁴: how many tokens of equal weight would carry as much.

        Far below the number of inputs the Hessian is thin. docs/methods.md §1.5, D5.
        """
        weight, squared = self.moments.tolist()
        return weight**2 / squared if squared else 0.0
