"""A safetensors file written tensor by tensor: the library's own writer wants all of them in memory at once."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch


class Planned(Protocol):
    """What a file's header says of one tensor."""

    name: str
    dtype: str  # safetensors' spelling: BF16, F32, ...
    shape: tuple[int, ...]
    nbytes: int


def write_tensors(
    path: Path, planned: Sequence[Planned], read: Callable[[Any], torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """8 bytes of header length, JSON header padded to 8, then the data of `read`, which must be as planned."""
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for t in planned:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in planned:
            f.write(read(t).contiguous().view(-1).view(torch.uint8).numpy().data)
