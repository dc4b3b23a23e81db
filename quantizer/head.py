"""The output head, after the last decoder layer: calibrated on the final norm's outputs and solved as every other linear.

    x = norm(h)    x̃ = norm(h̃)    logits = head(x)

Its tokens all count the same: importance is measured in attention blocks, and none comes after it. A vocabulary is long,
so rows are solved in slabs; they do not depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.kquants import Params
from vlmq_export.quantizer.layer import collect, exchanged
from vlmq_export.quantizer.linears import BlockLinear, Linear
from vlmq_export.quantizer.methods import method_named
from vlmq_export.quantizer.model import StreamedModel, tensor_cores
from vlmq_export.quantizer.solving import Solved, solve_unit
from vlmq_export.quantizer.streams import Batch

SLAB = 2**13  # rows solved at once: fewer than a layer's gate and up projections have


class _Rows:
    """Some rows of the head, where the solver of a layer looks for its linears."""

    def __init__(self, weight: torch.Tensor):  # float32 [rows, in]
        self.linear = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
        self.linear.weight = nn.Parameter(weight, requires_grad=False)

    def get_submodule(self, _name: str) -> nn.Module:
        return self.linear


class HeadWalk:
    """Both streams at the head's input: as much of a LayerWalk as `collect` asks for."""

    def __init__(self, layer: _Rows, norm: nn.Module, batches: Sequence[Batch], *, two_streams: bool):
        self.layer, self.norm, self.batches, self.two_streams = layer, norm, batches, two_streams

    @torch.no_grad()
    @tensor_cores()
    def inputs(self, _stage: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """(x, x̃), [valid samples · tokens, in] each, batch after batch."""
        for batch in self.batches:
            full = batch.tokens(self.norm(batch.full)) if self.two_streams else None
            yield batch.tokens(self.norm(batch.quantized)), full


def quantize_head(
    model: StreamedModel, name: str, batches: Sequence[Batch], config: QuantConfig, ranks: Ranks = ALONE
) -> Solved:
    """Solve the output head `name` (hub name) of `model`, from batches that have passed the last decoder layer."""
    named, config, sums, held = method_named(config.method), config.of(name), None, None
    # AWQ and MBQ have nothing before the head to scale against it.
    method = replace(named, importance="none", calibrated=named.calibrated and not named.scaling)
    if method.calibrated:
        with model.filled_norm() as norm:
            walk = HeadWalk(_Rows(model.head_rows(0, 1)), norm, batches, two_streams=method.two_streams)
            (pair,) = collect(walk, 0, [[name]], {}, method)
        sums, held = (part and ranks.collect(part, 0) for part in pair)
    solved = None
    if ranks.first:
        sums, held = (part and part.rounded() for part in (sums, held))
        slabs, energies = [], []
        for start in range(0, model.head_shape[0], SLAB):
            rows = model.head_rows(start, start + SLAB)
            slabs += solve_unit(_Rows(rows), "", [name], sums, held, config, method)
            energies.append(float(rows.double().square().sum()))
        solved = _stacked([linear for linear, _ in slabs]), _joined_metrics([m for _, m in slabs], energies)
    return exchanged(solved, ranks, 0)


def _stacked(slabs: Sequence[Linear]) -> Linear:
    """Slabs one below the other; their columns have one order, which the Hessian sets."""
    first, codes = slabs[0], torch.cat([s.codes for s in slabs])
    if isinstance(first, BlockLinear):
        return replace(first, codes=codes, params=Params.joined([s.params for s in slabs], 0))
    scales, zeros = torch.cat([s.scales for s in slabs]), torch.cat([s.zero_points for s in slabs])
    return replace(first, codes=codes, scales=scales, zero_points=zeros)


def _joined_metrics(slabs: Sequence[dict], energies: Sequence[float]) -> dict:
    """Those of the whole matrix; `energies` are the sums of squares of each slab's weights."""
    joined = slabs[0] | {"weight_error": _mean([m["weight_error"] for m in slabs], energies)}
    if "loss" in joined:
        joined["loss"] = sum(m["loss"] for m in slabs)
        of_targets = [m["loss"] / m["relative_error"] ** 2 if m["relative_error"] > 0 else 0.0 for m in slabs]
        for key in {"relative_error", "nearest_error"} & joined.keys():
            joined[key] = _mean([m[key] for m in slabs], of_targets)
    return joined


def _mean(errors: Sequence[float], energies: Sequence[float]) -> float:
    """Relative errors of parts → that of the whole."""
    squares = sum(e**2 * energy for e, energy in zip(errors, energies, strict=True))
    return math.sqrt(squares / max(sum(energies), 1e-300))
