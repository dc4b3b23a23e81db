"""A source checkpoint on disk, read one tensor at a time.

Only safetensors are read, headers are checked against file sizes before anything else, and a shard path that leaves
the folder is refused (transformers follows `../` in the index; we do not). Tensors are read into memory of their own,
not mapped: what was read and dropped no longer counts, whatever the size of the shard.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from vlmq_export.errors import CheckpointError, VlmqError
from vlmq_export.quantizer.families import FAMILIES
from vlmq_export.quantizer.untrusted import contained, parse_object, read_json

log = logging.getLogger("vlmq_export")
HEADER_CAP = 100 * 2**20  # the safetensors format's own cap
_PROBLEMS_SHOWN = 8
_ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
              "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}  # fmt: skip
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip
_CHUNK = 2**24  # elements looked at together
# What runs beside the weights: copied as they are into every export.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja", "LICENSE", "LICENSE.txt",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header states it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: BF16, F32, ...
    file: str
    offset: int = 0  # of its first byte in the file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * _ITEM_BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, dict]:
    """The JSON header of one safetensors file, checked against the file's size."""
    return _read_header(path)[0]


def read_infos(path: Path) -> dict[str, TensorInfo]:
    """name → TensorInfo of one safetensors file. Raises CheckpointError as `read_header` does."""
    header, start = _read_header(path)
    return {
        name: TensorInfo(name, tuple(i["shape"]), i["dtype"], path.name, start + i["data_offsets"][0])
        for name, i in header.items()
    }


def read_tensor(folder: Path, info: TensorInfo, rows: Sequence[int] | None = None) -> torch.Tensor:
    """A tensor in its source dtype, or some rows of it. Raises OSError, or EOFError where the file ends too early."""
    shape = info.shape if rows is None else (len(rows), *info.shape[1:])
    value = torch.empty(shape, dtype=DTYPES[info.dtype])
    data = memoryview(value.view(-1).view(torch.uint8).numpy()) if value.numel() else memoryview(b"")
    pieces = [(0, len(data))] if rows is None else [(row, len(data) // len(rows)) for row in rows]
    done = 0
    with (folder / info.file).open("rb", buffering=0) as f:
        for row, size in pieces:
            f.seek(info.offset + row * size)
            stop = done + size
            while done < stop:  # one read gives at most 2 GiB
                got = f.readinto(data[done:stop])
                if not got:
                    raise EOFError(f"{info.file} ends before {info.name} does")
                done += got
    return value


def count_non_finite(value: torch.Tensor) -> int:
    """NaN and infinite values of a tensor, looked at in parts so that no mask of its size is made."""
    if not value.is_floating_point():
        return 0
    parts = value.reshape(-1).split(_CHUNK)
    return sum(int((~torch.isfinite(p.float() if p.element_size() == 1 else p)).sum()) for p in parts)


def _read_header(path: Path) -> tuple[dict[str, dict], int]:
    """The header and where the data begins: every entry checked, the data as long as it says, without gap or overlap.

    Raises CheckpointError naming file and byte when the header is damaged or the data is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path.name}: {size} bytes is too short for a safetensors file; copy it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(HEADER_CAP, size - 8):
            raise CheckpointError(f"{path.name}: header of {length} bytes does not fit the file; copy it again")
        header = parse_object(f.read(length), f"{path.name}: header")
    header.pop("__metadata__", None)
    spans = sorted((*_span(path, name, info), name) for name, info in header.items())
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise CheckpointError(f"{path.name}: damaged, tensor {name} at byte {begin} {what}; copy it again")
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path.name}: truncated or damaged, {size} bytes where the header asks for {8 + length + end}; copy it again"
        )
    return header, 8 + length


def _span(path: Path, name: str, info: object) -> tuple[int, int]:
    """First byte and end of a tensor's data. Raises CheckpointError for an entry that states no possible tensor."""
    entry = info if isinstance(info, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise CheckpointError(f"{path.name}: tensor {name} has dtype {dtype}, which is not supported")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path.name}: tensor {name} has shape {shape} at bytes {offsets}; copy it again")
    begin, stop = offsets
    if (stop - begin) * 8 != math.prod(shape) * _ITEM_BITS[dtype]:
        raise CheckpointError(f"{path.name}: tensor {name} has {stop - begin} bytes for shape {shape}; copy it again")
    return begin, stop


def _naturals(value: object) -> bool:
    """A short list of integers that a file offset can hold."""
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in value)


class Checkpoint:
    """A local model folder in the hub's layout: config.json, safetensors (sharded or not), tokenizer, processor."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path}: no such model folder")
        if not (self.path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json in this folder; give a folder in the Hugging Face layout")
        self.config: dict = read_json(self._contained("config.json"))
        self._refuse_quantized()
        if (self.path / "adapter_config.json").is_file():  # transformers would load the model that it names instead
            raise CheckpointError(f"{path}: holds an adapter (adapter_config.json); merge it into the model first")
        self.tensors: dict[str, TensorInfo] = self._hub_names(self._index())

    def _refuse_quantized(self) -> None:
        if "quantization_config" in self.config:
            settings = self.config["quantization_config"]
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
            raise CheckpointError(f"{self.path}: already quantized ({method}); give the original float checkpoint")

    def _contained(self, name: str) -> Path:
        try:
            return contained(self.path, name)
        except ValueError as e:
            raise CheckpointError(f"{self.path}: {e}") from None

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    def _index(self) -> dict[str, TensorInfo]:
        """name → TensorInfo over all shards; every problem of the shard set is reported at once."""
        index_path = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        expected: dict[str, str] | None = None
        if index_path.is_file():
            expected = weight_map(index_path)
            files = sorted(set(expected.values()))
            if single.is_file() and single.name not in files:  # transformers would read that one
                raise CheckpointError(f"{self.path}: {single.name} and {index_path.name} are both here; delete one")
        elif single.is_file():
            files = [single.name]
        elif any(self.path.glob("*.bin")) or any(self.path.glob("*.pt")):
            raise CheckpointError(f"{self.path}: only pickled weights here; convert to safetensors, we never unpickle")
        else:
            raise CheckpointError(f"{self.path}: no model.safetensors and no model.safetensors.index.json")
        problems, tensors = [], {}
        for file in files:
            try:
                shard = contained(self.path, file)
                infos = read_infos(shard) if shard.is_file() else None
            except (CheckpointError, ValueError) as e:
                problems.append(str(e))
                continue
            if infos is None:
                problems.append(f"shard {file} is missing")
                continue
            for name, info in infos.items():
                if name in tensors:
                    problems.append(f"tensor {name} is in both {tensors[name].file} and {file}")
                tensors[name] = replace(info, file=file)
        if expected and not problems:
            absent = sorted(n for n, f in expected.items() if n not in tensors or tensors[n].file != f)
            if absent:
                problems.append(f"{len(absent)} tensors of the index are not in their shard, first {absent[0]}")
            if unlisted := sorted(tensors.keys() - expected.keys()):
                problems.append(f"{len(unlisted)} tensors of the shards are not in the index, first {unlisted[0]}")
        if problems:
            more = f" (and {len(problems) - _PROBLEMS_SHOWN} more)" if len(problems) > _PROBLEMS_SHOWN else ""
            raise CheckpointError(f"{self.path}: " + "; ".join(problems[:_PROBLEMS_SHOWN]) + more)
        if extra := sorted(p.name for p in self.path.glob("*.safetensors") if p.name not in files):
            log.warning("%s: not in the index and not read: %s", self.path.name, ", ".join(extra[:_PROBLEMS_SHOWN]))
        return tensors

    def _hub_names(self, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The same by the names the family was published with, whichever version of transformers saved the files."""
        family = FAMILIES.get(self.model_type)
        if family is None:
            return tensors
        named = {family.hub_name(name): replace(t, name=family.hub_name(name)) for name, t in tensors.items()}
        if len(named) < len(tensors):
            seen: set[str] = set()
            twice = next(n for n in tensors if (hub := family.hub_name(n)) in seen or seen.add(hub))
            raise CheckpointError(f"{self.path}: tensor {twice} is there under two names; keep one of them")
        return named

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor. Raises CheckpointError naming it if it is missing."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing; the model type or the folder is not what it says"
            )
        return self.tensors[name]

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """One tensor, or some of its rows, in its source dtype.

        Raises CheckpointError naming it if it is missing, cannot be read or is not finite.
        """
        info = self.info(name)
        try:
            value = read_tensor(self.path, info, rows)
        except (OSError, EOFError) as e:
            raise CheckpointError(f"{info.file}: cannot read {name} ({e}); copy the file again") from None
        if bad := count_non_finite(value):
            raise CheckpointError(f"{info.file}: {name} has {bad} NaN or infinite values; this checkpoint is damaged")
        return value

    def write_config(self, target: Path) -> None:
        """config.json of what `tensor` gives."""
        shutil.copyfile(self.path / "config.json", target)

    @cached_property
    def companions(self) -> list[Path]:
        return [self._contained(n) for n in COMPANIONS if (self.path / n).is_file()]

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        files = ["config.json", *sorted({t.file for t in self.tensors.values()})]
        return {name: sha256_file(self.path / name) for name in files}

    def fingerprint(self) -> dict[str, str]:
        """file → SHA-256 of config.json and of every weight file: the identity that a resumed run must share."""
        return self._fingerprint


def weight_map(index: Path, error: type[VlmqError] = CheckpointError) -> dict[str, str]:
    """tensor → shard as the index says. Raises `error` where it does not say so."""
    found = read_json(index, error=error).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise error(f"{index}: no weight_map from tensor names to file names; copy it again")
    return found


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
