"""A GPTQ folder → weights: our own decoder, which shares no code with the writer."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vlmq_export.errors import CheckpointError, FormatError
from vlmq_export.formats.base import Inspection, TensorRow
from vlmq_export.quantizer.checkpoint import TensorInfo, read_header, weight_map
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.untrusted import contained, read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_QUANTIZED = ("qweight", "qzeros", "scales", "g_idx")
_CHUNK = 2**22  # values unpacked at a time: each is spread to one byte a bit


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, M] packed along the first axis → uint8 [R·32/bits, M]: the bits of a column are one stream."""
    rows, width = words.shape
    values = rows * 32 // bits
    out = np.empty((width, values), np.uint8)
    step = max(1, _CHUNK // max(1, values))
    for first in range(0, width, step):
        stream = np.ascontiguousarray(words[:, first : first + step].T, dtype="<i4").view(np.uint8)  # [m, 4R] bytes
        bit = np.unpackbits(stream, axis=1, bitorder="little").reshape(-1, values, bits)
        out[first : first + step] = np.packbits(bit, axis=2, bitorder="little")[:, :, 0]
    return out.T


class GptqFolder:
    """A written folder, read lazily. Raises FormatError for what is missing, damaged or outside the folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json", error=FormatError)
        q = self.config.get("quantization_config")
        if not isinstance(q, dict) or q.get("quant_method") != "gptq":
            raise FormatError(
                f"{path}: config.json has no GPTQ quantization_config; give a folder written by --format gptq"
            )
        self.quantization = q
        checkpoint_format = q.get("checkpoint_format", "gptq")
        bits = q.get("bits")
        if checkpoint_format not in ("gptq", "gptq_v2") or type(bits) is not int or bits not in (2, 3, 4, 8):
            raise FormatError(f"{path}: checkpoint_format {checkpoint_format} with {bits} bits is not readable here")
        self.bits: int = bits
        self.zero_offset = 1 if checkpoint_format == "gptq" else 0  # v1 stores the zero-point minus one
        self.tensors = self._headers()
        self.family = family_of(self.config)
        # transformers loads either style of names; a folder has one.
        self.hub_style = any(
            name.startswith(self.family.layers) and name.removeprefix(self.family.layers)[:1].isdigit()
            for name in self.tensors
        )

    def _headers(self) -> dict[str, TensorInfo]:
        index: dict[str, str] = {}
        files = [_SINGLE]
        if (self.path / _INDEX).is_file():
            index = weight_map(self.path / _INDEX, FormatError)
            files = sorted(set(index.values()))
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            try:  # transformers would follow ../ in an index
                shard = contained(self.path, file)
            except ValueError as e:
                raise FormatError(f"{self.path}: {_INDEX}: {e}; do not load it") from None
            if not shard.is_file():
                raise FormatError(f"{self.path}: {file} is missing; export again")
            try:
                header = read_header(shard)
            except CheckpointError as e:
                raise FormatError(f"{self.path}: {file} is damaged ({e})") from None
            if twice := tensors.keys() & header.keys():
                raise FormatError(f"{self.path}: tensor {min(twice)} is in two shards; export again")
            tensors |= {n: TensorInfo(n, tuple(i["shape"]), i["dtype"], file) for n, i in header.items()}
        if index and (
            lost := sorted(
                n for n in index.keys() | tensors.keys() if n not in tensors or tensors[n].file != index.get(n)
            )
        ):
            raise FormatError(
                f"{self.path}: {len(lost)} tensors are not where {_INDEX} says, first {lost[0]}; export again"
            )
        return tensors

    @property
    def version(self) -> str:
        return "v1" if self.zero_offset else "v2"

    @cached_property
    def linears(self) -> list[str]:
        """Names in the file of the quantized modules."""
        return [n.removesuffix(".qweight") for n in self.tensors if n.endswith(".qweight")]

    def stored_name(self, hub_name: str) -> str:
        return hub_name if self.hub_style else self.family.module_name(hub_name)

    def hub_name(self, stored: str) -> str:
        """The way back; `stored` is a tensor's or a module's name in the file."""
        return self.family.hub_name(stored)

    def weight_names(self) -> list[str]:
        """Hub names of every weight that the folder holds, quantized ones first."""
        parts = {f"{m}.{p}" for m in self.linears for p in _QUANTIZED}
        names = [*(f"{m}.weight" for m in self.linears), *(n for n in self.tensors if n not in parts)]
        return [self.hub_name(n) for n in names]

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
        """float32, decoded if quantized; None when the folder has no such tensor."""
        name = self.stored_name(hub_name)
        module = name.removesuffix(".weight")
        if name != module and f"{module}.qweight" in self.tensors:
            return self.decode(module)
        return self.raw(name).float().numpy() if name in self.tensors else None

    def decode(self, module: str) -> np.ndarray:
        """float32 [N, K] = scales[g_idx] · (codes − zeros[g_idx]), one rounding."""
        qweight, qzeros, scales, g_idx = (self.raw(f"{module}.{p}").numpy() for p in _QUANTIZED)
        k, n = g_idx.shape[0], qweight.shape[1]
        groups = scales.shape[0]
        if (
            qweight.shape != (k * self.bits // 32, n) or qzeros.shape != (groups, n * self.bits // 32)
            or scales.shape != (groups, n) or (g_idx < 0).any() or (g_idx >= groups).any()
            or {qweight.dtype, qzeros.dtype, g_idx.dtype} != {np.dtype(np.int32)}
        ):  # fmt: skip
            raise FormatError(f"{self.path}: the tensors of {module} do not fit together; export again")
        codes = unpack(qweight, self.bits).T  # [N, K]
        zeros = unpack(np.ascontiguousarray(qzeros.T), self.bits).astype(np.int16) + self.zero_offset  # [N, G]
        self._refuse_mislabelled(module, zeros)
        steps = codes.astype(np.int16) - zeros[:, g_idx]
        return steps.astype(np.float32) * scales.T.astype(np.float32)[:, g_idx]

    def _refuse_mislabelled(self, module: str, zeros: np.ndarray) -> None:
        """Symmetric zero-points are all 2^(bits−1): off by one throughout means that v1 and v2 were confused."""
        off = zeros.astype(int) - 2 ** (self.bits - 1)
        if self.quantization.get("sym") and abs(off.flat[0]) == 1 and (off == off.flat[0]).all():
            other = {"v1": "v2", "v2": "v1"}[self.version]
            raise FormatError(
                f"{self.path}: {module}.qzeros are those of {other} but config.json says {self.version}; export again"
            )


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Every weight, decoded, by hub name: for a model that fits in memory (`GptqFolder.array` reads one at a time)."""
    folder = GptqFolder(path)
    return {name: folder.array(name) for name in folder.weight_names()}


def inspect(path: str | Path) -> Inspection:
    """What is in a folder (or in the folder of a safetensors file). Raises FormatError if it is not GPTQ."""
    path = Path(path)
    folder = GptqFolder(path if path.is_dir() else path.parent)
    rows = [TensorRow(t.name, t.shape, t.dtype, t.nbytes) for t in folder.tensors.values()]
    parts = [folder.tensors[f"{m}.{p}"] for m in folder.linears for p in _QUANTIZED if f"{m}.{p}" in folder.tensors]
    weights = sum(t.numel * 32 // folder.bits for t in parts if t.name.endswith(".qweight"))
    q = folder.quantization
    metadata = {k: _text(v) for k, v in q.items()} | {
        "architecture": _text(folder.config.get("architectures")).strip('[]"'),
        "model_type": folder.family.model_type,
        "quantized linears": str(len(folder.linears)),
        "files": ", ".join(sorted({t.file for t in folder.tensors.values()})),
    }
    bits = 8 * sum(t.nbytes for t in parts) / weights if weights else 0.0
    return Inspection(f"GPTQ {folder.version} safetensors", metadata, rows, bits)


def _text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
