"""Several processes on one model: samples are split over ranks, statistics summed, linears solved by different ranks.

Started by `torchrun --nproc-per-node N -m vlmq_export …`: gloo on CPUs, NCCL on GPUs. Every rank walks all layers with its
share of the batches; rank 0 alone writes. The number of ranks changes the order of float64 sums and nothing else. `ALONE` is the
object of a single process: everything in it returns at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.statistics import Statistics

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # for a rank that is solving: minutes a layer, hours on a slow machine


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; all of them must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"  # where the backend wants its tensors

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> list[T]:
        """This rank's. Raises CalibrationError where some rank would get none."""
        if 0 < len(batches) < self.size:
            raise CalibrationError(
                f"{len(batches)} batches of samples for {self.size} processes; give more samples, or start fewer"
            )
        return list(batches[self.rank :: self.size])

    def owner(self, unit: int) -> int:
        """Which rank solves the unit-th list of linears of a group."""
        return unit % self.size

    def total(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def count(self, value: int) -> int:
        return int(self.total(int(value))[0])

    def largest(self, value: float) -> float:
        return self._reduced((value,), dist.ReduceOp.MAX)[0]

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on each of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def same(self, value: int) -> int:
        """Rank 0's value."""
        return self.count(value if self.first else 0)

    def _reduced(self, values: Sequence[float], how) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    def collect(self, sums: Statistics, owner: int) -> Statistics | None:
        """The sums over all ranks (as Statistics.merge adds them) on the owner, None elsewhere."""
        if self.size == 1:
            return sums
        for field in fields(sums):
            if isinstance(value := getattr(sums, field.name), torch.Tensor):
                dist.reduce(value, owner)
        tokens, sums.weight, sums.weight_squared = self.total(sums.tokens, sums.weight, sums.weight_squared)
        sums.tokens = int(tokens)
        return sums if self.rank == owner else None

    def broadcast(self, tensor: torch.Tensor, owner: int) -> torch.Tensor:
        """The owner's tensor; others give one of the same shape and dtype, which is overwritten."""
        if self.size > 1:
            data = tensor.contiguous().view(-1).view(torch.uint8).to(self.device)  # bytes: every backend has them
            dist.broadcast(data, owner)
            return data.to(tensor.device).view(tensor.dtype).view(tensor.shape)
        return tensor

    def broadcast_json(self, value: dict | None, owner: int) -> dict:
        """The owner's dict of plain values; nothing is pickled."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == owner else b""
        length = self.count(len(text))
        data = torch.tensor(list(text) or [0] * length, dtype=torch.uint8)
        return json.loads(bytes(self.broadcast(data, owner).tolist()))


ALONE = Ranks()


@contextmanager
def joined(device: torch.device):
    """The ranks that torchrun started, or ALONE. Outside the context no rank waits for another any more."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield replace(ALONE, rank=int(os.environ["RANK"]), size=size, device=device)
    finally:
        dist.destroy_process_group()
