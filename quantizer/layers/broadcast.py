"""What one rank solved, given to all the others."""

from __future__ import annotations

from dataclasses import asdict

import torch

from vlmq_export.quantizer.artifact.manifest import ModuleRecord
from vlmq_export.quantizer.layers.stack import Solved
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.storage.tensors import DTYPES


def broadcast(solved: Solved | None, ranks: Ranks, owner: int) -> Solved:
    """The owner's linear with its metrics, on every rank. The others give None."""
    if not ranks.grouped:
        assert solved is not None
        return solved
    mine: dict[str, torch.Tensor] = {}
    described = None
    if solved is not None:
        linear, metrics = solved
        described = asdict(ModuleRecord.of(linear, 0, metrics))
        mine = linear.tensors() | ({} if linear.bias is None else {"bias": linear.bias})
    record = ModuleRecord(**ranks.broadcast_json(described, owner))
    tensors = {}
    for part, (kind, shape) in record.stored().items():
        empty = torch.empty(shape, dtype=DTYPES[kind])
        tensors[f"{record.name}.{part}"] = ranks.broadcast(mine.get(part, empty), owner)
    return record.linear(tensors.__getitem__), record.metrics
