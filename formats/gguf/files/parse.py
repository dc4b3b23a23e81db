"""Parses a GGUF v3 container, and trusts nothing in it.

Every count, length and offset is held against the size of the file before anything of that size is
read or allocated. gguf-py hangs on some of the files that are refused here, and accepts others.

The layout of a file, little-endian (ggml's docs/gguf.md):

    "GGUF", u32 version, u64 number of tensors, u64 number of keys
    per key       string name, u32 value type, value
    per tensor    string name, u32 dimensions, u64 each dimension, u32 type, u64 offset
    padding to the alignment, then the data that the offsets point into

A string is a u64 length and UTF-8 bytes. An array is a u32 element type, a u64 length and the
elements. Dimensions are in the reverse of torch's order.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.types.table import BY_ID

MAGIC = b"GGUF"
# GGUF value types. Those of numbers are given with numpy's dtype.
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
    7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
U32 = 4
_NUMBERS = {code: struct.Struct(f"<{code}") for code in "IQ"}

# Limits. The largest published models have a few thousand tensors, and vocabularies that have with
# their merges under 800 000 strings.
MAX_NAME = 63  # bytes of a tensor's name; ggml keeps 64 with the terminator
MAX_ENTRIES = 2**15  # keys, and tensors
MAX_STRINGS = 2**20  # strings in all arrays of the metadata together
MAX_NUMBERS = 2**22  # numbers in all arrays of the metadata together
MAX_METADATA = 2**28  # bytes


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and what it is."""

    name: str
    shape: tuple[int, ...]  # in torch's order: rows first
    type: str  # a key of ggml.TYPES
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class Container:
    """Everything before the data."""

    metadata: dict[str, object]  # arrays are lists
    types: dict[str, int]  # key → GGUF value type, of the elements for an array
    tensors: dict[str, TensorInfo]  # in the order of the file
    data_start: int  # bytes from the start of the file


class _Cursor:
    """Reads forward in the metadata, and never past its end.

    `what` names in words what is being read, for the error.
    """

    def __init__(self, path: Path, buffer: mmap.mmap | bytes):
        self.path, self.buffer, self.at = path, buffer, 0
        self.end = min(len(buffer), MAX_METADATA)
        # How many elements of arrays may still come: of strings (True) and of numbers (False).
        self.room = {True: MAX_STRINGS, False: MAX_NUMBERS}

    def fail(self, what: str) -> FormatError:
        """The error to raise. Names come from the file, and are made printable."""
        shown = "".join(ch if ch.isprintable() else "?" for ch in what)
        return FormatError(
            f"{self.path.name}: {shown[:300]}; damaged, or not a GGUF file that llama.cpp loads:"
            " export it again"
        )

    def take(self, n: int, what: str) -> bytes:
        """The next `n` bytes. Raises FormatError where fewer are left."""
        if n > self.end - self.at:
            raise self.fail(
                f"{what} at byte {self.at} needs {n} bytes, {self.end - self.at} are left"
            )
        start, self.at = self.at, self.at + n
        return self.buffer[start : self.at]

    def number(self, code: str, what: str) -> int:
        """A u32 (code I) or a u64 (code Q)."""
        return _NUMBERS[code].unpack(self.take(_NUMBERS[code].size, what))[0]

    def count(self, what: str, limit: int, each: int) -> int:
        """A u64 that counts things of at least `each` bytes. Raises FormatError for too many."""
        n = self.number("Q", what)
        if n > limit or n * each > self.end - self.at:
            raise self.fail(f"{what} is {n}, more than the file can hold")
        return n

    def text(self, what: str) -> str:
        """A string. Raises FormatError where it is not UTF-8."""
        try:
            return str(self.take(self.number("Q", what), what), "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def texts(self, n: int, what: str) -> list[str]:
        """`n` strings, as `text` reads them.

        They are read in one loop without calls, because a vocabulary has hundreds of thousands.
        """
        read, buffer, end, strings = _NUMBERS["Q"].unpack_from, self.buffer, self.end, []
        for _ in range(n):
            start = self.at + 8
            if start > end:
                self.text(what)  # raises FormatError, and says why
            size = read(buffer, self.at)[0]
            if size > end - start:
                self.text(what)  # raises FormatError, and says why
            self.at = start + size
            strings.append(buffer[start : self.at])
        try:
            return [str(s, "utf-8") for s in strings]
        except UnicodeDecodeError:
            raise self.fail(f"an element of {what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> object:
        """A string or a number. Raises FormatError for an unknown value type."""
        if kind == STRING:
            return self.text(f"value of {key}")
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, f"value of {key}"), dtype)[0].item()
        raise self.fail(f"key {key} has the unknown value type {kind}")

    def array(self, key: str) -> tuple[int, list]:
        """An array: the value type of its elements, and the elements."""
        kind = self.number("I", f"element type of {key}")
        if kind == ARRAY:
            raise self.fail(f"key {key} is an array of arrays")
        if kind != STRING and kind not in SCALARS:
            raise self.fail(f"key {key} has the unknown value type {kind}")
        text = kind == STRING
        size = 8 if text else np.dtype(SCALARS[kind]).itemsize
        n = self.count(f"length of {key}", self.room[text], size)
        self.room[text] -= n
        if text:
            return kind, self.texts(n, key)
        return kind, np.frombuffer(self.take(n * size, key), SCALARS[kind]).tolist()


def parse(path: Path, buffer: mmap.mmap | bytes) -> Container:
    """The container of a file.

    path: names the file in errors.
    buffer: the whole file.

    Raises FormatError that says what is damaged, and where.
    """
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
    alignment = _alignment(c, metadata, types)
    start = -(-c.at // alignment) * alignment
    return Container(metadata, types, _placed(c, infos, start, alignment), start)


def _metadata(c: _Cursor, n: int) -> tuple[dict[str, object], dict[str, int]]:
    """The next `n` keys: their values, and their value types."""
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
    """The next tensor, with its offset from the start of the data."""
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
        raise c.fail(
            f"tensor {name} has rows of {dims[0]}, not a multiple of {t.name}'s block of {t.block}"
        )
    shape = tuple(reversed(dims))
    offset = c.number("Q", f"offset of {name}")
    return TensorInfo(name, shape, t.name, offset, prod(shape[:-1]) * t.row_bytes(dims[0]))


def _alignment(c: _Cursor, metadata: Mapping[str, object], types: Mapping[str, int]) -> int:
    """What the data and every tensor are aligned to, in bytes."""
    value = metadata.get("general.alignment", 32)
    exact = types.get("general.alignment", U32) == U32
    if exact and isinstance(value, int) and 1 <= value <= 2**20 and not value & (value - 1):
        return value
    raise c.fail(f"general.alignment {value} is not a power of two")


def _placed(
    c: _Cursor, infos: list[TensorInfo], start: int, alignment: int
) -> dict[str, TensorInfo]:
    """The tensors by name, with their offsets from the start of the file.

    infos: the tensors with their offsets from `start`, where the data begins.

    Raises FormatError for names that appear twice, and for tensors that are misaligned, overlap, or
    lie past the end of the file.
    """
    tensors: dict[str, TensorInfo] = {}
    for t in infos:
        if t.name in tensors:
            raise c.fail(f"tensor {t.name} appears twice")
        if t.offset % alignment or start + t.offset + t.nbytes > len(c.buffer):
            where = f"bytes {t.offset} to {t.offset + t.nbytes} of the data"
            raise c.fail(f"tensor {t.name} at {where} is misaligned or past the end of the file")
        tensors[t.name] = replace(t, offset=start + t.offset)
    ordered = sorted(tensors.values(), key=lambda t: t.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise c.fail(f"tensors {before.name} and {after.name} overlap")
    return tensors
