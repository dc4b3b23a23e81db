"""Writes a GGUF container tensor by tensor.

gguf-py lays the file out. Only one tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.storage.whole_files import write_atomic

if TYPE_CHECKING:
    import gguf


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str  # GGUF name
    shape: tuple[int, ...]  # in torch's order
    type: str  # a key of ggml.TYPES
    data: Callable[[], np.ndarray]  # its bytes in C order; called once, in the order of the file

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return prod(self.shape[:-1]) * TYPES[self.type].row_bytes(self.shape[-1])


def write_container(
    path: Path, arch: str, metadata: Callable[[gguf.GGUFWriter], None], entries: Iterable[Entry]
) -> None:
    """Write header, metadata and tensors under a temporary name, so that `path` is whole or absent.

    metadata: adds the keys to a writer.

    Raises FormatError for a tensor whose data is not as long as its shape and type say.
    """
    import gguf

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, arch)
        metadata(writer)
        kept = list(entries)
        # Any dtype but uint8 will do. With uint8, gguf-py would take the shape for one of bytes.
        dtype = np.dtype(np.float32)
        for e in kept:
            kind = gguf.GGMLQuantizationType(TYPES[e.type].id)
            writer.add_tensor_info(e.name, e.shape, dtype, e.nbytes, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for e in kept:
                data = e.data()
                if data.nbytes != e.nbytes:
                    raise FormatError(
                        f"{e.name}: the artifact has {data.nbytes} bytes where config.json asks"
                        f" for {e.nbytes} ({e.type} {e.shape})"
                    )
                writer.write_tensor_data(np.ascontiguousarray(data).view(np.uint8).reshape(-1))
        finally:
            writer.close()

    write_atomic(path, write)


# Keys of each file of a split model.
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


def shard_suffix(i: int, count: int) -> str:
    """The end of the file name of shard i, counted from 0.

    llama.cpp derives the names of the other shards from the first in the same way.
    """
    return f"-{i + 1:05d}-of-{count:05d}.gguf"


def write_shards(
    path: Path,
    arch: str,
    metadata: Callable[[gguf.GGUFWriter], None],
    entries: list[Entry],
    limit: int,
) -> Path:
    """Write a container as files of at most `limit` bytes of tensors each. Returns the first file.

    A file has at least one tensor. With a limit of 0, or if everything fits one file, that file is
    `path` itself. Otherwise the names follow from `path`, and the metadata is in the first file.
    """
    groups: list[list[Entry]] = [[]]
    for e in entries:
        if limit and groups[-1] and sum(g.nbytes for g in groups[-1]) + e.nbytes > limit:
            groups.append([])
        groups[-1].append(e)
    if len(groups) == 1:
        write_container(path, arch, metadata, entries)
        return path
    stem = path.name.removesuffix(".gguf")
    files = [path.with_name(stem + shard_suffix(i, len(groups))) for i in range(len(groups))]

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
    """The GGML type of a source tensor, from its dtype in safetensors' spelling.

    Floats that are wider than 32 bits become F32.
    """
    return dtype if dtype in _DTYPES else "F32"


def float_bytes(tensor: torch.Tensor, kind: str) -> np.ndarray:
    """A float tensor as F32, F16 or BF16.

    numpy has no bfloat16, so that BF16 comes as int16 with the same bits.
    """
    cast = tensor.to(_DTYPES[kind]).contiguous()
    return (cast.view(torch.int16) if kind == "BF16" else cast).numpy()
