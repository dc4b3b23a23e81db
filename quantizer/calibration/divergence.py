"""How far two models are apart where they predict the same token, from their logits.

    KL = Σ_v p_v·(log p_v − log q_v)    in nats, p of full precision and q of the quantized model
       = Σ_v p_v·(z_v − y_v) − log Σ_v exp z_v + log Σ_v exp y_v    for logits z and y

A vocabulary is long, so logits come in slabs of it. Every sum is kept relative to the largest logit
so far, and is rescaled where a larger one comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Distance:
    """Two models at some tokens."""

    kl: torch.Tensor  # float64 [tokens], in nats; never negative
    same: torch.Tensor  # bool [tokens]: whether both find the same token most probable
    best: torch.Tensor  # int64 [tokens]: which one the quantized model finds most probable


class Divergence:
    """Sums over the slabs of the vocabulary that were added so far, in float64."""

    def __init__(self, tokens: int, device: torch.device | str = "cpu"):
        def filled(value: float) -> torch.Tensor:
            return torch.full((tokens,), value, dtype=torch.float64, device=device)

        # Of full precision and of the quantized model: largest logit, where it is, Σ exp.
        self._largest = [filled(-torch.inf) for _ in range(2)]
        self._best = [torch.zeros(tokens, dtype=torch.long, device=device) for _ in range(2)]
        self._sums = [filled(0.0) for _ in range(2)]
        self._apart = filled(0.0)  # Σ exp z·(z − y), relative as the sum of full precision

    def add(
        self,
        tokens: slice,
        first: int,  # the vocabulary's row that the slab begins with
        full: torch.Tensor,  # logits of full precision, [tokens, rows]
        quantized: torch.Tensor,  # of the quantized model, same shape
    ) -> None:
        """Add a slab of the vocabulary for some of the tokens."""
        slabs = full.double(), quantized.double()
        for which, logits in enumerate(slabs):
            value, place = logits.max(1)
            before = self._largest[which][tokens]
            larger = value > before
            largest = torch.where(larger, value, before)
            self._best[which][tokens] = torch.where(
                larger, place + first, self._best[which][tokens]
            )
            shrunk = (before - largest).exp()
            weights = (logits - largest[:, None]).exp()
            self._sums[which][tokens] = self._sums[which][tokens] * shrunk + weights.sum(1)
            if which == 0:
                apart = (weights * (logits - slabs[1])).sum(1)
                self._apart[tokens] = self._apart[tokens] * shrunk + apart
            self._largest[which][tokens] = largest

    def distance(self) -> Distance:
        """The result, once the whole vocabulary was added for every token."""
        z, y = (largest + sums.log() for largest, sums in zip(self._largest, self._sums))
        # What is below 0 is rounding: no divergence is negative.
        kl = (self._apart / self._sums[0] - z + y).clamp_min(0)
        return Distance(kl, self._best[0] == self._best[1], self._best[1])


def distance_of(full: torch.Tensor, quantized: torch.Tensor) -> Distance:
    """The distance of two models whose logits [tokens, vocabulary] are there as a whole."""
    found = Divergence(len(full), full.device)
    found.add(slice(None), 0, full, quantized)
    return found.distance()
