"""Safetensors files: headers that are checked before anything is believed, tensors read one by one.

    8 bytes          length of the header, unsigned, little-endian
    the header       JSON: name → dtype, shape, data_offsets [first byte, end]
    the data         of all tensors, without gap or overlap; data_offsets count from its first byte

https://github.com/huggingface/safetensors#format. Tensors are read into memory of their own and not
mapped, so that a tensor that is dropped gives its memory back, whatever the size of the file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeGuard, TypeVar

import torch

from vlmq_export.errors import CheckpointError, VlmqError
from vlmq_export.quantizer.storage.untrusted import parse_object, read_json

HEADER_CAP = 100 * 2**20  # bytes: the limit of the safetensors format itself
# The names of dtypes in a header.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
_CHUNK = 2**24  # elements that are tested together for NaN and infinity


@dataclass(frozen=True)
class Part:
    """Some columns of a matrix in a file, which are the rows of a tensor: it is read transposed."""

    rows: int  # of the matrix
    columns: int
    first: int  # of the columns


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES
    file: str  # relative to the model folder
    offset: int = 0  # bytes from the start of the file to the tensor's first byte
    part: Part | None = None  # where the tensor is part of a matrix, which begins at `offset`

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, dict]:
    """The JSON header of one file, without its metadata: tensor name → entry.

    Raises CheckpointError for a header that is damaged or that does not fit the file's size.
    """
    return _read_header(path)[0]


def read_infos(path: Path) -> dict[str, TensorInfo]:
    """name → TensorInfo for one file. Raises CheckpointError as `read_header` does."""
    header, start = _read_header(path)
    infos = {}
    for name, entry in header.items():
        offset = start + entry["data_offsets"][0]
        infos[name] = TensorInfo(name, tuple(entry["shape"]), entry["dtype"], path.name, offset)
    return infos


def read_tensor(folder: Path, info: TensorInfo, rows: Sequence[int] | None = None) -> torch.Tensor:
    """A tensor in its source dtype, or some of its rows in the order of `rows`.

    Raises OSError, and EOFError where the file ends too early.
    """
    if part := info.part:
        matrix = replace(info, shape=(part.rows, part.columns), part=None)
        value = read_tensor(folder, matrix)[:, part.first : part.first + info.shape[0]].T
        return value.contiguous() if rows is None else value[list(rows)]
    shape = info.shape if rows is None else (len(rows), *info.shape[1:])
    value = torch.empty(shape, dtype=DTYPES[info.dtype])
    data = value.view(-1).view(torch.uint8).numpy().data
    pieces = [(0, len(data))] if rows is None else [(row, len(data) // len(rows)) for row in rows]
    done = 0
    with (folder / info.file).open("rb", buffering=0) as f:
        for row, size in pieces:
            f.seek(info.offset + row * size)
            stop = done + size
            while done < stop:  # Linux reads at most 2 GiB in one call
                got = f.readinto(data[done:stop])
                if not got:
                    raise EOFError(f"{info.file} ends before {info.name} does")
                done += got
    return value


def count_non_finite(value: torch.Tensor) -> int:
    """Number of NaN and infinite values. They are counted in parts, to keep the masks small."""
    if not value.is_floating_point():
        return 0
    # torch.isfinite does not take the 8-bit floats.
    parts = (p.float() if p.element_size() == 1 else p for p in value.reshape(-1).split(_CHUNK))
    return sum(int((~torch.isfinite(part)).sum()) for part in parts)


def _read_header(path: Path) -> tuple[dict[str, dict], int]:
    """The entries of the header, each of them checked, and the byte at which the data begins.

    Raises CheckpointError that names the file and the byte, where the header is damaged or the data
    is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{path.name}: {size} bytes is too short for a safetensors file; copy it again"
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > min(HEADER_CAP, size - 8):
            raise CheckpointError(
                f"{path.name}: header of {length} bytes does not fit the file; copy it again"
            )
        header = parse_object(f.read(length), f"{path.name}: header")
    header.pop("__metadata__", None)
    start = 8 + length
    wanted = start + _data_length(path, header)
    if wanted != size:
        raise CheckpointError(
            f"{path.name}: truncated or damaged, {size} bytes where the header asks for {wanted};"
            " copy it again"
        )
    return header, start


def _data_length(path: Path, header: dict[str, object]) -> int:
    """Bytes of data that the entries ask for.

    Raises CheckpointError for an entry that is not possible, and for gaps and overlaps.
    """
    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items())
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path.name}: damaged, tensor {name} at byte {begin} {what}; copy it again"
            )
        end = stop
    return end


def _span(path: Path, name: str, entry: object) -> tuple[int, int]:
    """First byte and end of a tensor's data, counted from where the data begins.

    Raises CheckpointError for an entry that states no possible tensor.
    """
    stated = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (stated.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path.name}: tensor {name} has dtype {dtype}, which is not supported"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path.name}: tensor {name} has shape {shape} at bytes {offsets}; copy it again"
        )
    begin, stop = offsets
    if stop - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path.name}: tensor {name} has {stop - begin} bytes for shape {shape}; copy it again"
        )
    return begin, stop


def _naturals(value: object) -> TypeGuard[list[int]]:
    """Whether this is a list of at most 8 integers that can each be an offset in a file."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def weight_map(index: Path, error: type[VlmqError] = CheckpointError) -> dict[str, str]:
    """tensor → shard, from the index of a sharded checkpoint. Never empty.

    Raises `error` where the index cannot be read or has no such table.
    """
    found = read_json(index, error=error).get("weight_map")
    usable = isinstance(found, dict) and all(isinstance(file, str) for file in found.values())
    if not found or not usable:
        raise error(f"{index}: no weight_map from tensor names to file names; copy it again")
    return found


class Planned(Protocol):
    """What the header is to say of a tensor that will be written."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...  # a key of DTYPES
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


P = TypeVar("P", bound=Planned)


def write_tensors(
    path: Path,
    planned: Sequence[P],
    read: Callable[[P], torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file tensor by tensor. `read` gives each one, of the planned dtype and shape.

    The header is padded with spaces to a multiple of 8 bytes, as the format asks.
    """
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for t in planned:
        offsets = [end, end + t.nbytes]
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in planned:
            f.write(read(t).contiguous().view(-1).view(torch.uint8).numpy().data)
