"""What timing.json holds: seconds by phase and by layer, tokens per second, peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlmq_export.quantizer.host import peak_host


class Clock:
    """Measures a run while it goes on."""

    def __init__(self, device: torch.device, tokens: int = 0):
        self._device = device
        self.tokens = tokens  # of the calibration set
        self.seconds: dict[str, float] = {}  # by phase
        self.layers: dict[int, float] = {}  # of those that were solved in this process

    @contextmanager
    def __call__(self, phase: str, layer: int | None = None) -> Iterator[None]:
        """Count the seconds inside to a phase, and to a layer where one is being solved."""
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + taken, 3)
            if layer is not None:
                self.layers[layer] = round(taken, 3)

    def tokens_per_second(self) -> float:
        """Calibration tokens per second through one layer, solving included."""
        return self.tokens * len(self.layers) / max(1e-9, sum(self.layers.values()))

    def to_dict(self) -> dict:
        """The contents of timing.json. Peak memory is that of the whole process so far."""
        on_cuda = self._device.type == "cuda"
        return {
            "seconds": self.seconds,
            "layers": self.layers,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second(), 1),
            "peak_host_bytes": peak_host(),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if on_cuda else 0,
        }
