"""A GGUF container on disk, written tensor by tensor: gguf-py lays it out, one tensor is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.artifact import write_atomic

if TYPE_CHECKING:
    import gguf


@dataclass(frozen=True)
class Entry:
    """A tensor to write. `data` is called once, in file order, and returns its bytes in C order."""

    name: str
    shape: tuple[int, ...]  # torch's order
    type: str  # of types.TYPES
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * TYPES[self.type].row_bytes(self.shape[-1])


def write_container(
    path: Path, arch: str, metadata: Callable[[gguf.GGUFWriter], None], entries: Iterable[Entry]
) -> None:
    """Header, metadata and tensors through a temporary name: `path` is whole or absent."""
    import gguf

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, arch)
        metadata(writer)
        kept = list(entries)
        for e in kept:
            # Any dtype but uint8: with it gguf-py would take the shape for one of bytes.
            writer.add_tensor_info(
                e.name, e.shape, np.dtype(np.float32), e.nbytes, gguf.GGMLQuantizationType(TYPES[e.type].id)
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for e in kept:
                data = e.data()
                if data.nbytes != e.nbytes:
                    raise FormatError(
                        f"{e.name}: the artifact has {data.nbytes} bytes where config.json asks for {e.nbytes} ({e.type} {e.shape})"
                    )
                writer.write_tensor_data(np.ascontiguousarray(data).view(np.uint8).reshape(-1))
        finally:
            writer.close()

    write_atomic(path, write)


SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


def shard_suffix(i: int, count: int) -> str:
    """End of the file name of shard i, from 0, as llama.cpp derives the others' names from the first."""
    return f"-{i + 1:05d}-of-{count:05d}.gguf"


def write_shards(
    path: Path, arch: str, metadata: Callable[[gguf.GGUFWriter], None], entries: list[Entry], limit: int
) -> Path:
    """As `write_container`, in files of at most `limit` bytes of tensors each (one tensor at least); 0 for one file.

    The metadata is in the first file, whose path is returned; the others' names follow from it. What fits one file is
    written to `path` itself.
    """
    groups: list[list[Entry]] = [[]]
    for e in entries:
        if limit and groups[-1] and sum(g.nbytes for g in groups[-1]) + e.nbytes > limit:
            groups.append([])
        groups[-1].append(e)
    if len(groups) == 1:
        write_container(path, arch, metadata, entries)
        return path
    files = [path.with_name(path.name.removesuffix(".gguf") + shard_suffix(i, len(groups))) for i in range(len(groups))]

    def with_split(i: int) -> Callable[[gguf.GGUFWriter], None]:
        def add(writer: gguf.GGUFWriter) -> None:
            if i == 0:
                metadata(writer)
            writer.add_uint16(SPLIT_NO, i)
            writer.add_uint16(SPLIT_COUNT, len(groups))
            writer.add_int32(SPLIT_TENSORS, len(entries))

        return add

    for i, (file, group) in enumerate(zip(files, groups)):
        write_container(file, arch, with_split(i), group)
    return files[0]


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def source_type(dtype: str) -> str:
    """The GGML type of a source tensor's dtype (safetensors' spelling); wider floats become F32."""
    return dtype if dtype in _DTYPES else "F32"


def float_bytes(tensor: torch.Tensor, kind: str) -> np.ndarray:
    """A float tensor as F32, F16 or BF16; numpy has no bfloat16, so that comes as its 16 bits."""
    cast = tensor.to(_DTYPES[kind]).contiguous()
    return (cast.view(torch.int16) if kind == "BF16" else cast).numpy()
