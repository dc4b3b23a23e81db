"""Seconds by phase and by layer, tokens a second, peak memory: what timing.json holds."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

from vlmq_export.quantizer.memory import peak_host


class Clock:
    """Filled while a run goes on."""

    def __init__(self, device: torch.device):
        self._device = device
        self.seconds: dict[str, float] = {}
        self.layers: dict[int, float] = {}  # those solved in this process
        self.tokens = 0  # of the calibration set

    @contextmanager
    def __call__(self, phase: str, layer: int | None = None):
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + taken, 3)
            if layer is not None:
                self.layers[layer] = round(taken, 3)

    def tokens_per_second(self) -> float:
        """Through one layer, solving included."""
        return self.tokens * len(self.layers) / max(1e-9, sum(self.layers.values()))

    def to_dict(self) -> dict:
        return {
            "seconds": self.seconds, "layers": self.layers, "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second(), 1), "peak_host_bytes": peak_host(),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0,
        }  # fmt: skip


def time_left(stamps: list[float], total: int) -> float | None:
    """Seconds to go, from the moments at which 0, 1, 2, … of `total` steps were done; None before the first is.

    The last few count: a resumed run's first layers are only walked, not solved.
    """
    recent = stamps[-5:]
    if len(recent) < 2:
        return None
    return (recent[-1] - recent[0]) / (len(recent) - 1) * (total - len(stamps) + 1)
