"""Reads the weights of a GPTQ folder. Nothing here is shared with the writer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vlmq_export.errors import CheckpointError, FormatError
from vlmq_export.quantizer.model.architecture import family_of
from vlmq_export.quantizer.storage.tensors import TensorInfo, read_header, weight_map
from vlmq_export.quantizer.storage.untrusted import contained, read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_CHUNK = 2**22  # values that are unpacked at a time; each takes a byte per bit meanwhile


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The values of int32 words [R, M] that are packed along the first axis: uint8 [R·32/bits, M].

    The bits of a column are one stream, least significant first.
    """
    rows, width = words.shape
    values = rows * 32 // bits
    out = np.empty((width, values), np.uint8)
    step = max(1, _CHUNK // max(1, values))
    for first in range(0, width, step):
        columns = np.ascontiguousarray(words[:, first : first + step].T, dtype="<i4")
        stream = columns.view(np.uint8)  # [columns, 4·R] bytes
        bit = np.unpackbits(stream, axis=1, bitorder="little").reshape(-1, values, bits)
        out[first : first + step] = np.packbits(bit, axis=2, bitorder="little")[:, :, 0]
    return out.T


class GptqFolder:
    """A written folder. Weights are read when they are asked for.

    Raises FormatError for what is missing, damaged or outside the folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json", error=FormatError)
        q = self.config.get("quantization_config")
        if not isinstance(q, dict) or q.get("quant_method") != "gptq":
            raise FormatError(
                f"{path}: config.json has no GPTQ quantization_config;"
                " give a folder written by --format gptq"
            )
        self.quantization = q
        version, bits = q.get("checkpoint_format", "gptq"), q.get("bits")
        unknown = version not in ("gptq", "gptq_v2")
        if unknown or type(bits) is not int or bits not in (2, 3, 4, 8):
            raise FormatError(
                f"{path}: checkpoint_format {version} with {bits} bits is not readable here"
            )
        self.bits: int = bits
        self.zero_offset = 1 if version == "gptq" else 0  # v1 stores the zero-point minus one
        self.tensors = self._headers()  # by their names in the file
        self.family = family_of(self.config)
        # transformers loads either style of names. A folder has one of them throughout.
        layers = self.family.layers
        self.hub_style = any(
            name.startswith(layers) and name.removeprefix(layers)[:1].isdigit()
            for name in self.tensors
        )

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

    @property
    def version(self) -> str:
        """v1 or v2."""
        return "v1" if self.zero_offset else "v2"

    @cached_property
    def linears(self) -> list[str]:
        """Names in the file of the quantized modules."""
        return [n.removesuffix(".qweight") for n in self.tensors if n.endswith(".qweight")]

    def stored_name(self, hub_name: str) -> str:
        """The name in the file of a tensor or a module."""
        return hub_name if self.hub_style else self.family.module_name(hub_name)

    def hub_name(self, stored: str) -> str:
        """The hub name of a tensor or a module, by its name in the file."""
        return self.family.hub_name(stored)

    def weight_names(self) -> list[str]:
        """Hub names of every weight that the folder holds, quantized ones first."""
        parts = {f"{module}.{part}" for module in self.linears for part in PARTS}
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
        if name != module and f"{module}.qweight" in self.tensors:
            return self.decode(module)
        return self.raw(name).float().numpy() if name in self.tensors else None

    def decode(self, module: str) -> np.ndarray:
        """The weights of a quantized module, by its name in the file: float32 [N, K].

        weight[n, k] = scales[g, n] · (codes[n, k] − zeros[g, n]) with g = g_idx[k]. Only the
        product is rounded.
        """
        qweight, qzeros, scales, g_idx = (self.raw(f"{module}.{p}").numpy() for p in PARTS)
        k, n = g_idx.shape[0], qweight.shape[1]
        groups = scales.shape[0]
        if (
            qweight.shape != (k * self.bits // 32, n)
            or qzeros.shape != (groups, n * self.bits // 32)
            or scales.shape != (groups, n)
            or (g_idx < 0).any()
            or (g_idx >= groups).any()
            or {qweight.dtype, qzeros.dtype, g_idx.dtype} != {np.dtype(np.int32)}
        ):
            raise FormatError(
                f"{self.path}: the tensors of {module} do not fit together; export again"
            )
        codes = unpack(qweight, self.bits).T  # [N, K]
        stored = unpack(np.ascontiguousarray(qzeros.T), self.bits)
        zeros = stored.astype(np.int16) + self.zero_offset  # [N, G]
        self._refuse_mislabelled(module, zeros)
        steps = codes.astype(np.int16) - zeros[:, g_idx]
        return steps.astype(np.float32) * scales.T.astype(np.float32)[:, g_idx]

    def _refuse_mislabelled(self, module: str, zeros: np.ndarray) -> None:
        """Raises FormatError where v1 and v2 were confused.

        The zero-points of a symmetric grid are all 2^(bits−1). They are off by one throughout in a
        folder that config.json gives the wrong version.
        """
        off = zeros.astype(int) - 2 ** (self.bits - 1)
        if self.quantization.get("sym") and abs(off.flat[0]) == 1 and (off == off.flat[0]).all():
            other = {"v1": "v2", "v2": "v1"}[self.version]
            raise FormatError(
                f"{self.path}: {module}.qzeros are those of {other}"
                f" but config.json says {self.version}; export again"
            )


def read(path: str | Path) -> dict[str, np.ndarray | None]:
    """Every weight, decoded, by hub name. The whole model has to fit in memory.

    A weight is None if its name in the file is of another style than those of the layers.
    """
    folder = GptqFolder(path)
    return {name: folder.array(name) for name in folder.weight_names()}
