"""What is in a GGUF file, by three readers: ours, gguf-py, and llama.cpp's own library.

They share nothing but the bytes of the file. Our own parser (`files/parse.py`) sees every file
first, because the other two readers hang on, or abort over, files that it refuses.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.files.container import (
    SPLIT_COUNT,
    SPLIT_NO,
    SPLIT_TENSORS,
    shard_suffix,
)
from vlmq_export.formats.gguf.files.imatrix import IMATRIX
from vlmq_export.formats.gguf.files.parse import Container, parse
from vlmq_export.formats.gguf.runtime.llama import library_path
from vlmq_export.formats.gguf.types.decode import decode
from vlmq_export.formats.gguf.types.table import TYPES


class GGUFFile:
    """A GGUF v3 file, or a model that is split over several files and given by the first of them.

    The files are mapped into memory and checked. Raises FormatError for a damaged file and for a
    split model whose files do not belong together or are not all there.

    metadata: key → value, of the first file. Arrays are lists.
    types: key → GGUF value type, of the elements for an array.
    tensors: GGUF name → where the tensor lies, of all files.
    parts: all files, in order.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        container, mapped = _open(self.path)
        self.metadata: dict[str, Any] = container.metadata
        self.types, self.tensors = container.types, container.tensors
        self.parts = [self.path]
        self._maps = dict.fromkeys(self.tensors, mapped)
        count = self.metadata.get(SPLIT_COUNT, 1)
        if count != 1 and self.metadata.get(SPLIT_NO) == 0:
            self._add_parts(count)

    def _add_parts(self, count: Any) -> None:
        """Add the tensors of the other files of a split model, `count` files in all."""
        name = self.path.name
        if not isinstance(count, int) or not name.endswith(shard_suffix(0, count)):
            raise FormatError(
                f"{name}: {SPLIT_COUNT} is {count}, which does not fit the name of the file"
            )
        stem = name.removesuffix(shard_suffix(0, count))
        for i in range(1, count):
            part = self.path.with_name(stem + shard_suffix(i, count))
            container, mapped = _open(part)
            said = container.metadata.get(SPLIT_NO), container.metadata.get(SPLIT_COUNT)
            if said != (i, count) or container.tensors.keys() & self.tensors.keys():
                raise FormatError(f"{part.name}: not part {i + 1} of {count} of {name}")
            self.tensors |= container.tensors
            self._maps |= dict.fromkeys(container.tensors, mapped)
            self.parts.append(part)
        expected = self.metadata.get(SPLIT_TENSORS)
        if len(self.tensors) != expected:
            raise FormatError(
                f"{name}: {len(self.tensors)} tensors in {count} files, {expected} expected"
            )

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 [nbytes]. They are not copied."""
        t = self.tensors[name]
        return np.frombuffer(self._maps[name], np.uint8, t.nbytes, t.offset)

    def array(self, name: str) -> np.ndarray:
        """A tensor in torch's shape, float32, by our own decoder."""
        t = self.tensors[name]
        return decode(self.raw(name), TYPES[t.type], t.shape)

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """(GGUF name, float32 array) of every tensor."""
        return ((name, self.array(name)) for name in self.tensors)


def _open(path: Path) -> tuple[Container, mmap.mmap]:
    """One file, parsed and mapped."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    with path.open("rb") as f:
        if not path.stat().st_size:
            raise FormatError(f"{path.name}: empty file; export it again")
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    return parse(path, mapped), mapped


_LATER_SHARD = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")


def find_files(folder: str | Path) -> tuple[Path, Path]:
    """The text model and the mmproj of an exported folder. Of a split model it is the first file.

    Raises FormatError unless there is exactly one of each.
    """
    files = [
        f
        for f in sorted(Path(folder).glob("*.gguf"))
        if f.name != IMATRIX and not _LATER_SHARD.search(f.name)
    ]
    vision = [f for f in files if f.name.startswith("mmproj-")]
    text = [f for f in files if f not in vision]
    if len(text) != 1 or len(vision) != 1:
        raise FormatError(
            f"{folder}: {len(text)} text models and {len(vision)} mmproj files where one of each is"
            " expected"
        )
    return text[0], vision[0]


def decode_ours(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor, by our own reader."""
    return GGUFFile(path).items()


def decode_gguf_py(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor, by the reader and the decoders of gguf-py."""
    parts = GGUFFile(path).parts
    import gguf

    for tensor in (t for part in parts for t in gguf.GGUFReader(str(part)).tensors):
        shape = tuple(int(n) for n in reversed(tensor.shape))
        decoded = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        yield str(tensor.name), decoded.reshape(shape)


def decode_libggml(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor, by llama.cpp's own library.

    The library parses the file, and decodes rows with the functions that its kernels use. Raises
    MissingRuntime without xllamacpp.
    """
    file = GGUFFile(path)
    lib, shapes = _libggml(), {name: t.shape for name, t in file.tensors.items()}
    for part in file.parts:
        yield from _decode_part(lib, part, shapes)


def _decode_part(
    lib: ctypes.CDLL, path: Path, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor of one file.

    shapes: GGUF name → shape in torch's order.
    """
    context = lib.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if not context:
        raise FormatError(f"{path.name}: llama.cpp's own parser refuses this file; export it again")
    try:
        data = np.memmap(path, np.uint8, "r")
        data_start = lib.gguf_get_data_offset(context)
        for i in range(lib.gguf_get_n_tensors(context)):
            name = lib.gguf_get_tensor_name(context, i).decode()
            # The library pads the dimensions to four with ones.
            ne = lib.gguf_get_tensor_ne(context, i)[:4]
            shape = tuple(reversed(ne[: len(shapes[name])]))
            start = data_start + lib.gguf_get_tensor_offset(context, i)
            raw = data[start : start + lib.gguf_get_tensor_size(context, i)]
            kind = lib.gguf_get_tensor_type(context, i)
            yield name, _to_float(lib, kind, raw, math.prod(ne)).reshape(shape)
    finally:
        lib.gguf_free(context)


# ggml's type id → the exported function (const void * row, float * out, int64_t n).
_ROW_FUNCTIONS = {
    1: "ggml_fp16_to_fp32_row",
    30: "ggml_bf16_to_fp32_row",
    2: "dequantize_row_q4_0",
    3: "dequantize_row_q4_1",
    6: "dequantize_row_q5_0",
    7: "dequantize_row_q5_1",
    8: "dequantize_row_q8_0",
    10: "dequantize_row_q2_K",
    11: "dequantize_row_q3_K",
    12: "dequantize_row_q4_K",
    13: "dequantize_row_q5_K",
    14: "dequantize_row_q6_K",
    35: "dequantize_row_tq2_0",
    42: "dequantize_row_q2_0",
    20: "dequantize_row_iq4_nl",
    23: "dequantize_row_iq4_xs",
    21: "dequantize_row_iq3_s",
    18: "dequantize_row_iq3_xxs",
    22: "dequantize_row_iq2_s",
    17: "dequantize_row_iq2_xs",
    16: "dequantize_row_iq2_xxs",
}


def _to_float(lib: ctypes.CDLL, kind: int, raw: np.ndarray, n: int) -> np.ndarray:
    """float32 [n], decoded by the library.

    kind: ggml's type id. Raises FormatError for a type that the library has no function for.
    raw: uint8 [nbytes].
    """
    out = np.empty(n, np.float32)
    if kind == 0:
        out.view(np.uint8)[:] = raw
    elif kind in _ROW_FUNCTIONS:
        row = np.ascontiguousarray(raw)
        function = getattr(lib, _ROW_FUNCTIONS[kind])
        function(row.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), n)
    else:
        raise FormatError(f"tensors of ggml type {kind} are not decoded through the library here")
    return out


class _InitParams(ctypes.Structure):
    """gguf_init_params of ggml's gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@cache
def _libggml() -> ctypes.CDLL:
    """The shared library inside xllamacpp's wheel, with typed functions. No backend is started."""
    lib = ctypes.CDLL(str(library_path()))
    void, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("gguf_init_from_file", void, (ctypes.c_char_p, _InitParams)),
        ("gguf_free", None, (void,)),
        ("gguf_get_data_offset", size, (void,)),
        ("gguf_get_n_tensors", i64, (void,)),
        ("gguf_get_tensor_name", ctypes.c_char_p, (void, i64)),
        ("gguf_get_tensor_type", ctypes.c_int, (void, i64)),
        ("gguf_get_tensor_offset", size, (void, i64)),
        ("gguf_get_tensor_size", size, (void, i64)),
        ("gguf_get_tensor_ne", ctypes.POINTER(i64), (void, i64)),
        *((function, None, (void, void, i64)) for function in _ROW_FUNCTIONS.values()),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
