"""Several processes on one model: the samples are split over them, and so are the linears.

They are started by `torchrun --nproc-per-node N -m vlmq_export …`, with gloo on CPUs and NCCL on
GPUs. Every rank walks all layers with its share of the batches, the statistics are summed over the
ranks, and different ranks solve different linears. Rank 0 alone writes. The number of ranks changes
the order of float64 sums and nothing else. `ALONE` stands for a single process: everything in it
returns at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlmq_export.errors import CalibrationError

T = TypeVar("T")
# How long a rank waits for one that is solving: a layer can take hours.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among `size`. All of them must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"  # where the backend wants its tensors
    # Whether torchrun started this process. One process alone is a group too, and takes the same
    # way as many, so that one GPU proves what NCCL does.
    grouped: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> list[T]:
        """The batches of this rank. Raises CalibrationError where some rank would get none."""
        if 0 < len(batches) < self.size:
            raise CalibrationError(
                f"{len(batches)} batches of samples for {self.size} processes;"
                " give more samples, or start fewer"
            )
        return list(batches[self.rank :: self.size])

    def owner(self, unit: int) -> int:
        """The rank that solves the unit-th list of linears of a group."""
        return unit % self.size

    def total(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def count(self, value: int) -> int:
        """A whole number summed over all ranks."""
        return int(self.total(int(value))[0])

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        return self._reduced((value,), dist.ReduceOp.MAX)[0]

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place, on each of them."""
        if self.grouped:
            dist.all_reduce(tensor)
        return tensor

    def sum_on(self, owner: int, tensor: torch.Tensor) -> None:
        """Sum the tensor over all ranks, in place, on one of them."""
        if self.grouped:
            dist.reduce(tensor, owner)

    def same(self, value: int) -> int:
        """Rank 0's value."""
        return self.count(value if self.first else 0)

    def broadcast(self, tensor: torch.Tensor, owner: int) -> torch.Tensor:
        """The owner's tensor. The others give one of the same shape and dtype."""
        if not self.grouped:
            return tensor
        # As bytes, because every backend can send those.
        data = tensor.contiguous().view(-1).view(torch.uint8).to(self.device)
        dist.broadcast(data, owner)
        return data.to(tensor.device).view(tensor.dtype).view(tensor.shape)

    def broadcast_json(self, value: dict | None, owner: int) -> dict:
        """The owner's dict of plain values. Nothing is pickled."""
        if not self.grouped:
            assert value is not None, "a single process is its own owner"
            return value
        text = json.dumps(value).encode() if self.rank == owner else b""
        length = self.count(len(text))
        data = torch.tensor(list(text) or [0] * length, dtype=torch.uint8)
        return json.loads(bytes(self.broadcast(data, owner).tolist()))

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        """Each value reduced over all ranks, in float64. `how` is one of dist.ReduceOp."""
        if not self.grouped:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        return tensor.tolist()


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, or ALONE. After the context no rank waits for another."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        yield Ranks(rank, size, device, grouped=True)
    finally:
        dist.destroy_process_group()
