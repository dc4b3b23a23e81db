"""Where activations rest between two uses: on the device, in host memory, or in files.

Files are read and written whole instead of mapped, because a mapped page counts as memory of the
process as soon as it is touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vlmq_export.errors import ArtifactError

Place = Literal["device", "host", "disk"]


@dataclass
class Shelf:
    """Takes tensors, alone or in dicts and sequences, and gives them back bit for bit."""

    device: torch.device  # where they come back
    place: Place = "device"  # where they rest
    folder: Path | None = None  # for files; its owner removes it
    _numbers: Iterator[int] = field(default_factory=count, repr=False)

    def put(self, value: Any) -> Rest:
        """Put something away. Raises ArtifactError where a file cannot be written."""
        away = {"device": _Kept, "host": self._in_host, "disk": self._in_file}[self.place]
        return Rest(_mapped(value, torch.Tensor, away))

    def _in_host(self, value: torch.Tensor) -> _Host:
        if self.device.type != "cuda":
            return _Host(value.to("cpu"), self.device)
        # Straight into pinned memory. Only the device reads it again, after this copy.
        host = torch.empty_like(value, device="cpu", pin_memory=True)
        return _Host(host.copy_(value, non_blocking=True), self.device)

    def _in_file(self, value: torch.Tensor) -> _File:
        assert self.folder is not None, "a shelf on disk needs a folder"
        path = self.folder / f"{next(self._numbers)}"
        try:
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
        except OSError as e:
            raise ArtifactError(
                f"{self.folder}: activations cannot be kept ({e.strerror or e}); free space"
            ) from None
        return _File(path, value.shape, value.dtype, self.device)


class Rest:
    """Something that was put away."""

    def __init__(self, value: Any):
        self._value = value

    def get(self) -> Any:
        """The same value, on the device."""
        return _mapped(self._value, _Away, lambda away: away.get())


class _Away(ABC):
    @abstractmethod
    def get(self) -> torch.Tensor:
        """The tensor, on the device."""


@dataclass
class _Kept(_Away):
    value: torch.Tensor

    def get(self) -> torch.Tensor:
        return self.value


@dataclass
class _Host(_Away):
    value: torch.Tensor
    device: torch.device

    def get(self) -> torch.Tensor:
        return self.value.to(self.device, non_blocking=True)


@dataclass
class _File(_Away):
    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def get(self) -> torch.Tensor:
        data = torch.from_numpy(np.fromfile(self.path, np.uint8))
        return data.view(self.dtype).view(self.shape).to(self.device)

    def __del__(self) -> None:
        self.path.unlink(missing_ok=True)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same structure of dicts and sequences, with every instance of `kind` changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {k: _mapped(v, kind, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, kind, change) for v in value)
    return value
