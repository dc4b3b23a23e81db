"""A GGUF v3 container, parsed by our own code and mistrusted: every count, length and offset is held against the file
before anything of that size is read or allocated. gguf-py hangs on, and accepts, files that this refuses.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.types import BY_ID

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
U32 = 4
_NUMBERS = {code: struct.Struct(f"<{code}") for code in "IQ"}
MAX_NAME = 63  # bytes; ggml keeps 64 with the terminator
MAX_ENTRIES = 2**15  # keys, and tensors: the largest published models have a few thousand
MAX_STRINGS = 2**20  # in all metadata arrays together: the largest vocabularies with their merges have under 800 000
MAX_NUMBERS = 2**22  # likewise
MAX_METADATA = 2**28  # bytes


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # torch's order: rows first
    type: str  # key of types.TYPES
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class Container:
    metadata: dict[str, object]  # arrays are lists
    types: dict[str, int]  # key → GGUF value type, of the elements for an array
    tensors: dict[str, TensorInfo]
    data_start: int


class _Cursor:
    """Reads forward in the metadata and never past its end."""

    def __init__(self, path: Path, buffer: mmap.mmap | bytes):
        self.path, self.buffer, self.at = path, buffer, 0
        self.end = min(len(buffer), MAX_METADATA)
        self.room = {True: MAX_STRINGS, False: MAX_NUMBERS}  # by whether an array is of strings

    def fail(self, what: str) -> FormatError:
        shown = "".join(ch if ch.isprintable() else "?" for ch in what)  # names come from the file
        return FormatError(
            f"{self.path.name}: {shown[:300]}; damaged, or not a GGUF file that llama.cpp loads: export it again"
        )

    def take(self, n: int, what: str) -> bytes:
        if n > self.end - self.at:
            raise self.fail(f"{what} at byte {self.at} needs {n} bytes, {self.end - self.at} are left")
        start, self.at = self.at, self.at + n
        return self.buffer[start : self.at]

    def number(self, code: str, what: str) -> int:
        """A u32 (I) or u64 (Q)."""
        return _NUMBERS[code].unpack(self.take(_NUMBERS[code].size, what))[0]

    def count(self, what: str, limit: int, each: int) -> int:
        """A u64 count of things that take at least `each` bytes."""
        n = self.number("Q", what)
        if n > limit or n * each > self.end - self.at:
            raise self.fail(f"{what} is {n}, more than the file can hold")
        return n

    def text(self, what: str) -> str:
        try:
            return str(self.take(self.number("Q", what), what), "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def texts(self, n: int, what: str) -> list[str]:
        """`text` n times, in one tight loop: a vocabulary has hundreds of thousands."""
        read, buffer, end, strings = _NUMBERS["Q"].unpack_from, self.buffer, self.end, []
        for _ in range(n):
            start = self.at + 8
            if start > end or (size := read(buffer, self.at)[0]) > end - start:
                self.text(what)  # raises, and says why
            self.at = start + size
            strings.append(buffer[start : self.at])
        try:
            return [str(s, "utf-8") for s in strings]
        except UnicodeDecodeError:
            raise self.fail(f"an element of {what} is not UTF-8") from None

    def value(self, kind: int, key: str):
        if kind == STRING:
            return self.text(f"value of {key}")
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, f"value of {key}"), dtype)[0].item()
        raise self.fail(f"key {key} has the unknown value type {kind}")

    def array(self, key: str) -> tuple[int, list]:
        kind = self.number("I", f"element type of {key}")
        if kind != STRING and kind not in SCALARS:
            raise self.fail(
                f"key {key} is an array of arrays" if kind == ARRAY else f"key {key} has the unknown value type {kind}"
            )
        text = kind == STRING
        size = 8 if text else np.dtype(SCALARS[kind]).itemsize
        n = self.count(f"length of {key}", self.room[text], size)
        self.room[text] -= n
        if text:
            return kind, self.texts(n, key)
        return kind, np.frombuffer(self.take(n * size, key), SCALARS[kind]).tolist()


def parse(path: Path, buffer: mmap.mmap | bytes) -> Container:
    """`buffer`: the whole file. Raises FormatError naming what is damaged and where."""
    c = _Cursor(path, buffer)
    if c.take(4, "magic") != MAGIC:
        raise FormatError(f"{path.name}: does not begin with GGUF; not a GGUF file")
    version = c.number("I", "version")
    if version != 3:
        why = "big-endian" if version == 3 << 24 else f"version {version}"
        raise FormatError(f"{path.name}: {why}; only little-endian GGUF version 3 is read")
    n_tensors = c.count("number of tensors", MAX_ENTRIES, 32)
    n_keys = c.count("number of keys", MAX_ENTRIES, 13)
    metadata, types = _metadata(c, n_keys)
    infos = [_tensor(c) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    exact = types.get("general.alignment", U32) == U32 and isinstance(alignment, int)
    if not exact or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise c.fail(f"general.alignment {alignment} is not a power of two")
    start = -(-c.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for t in infos:
        if t.name in tensors:
            raise c.fail(f"tensor {t.name} appears twice")
        if t.offset % alignment or start + t.offset + t.nbytes > len(buffer):
            where = f"bytes {t.offset} to {t.offset + t.nbytes} of the data"
            raise c.fail(f"tensor {t.name} at {where} is misaligned or past the end of the file")
        tensors[t.name] = TensorInfo(t.name, t.shape, t.type, start + t.offset, t.nbytes)
    ordered = sorted(tensors.values(), key=lambda t: t.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise c.fail(f"tensors {before.name} and {after.name} overlap")
    return Container(metadata, types, tensors, start)


def _metadata(c: _Cursor, n: int) -> tuple[dict[str, object], dict[str, int]]:
    metadata: dict[str, object] = {}
    types: dict[str, int] = {}
    for _ in range(n):
        key = c.text("key")
        if not key or key in metadata:
            raise c.fail(f"key {key!r} is empty or appears twice")
        types[key] = c.number("I", f"type of {key}")
        if types[key] == ARRAY:
            types[key], metadata[key] = c.array(key)
        else:
            metadata[key] = c.value(types[key], key)
    return metadata, types


def _tensor(c: _Cursor) -> TensorInfo:
    name = c.text("tensor name")
    if not name or len(name.encode()) > MAX_NAME:
        raise c.fail(f"tensor name {name[:80]!r} is empty or longer than {MAX_NAME} bytes")
    n_dims = c.number("I", f"dimensions of {name}")
    if not 1 <= n_dims <= 4:
        raise c.fail(f"tensor {name} has {n_dims} dimensions")
    dims = [c.number("Q", f"dimensions of {name}") for _ in range(n_dims)]
    if min(dims) < 1 or max(dims) >= 2**48 or prod(dims) >= 2**48:
        raise c.fail(f"tensor {name} has the impossible dimensions {dims}")
    kind = c.number("I", f"type of {name}")
    if kind not in BY_ID:
        raise c.fail(f"tensor {name} has the unknown type {kind}")
    t = BY_ID[kind]
    if dims[0] % t.block:
        raise c.fail(f"tensor {name} has rows of {dims[0]}, not a multiple of {t.name}'s block of {t.block}")
    shape = tuple(reversed(dims))
    return TensorInfo(name, shape, t.name, c.number("Q", f"offset of {name}"), prod(shape[:-1]) * t.row_bytes(dims[0]))
