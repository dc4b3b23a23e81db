"""Reads the weights of a folder that transformers loads. Nothing here is shared with the writer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vlmq_export.errors import CheckpointError, FormatError
from vlmq_export.quantizer.model.architecture import family_of
from vlmq_export.quantizer.storage.tensors import TensorInfo, read_header, weight_map
from vlmq_export.quantizer.storage.untrusted import contained, read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CHUNK = 2**22  # values that are unpacked at a time; each takes a byte per bit meanwhile


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The values of int32 words [R, M] that are packed along the first axis: uint8 [R·32/bits, M].

    The bits of a column are one stream, least significant first. Bits that are too few for one
    more value are left over.
    """
    rows, width = words.shape
    values = rows * 32 // bits
    out = np.empty((width, values), np.uint8)
    step = max(1, _CHUNK // max(1, values))
    for first in range(0, width, step):
        columns = np.ascontiguousarray(words[:, first : first + step].T, dtype="<i4")
        stream = columns.view(np.uint8)  # [columns, 4·R] bytes
        whole = np.unpackbits(stream, axis=1, bitorder="little")[:, : values * bits]
        bit = whole.reshape(-1, values, bits)
        out[first : first + step] = np.packbits(bit, axis=2, bitorder="little")[:, :, 0]
    return out.T


# The one form of expression that says which linears have a width. Expressions from a file are never
# run, as some take forever.
_NAMED = re.compile(
    r"\.\*model\\\.layers\\\.\((\d{1,9}(?:\|\d{1,9})*)\)\\\.(\w+)\\\.\((\w+(?:\|\w+)*)\)\$"
)


def named_linears(pattern: object) -> set[str] | None:
    """The linears that an expression over names stands for: {`0.self_attn.q_proj`, …}.

    None for an expression of another form.
    """
    found = _NAMED.fullmatch(pattern) if isinstance(pattern, str) else None
    if found is None:
        return None
    layers, parent, ends = found.groups()
    return {f"{i}.{parent}.{end}" for i in layers.split("|") for end in ends.split("|")}


class QuantizedFolder(ABC):
    """A written folder. Weights are read when they are asked for.

    Raises FormatError for what is missing, damaged or outside the folder.
    """

    title: ClassVar[str]  # what the format is called in words
    format: ClassVar[str]  # what `--format` calls it
    method: ClassVar[str]  # quant_method in config.json
    parts: ClassVar[tuple[str, ...]]  # what a quantized weight became; the codes first

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json", error=FormatError)
        q = self.config.get("quantization_config")
        if not isinstance(q, dict) or q.get("quant_method") != self.method:
            raise FormatError(
                f"{path}: config.json has no {self.title} quantization_config;"
                f" give a folder written by --format {self.format}"
            )
        self.quantization = q
        self._read_grid()
        self.tensors = self._headers()  # by their names in the file
        self.family = family_of(self.config)
        # transformers loads either style of names. A folder has one of them throughout.
        layers = self.family.layers
        self.hub_style = any(
            name.startswith(layers) and name.removeprefix(layers)[:1].isdigit()
            for name in self.tensors
        )

    @abstractmethod
    def _read_grid(self) -> None:
        """Take from `quantization` what decoding needs. Raises FormatError for what is unknown."""

    @abstractmethod
    def decode(self, module: str) -> np.ndarray:
        """The weights of a quantized module, by its name in the file: float32 [N, K].

        Only one product is rounded. Raises FormatError where its parts do not fit together.
        """

    def _headers(self) -> dict[str, TensorInfo]:
        """The tensors of every shard, from the headers alone."""
        index: dict[str, str] = {}
        files = [_SINGLE]
        if (self.path / _INDEX).is_file():
            index = weight_map(self.path / _INDEX, FormatError)
            files = sorted(set(index.values()))
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            header = self._header(file)
            if twice := tensors.keys() & header.keys():
                raise FormatError(
                    f"{self.path}: tensor {min(twice)} is in two shards; export again"
                )
            tensors |= header
        names = index.keys() | tensors.keys() if index else set()
        lost = sorted(n for n in names if n not in tensors or tensors[n].file != index.get(n))
        if lost:
            raise FormatError(
                f"{self.path}: {len(lost)} tensors are not where {_INDEX} says,"
                f" first {lost[0]}; export again"
            )
        return tensors

    def _header(self, file: str) -> dict[str, TensorInfo]:
        """The tensors of one shard."""
        # transformers would follow ../ in an index.
        try:
            shard = contained(self.path, file)
        except ValueError as e:
            raise FormatError(f"{self.path}: {_INDEX}: {e}; do not load it") from None
        if not shard.is_file():
            raise FormatError(f"{self.path}: {file} is missing; export again")
        try:
            header = read_header(shard)
        except CheckpointError as e:
            raise FormatError(f"{self.path}: {file} is damaged ({e})") from None
        return {
            name: TensorInfo(name, tuple(info["shape"]), info["dtype"], file)
            for name, info in header.items()
        }

    @cached_property
    def linears(self) -> list[str]:
        """Names in the file of the quantized modules."""
        end = f".{self.parts[0]}"
        return [n.removesuffix(end) for n in self.tensors if n.endswith(end)]

    def stored_name(self, hub_name: str) -> str:
        """The name in the file of a tensor or a module."""
        return hub_name if self.hub_style else self.family.module_name(hub_name)

    def hub_name(self, stored: str) -> str:
        """The hub name of a tensor or a module, by its name in the file."""
        return self.family.hub_name(stored)

    def in_layers(self, stored: str) -> str:
        """A module's name behind that of the decoder layers, by its name in the file."""
        return self.hub_name(stored).removeprefix(self.family.layers)

    def weight_names(self) -> list[str]:
        """Hub names of every weight that the folder holds, quantized ones first."""
        parts = {f"{module}.{part}" for module in self.linears for part in self.parts}
        plain = [name for name in self.tensors if name not in parts]
        names = [*(f"{module}.weight" for module in self.linears), *plain]
        return [self.hub_name(name) for name in names]

    def raw(self, name: str) -> torch.Tensor:
        """A tensor as it lies in the file, by its name there."""
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.path}: tensor {name} is missing; export again")
        try:
            with safe_open(self.path / info.file, framework="pt") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise FormatError(f"{info.file}: cannot read {name} ({e}); export again") from None

    def array(self, hub_name: str) -> np.ndarray | None:
        """A weight as float32, decoded if it is quantized. None if the folder does not hold it."""
        name = self.stored_name(hub_name)
        module = name.removesuffix(".weight")
        if name != module and f"{module}.{self.parts[0]}" in self.tensors:
            return self.decode(module)
        return self.raw(name).float().numpy() if name in self.tensors else None
