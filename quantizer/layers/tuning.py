"""After the solve: a whole decoder layer tuned by gradients of its output's error.

The solver sees one linear at a time. What a layer puts out also depends on the softmax and the
activation between its linears. From the solved integers on, latents of the codes and of the scales
take N steps of Adam down the gradient of

    E/E₀ + κ·R/R₀

    E = mean over tokens of ‖Layer(X) − Layer(X̃)‖² / ‖Layer(X̃)‖²        R = Σ ‖Ŵ − W‖²/‖W‖²

    X, X̃   the layer's input in the quantized and in the full-precision stream
    W, Ŵ   the source weights of a linear and those of its latents
    E₀, R₀ of the solved layer, E₀ on the samples put aside

The first term is divided by the token's own norm because the next layer's norm does the same. The
second one keeps few samples from being fitted by heart. Samples that neither the solver nor a step
sees decide what is kept: the error on them is never above that of the solved layer.
docs/methods.md §5.7.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import Solved
from vlmq_export.quantizer.solver.straight_through import Latents

log = logging.getLogger("vlmq_export")
STEP_TOKENS = 1024  # of a step: as many whole samples of one length as fit, and one at least
CODE_RATE, SCALE_RATE = 0.02, 0.003  # of Adam, at the first step; they fall to 0 along a line
BETAS = (0.9, 0.95)
PULL = 0.3  # κ
CHECKS = 3  # times that the samples put aside are looked at, evenly spread
TINY = torch.finfo(torch.float32).tiny
Weights = Mapping[str, torch.Tensor]  # by name in the layer


@dataclass(frozen=True)
class Piece:
    """Some samples of a batch, which are read when they are needed."""

    batch: Batch  # its full-precision stream has left the layer
    hidden: Callable[[], torch.Tensor]  # X of the batch, [samples, tokens, hidden]
    rows: torch.Tensor  # int64 [n]: its samples
    tokens: int  # of these samples

    def error(self, layer: Any, weights: Weights) -> torch.Tensor:
        """Σ over tokens of ‖Layer(X) − Layer(X̃)‖² / ‖Layer(X̃)‖², with `weights` in the layer."""
        entering, leaving = self.hidden(), self.batch.full[self.rows]
        kwargs = {k: of_samples(v, self.rows, len(entering)) for k, v in self.batch.kwargs.items()}
        with torch.autocast(entering.device.type, torch.bfloat16):
            out = functional_call(layer, dict(weights), (entering[self.rows],), kwargs)
        out = out[0] if isinstance(out, tuple) else out
        energy = leaving.square().sum(-1).clamp_min(TINY)
        return ((out.float() - leaving).square().sum(-1) / energy).sum()


def tune_layer(
    walk: LayerWalk,  # both streams have gone through the layer; it has the solved weights
    entering: Sequence[Callable[[], torch.Tensor]],  # X of each batch
    source: Weights,  # W of each linear, by its name in the layer
    solved: Sequence[Solved],
    prefix: str,  # hub name of the layer, with the dot
    job: Job,
) -> list[Solved]:
    """The linears after `config.tune` steps, or as they came where no step helped.

    The layer and the streams are left as they were. The same seed gives the same bytes.
    """
    begun = time.process_time()
    pieces = {held: list(_pieces(walk, entering, held)) for held in (False, True)}
    if not all(pieces.values()):  # the samples of one kind were all lost
        return list(solved)
    found: dict[str, Latents] = {}
    for linear, _ in solved:
        grid = job.grid(linear.name, linear.in_features).grid
        assert isinstance(linear, QuantizedLinear) and isinstance(grid, Affine), "refused before"
        found[linear.name.removeprefix(prefix)] = Latents.of(linear.solution, grid)
    kept, first, least = _descended(walk.layer, found, source, pieces, job)
    log.info(
        "%s: tuned in %.0f s of CPU time, error on held-out samples %.5f → %.5f",
        prefix.removesuffix("."),
        time.process_time() - begun,
        first,
        least,
    )
    gain = {"tuned": round(1 - least / first, 4) if first > 0 else 0.0}
    return [
        (replace(linear, solution=kept[linear.name.removeprefix(prefix)]), metrics | gain)
        for linear, metrics in solved
    ]


def _descended(
    layer: Any,
    found: dict[str, Latents],
    source: Weights,
    pieces: dict[bool, list[Piece]],
    job: Job,
) -> tuple[dict, float, float]:
    """The best solutions on the samples put aside, with the error before and after."""
    steps = job.config.tune
    codes, scales = [x.codes for x in found.values()], [x.logs for x in found.values()]
    adam = torch.optim.Adam(
        [{"params": codes, "lr": CODE_RATE}, {"params": scales, "lr": SCALE_RATE}],
        betas=BETAS,
        eps=TINY,  # gradients are small, and have no common scale
    )
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    kept = {name: x.start for name, x in found.items()}
    first = least = _held_error(layer, kept, pieces[True])
    shares = 1 / max(first, TINY), PULL / max(_distance(_decoded(kept), source).item(), TINY)
    drawn = _drawn(pieces[False], job.config.seed)
    looks = {steps * (i + 1) // CHECKS for i in range(CHECKS)}
    for step in range(steps):
        piece = next(drawn)
        weights = {f"{name}.weight": x.weights() for name, x in found.items()}
        with _repeatable():
            error = piece.error(layer, weights) / piece.tokens
            loss = shares[0] * error + shares[1] * _distance(weights, source)
            gradients = torch.autograd.grad(loss, codes + scales)
        for latent, gradient in zip(codes + scales, gradients):
            latent.grad = gradient
        adam.step()
        falling.step()
        if step + 1 in looks:
            tried = {name: x.solution() for name, x in found.items()}
            if (now := _held_error(layer, tried, pieces[True])) < least:
                kept, least = tried, now
    return kept, first, least


def _distance(weights: Weights, source: Weights) -> torch.Tensor:
    """Σ over linears of ‖Ŵ − W‖²/‖W‖²."""
    each = [
        (w - source[name]).square().sum() / source[name].square().sum().clamp_min(TINY)
        for name, w in weights.items()
    ]
    return torch.stack(each).sum()


def _decoded(solutions: Mapping[str, Solution]) -> Weights:
    """The weights that solutions decode to."""
    return {f"{name}.weight": solution.decode() for name, solution in solutions.items()}


@torch.no_grad()
def _held_error(layer: Any, solutions: Mapping[str, Solution], pieces: Sequence[Piece]) -> float:
    """The mean error of the samples put aside, with these solutions in the layer."""
    weights = _decoded(solutions)
    total = sum(float(piece.error(layer, weights)) for piece in pieces)
    return total / sum(piece.tokens for piece in pieces)


def _pieces(
    walk: LayerWalk, entering: Sequence[Callable[[], torch.Tensor]], held: bool
) -> Iterator[Piece]:
    """The valid samples that were put aside, or the others, in pieces of STEP_TOKENS."""
    for batch, hidden in zip(walk.batches, entering):
        rows = (batch.valid & (batch.held == held)).nonzero().flatten()
        tokens = batch.image.shape[1]
        for part in rows.split(max(1, STEP_TOKENS // tokens)) if len(rows) else ():
            yield Piece(batch, hidden, part, len(part) * tokens)


def of_samples(value: Any, rows: torch.Tensor, samples: int) -> Any:
    """The rows of some of a batch's samples in a keyword argument of a layer.

    Samples are the first axis. Positions with three axes (M-RoPE) come before it, as [3, samples,
    tokens, …]. Tensors that all samples share have one row there.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(of_samples(each, rows, samples) for each in value)
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    if value.dim() > 2 and value.shape[0] == 3 and value.shape[1] == samples:
        return value[:, rows]
    return value[rows] if value.shape[0] == samples else value


def _drawn(pieces: Sequence[Piece], seed: int) -> Iterator[Piece]:
    """The pieces over and over, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(pieces), generator=generator).tolist():
            yield pieces[index]


def _repeatable() -> AbstractContextManager:
    """On CUDA the fused backward adds in no fixed order, and a resumed run must match."""
    return sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else nullcontext()
