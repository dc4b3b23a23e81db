"""What is in a GGUF file, by three readers that share nothing but the bytes: ours, gguf-py, and llama.cpp's own library.

Every file passes our parser (`container.py`) first: the other two hang on or abort over files that it refuses.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.container import Container, TensorInfo, parse
from vlmq_export.formats.gguf.decode import decode
from vlmq_export.formats.gguf.imatrix import IMATRIX
from vlmq_export.formats.gguf.llama import library_path
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.formats.gguf.writer import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, shard_suffix


class GGUFFile:
    """A GGUF v3 file, or a model split over several given by the first; mapped and checked.

    Raises FormatError for one that is damaged or a set that is not whole, naming what and where.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata, self.types, self.tensors, first = _open(self.path)
        self._maps = dict.fromkeys(self.tensors, first)
        self.parts = [self.path]
        count = self.metadata.get(SPLIT_COUNT, 1)
        if count == 1 or self.metadata.get(SPLIT_NO) != 0:
            return
        if not isinstance(count, int) or not self.path.name.endswith(shard_suffix(0, count)):
            raise FormatError(f"{self.path.name}: {SPLIT_COUNT} is {count}, which does not fit the name of the file")
        stem = self.path.name.removesuffix(shard_suffix(0, count))
        for i in range(1, count):
            part = self.path.with_name(stem + shard_suffix(i, count))
            metadata, _, tensors, mapped = _open(part)
            if (metadata.get(SPLIT_NO), metadata.get(SPLIT_COUNT)) != (
                i,
                count,
            ) or tensors.keys() & self.tensors.keys():
                raise FormatError(f"{part.name}: not part {i + 1} of {count} of {self.path.name}")
            self.tensors |= tensors
            self._maps |= dict.fromkeys(tensors, mapped)
            self.parts.append(part)
        if len(self.tensors) != self.metadata.get(SPLIT_TENSORS):
            raise FormatError(
                f"{self.path.name}: {len(self.tensors)} tensors in {count} files, {self.metadata.get(SPLIT_TENSORS)} expected"
            )

    def raw(self, name: str) -> np.ndarray:
        """uint8 [nbytes], not copied."""
        t = self.tensors[name]
        return np.frombuffer(self._maps[name], np.uint8, t.nbytes, t.offset)

    def array(self, name: str) -> np.ndarray:
        """float32, in torch's shape, decoded by our own decoder."""
        t = self.tensors[name]
        return decode(self.raw(name), TYPES[t.type], t.shape)

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, self.array(name)) for name in self.tensors)


def _open(path: Path) -> tuple[dict, dict, dict[str, TensorInfo], mmap.mmap]:
    """Metadata, its types, tensors and the mapping of one file."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    with path.open("rb") as f:
        if not path.stat().st_size:
            raise FormatError(f"{path.name}: empty file; export it again")
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    container: Container = parse(path, mapped)
    return container.metadata, container.types, container.tensors, mapped


_LATER_SHARD = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")


def find_files(folder: str | Path) -> tuple[Path, Path]:
    """(text model, mmproj) of an exported folder; of a split model its first file. Raises FormatError unless there is
    exactly one of each."""
    files = [f for f in sorted(Path(folder).glob("*.gguf")) if f.name != IMATRIX and not _LATER_SHARD.search(f.name)]
    vision = [f for f in files if f.name.startswith("mmproj-")]
    text = [f for f in files if f not in vision]
    if len(text) != 1 or len(vision) != 1:
        raise FormatError(
            f"{folder}: {len(text)} text models and {len(vision)} mmproj files where one of each is expected"
        )
    return text[0], vision[0]


def decode_ours(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor by our own reader."""
    return GGUFFile(path).items()


def decode_gguf_py(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor by gguf-py's reader and decoders."""
    parts = GGUFFile(path).parts
    import gguf

    for tensor in (t for part in parts for t in gguf.GGUFReader(str(part)).tensors):
        shape = tuple(int(n) for n in reversed(tensor.shape))
        yield str(tensor.name), np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)


def decode_libggml(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor by llama.cpp's own library: its parser, and the functions that decode
    rows for its kernels. Raises MissingRuntime without xllamacpp."""
    file = GGUFFile(path)
    lib, shapes = _libggml(), {name: t.shape for name, t in file.tensors.items()}
    for part in file.parts:
        yield from _decode_part(lib, part, shapes)


def _decode_part(lib: ctypes.CDLL, path: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    context = lib.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if not context:
        raise FormatError(f"{path.name}: llama.cpp's own parser refuses this file; export it again")
    try:
        data = np.memmap(path, np.uint8, "r")
        start = lib.gguf_get_data_offset(context)
        for i in range(lib.gguf_get_n_tensors(context)):
            name = lib.gguf_get_tensor_name(context, i).decode()
            ne = lib.gguf_get_tensor_ne(context, i)[:4]  # padded with ones
            shape = tuple(reversed(ne[: len(shapes[name])]))
            at, size = start + lib.gguf_get_tensor_offset(context, i), lib.gguf_get_tensor_size(context, i)
            flat = _to_float(lib, lib.gguf_get_tensor_type(context, i), data[at : at + size], math.prod(ne))
            yield name, flat.reshape(shape)
    finally:
        lib.gguf_free(context)


# ggml type id → the exported function (const void * row, float * out, int64_t n).
_ROW_FUNCTIONS = {
    1: "ggml_fp16_to_fp32_row", 30: "ggml_bf16_to_fp32_row", 2: "dequantize_row_q4_0", 3: "dequantize_row_q4_1",
    6: "dequantize_row_q5_0", 7: "dequantize_row_q5_1", 8: "dequantize_row_q8_0", 10: "dequantize_row_q2_K",
    11: "dequantize_row_q3_K", 12: "dequantize_row_q4_K", 13: "dequantize_row_q5_K", 14: "dequantize_row_q6_K",
    35: "dequantize_row_tq2_0", 42: "dequantize_row_q2_0",
}  # fmt: skip


def _to_float(lib: ctypes.CDLL, kind: int, raw: np.ndarray, n: int) -> np.ndarray:
    out = np.empty(n, np.float32)
    if kind == 0:
        out.view(np.uint8)[:] = raw
    elif kind in _ROW_FUNCTIONS:
        row = np.ascontiguousarray(raw)
        getattr(lib, _ROW_FUNCTIONS[kind])(row.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), n)
    else:
        raise FormatError(f"tensors of ggml type {kind} are not decoded through the library here")
    return out


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@cache
def _libggml() -> ctypes.CDLL:
    """The shared object inside xllamacpp's wheel, without starting anything of it."""
    lib = ctypes.CDLL(str(library_path()))
    void, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("gguf_init_from_file", void, (ctypes.c_char_p, _InitParams)), ("gguf_free", None, (void,)),
        ("gguf_get_data_offset", size, (void,)), ("gguf_get_n_tensors", i64, (void,)),
        ("gguf_get_tensor_name", ctypes.c_char_p, (void, i64)), ("gguf_get_tensor_type", ctypes.c_int, (void, i64)),
        ("gguf_get_tensor_offset", size, (void, i64)), ("gguf_get_tensor_size", size, (void, i64)),
        ("gguf_get_tensor_ne", ctypes.POINTER(i64), (void, i64)),
        *((function, None, (void, void, i64)) for function in _ROW_FUNCTIONS.values()),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
