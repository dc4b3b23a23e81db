"""A source checkpoint on disk, read one tensor at a time.

Only safetensors are read, headers are checked against file sizes before anything else, and a shard path that leaves
the folder is refused (transformers follows `../` in the index; we do not).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.families import FAMILIES

HEADER_CAP = 100 * 2**20  # the safetensors format's own cap
_ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
              "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}  # fmt: skip
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
    stored: str = ""  # its name in the file, where that is not the hub's

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * _ITEM_BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, dict]:
    """The JSON header of one safetensors file, checked against the file's size.

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
        try:
            header = json.loads(f.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
            raise CheckpointError(f"{path.name}: header is not JSON ({e}); copy it again") from None
    header.pop("__metadata__", None)
    end = 0
    for name, info in header.items():
        if info.get("dtype") not in _ITEM_BITS:
            raise CheckpointError(f"{path.name}: tensor {name} has dtype {info.get('dtype')}, which is not supported")
        begin, stop = info["data_offsets"]
        if (stop - begin) * 8 != math.prod(info["shape"]) * _ITEM_BITS[info["dtype"]]:
            raise CheckpointError(f"{path.name}: tensor {name} has {stop - begin} bytes for shape {info['shape']}")
        end = max(end, stop)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path.name}: truncated or damaged, {size} bytes where the header asks for {8 + length + end}; copy it again"
        )
    return header


class Checkpoint:
    """A local model folder in the hub's layout: config.json, safetensors (sharded or not), tokenizer, processor."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path}: no such model folder")
        config = self.path / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{path}: no config.json in this folder; give a folder in the Hugging Face layout")
        try:
            self.config: dict = json.loads(config.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise CheckpointError(f"{config}: not valid JSON ({e})") from None
        if "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method", "unknown")
            raise CheckpointError(f"{path}: already quantized ({method}); give the original float checkpoint")
        self.tensors: dict[str, TensorInfo] = self._hub_names(self._index())

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    def _index(self) -> dict[str, TensorInfo]:
        """name → TensorInfo over all shards; every problem of the shard set is reported at once."""
        index_path = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        expected: dict[str, str] | None = None
        if index_path.is_file():
            expected = json.loads(index_path.read_text("utf-8"))["weight_map"]
            files = sorted(set(expected.values()))
        elif single.is_file():
            files = [single.name]
        elif any(self.path.glob("*.bin")) or any(self.path.glob("*.pt")):
            raise CheckpointError(f"{self.path}: only pickled weights here; convert to safetensors, we never unpickle")
        else:
            raise CheckpointError(f"{self.path}: no model.safetensors and no model.safetensors.index.json")
        root = self.path.resolve()
        problems, tensors = [], {}
        for file in files:
            shard = self.path / file
            if Path(file).is_absolute() or not (root / file).parent.resolve().is_relative_to(root):
                problems.append(f"{index_path.name} names {file}, which is outside the folder")
            elif not shard.is_file():
                problems.append(f"shard {file} is missing")
            else:
                for name, info in read_header(shard).items():
                    if name in tensors:
                        problems.append(f"tensor {name} is in both {tensors[name].file} and {file}")
                    tensors[name] = TensorInfo(name, tuple(info["shape"]), info["dtype"], file)
        if expected and not problems:
            absent = sorted(n for n, f in expected.items() if n not in tensors or tensors[n].file != f)
            if absent:
                problems.append(f"{len(absent)} tensors of the index are not in their shard, first {absent[0]}")
        if problems:
            raise CheckpointError(f"{self.path}: " + "; ".join(problems))
        return tensors

    def _hub_names(self, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The same by the names the family was published with, whichever version of transformers saved the files."""
        family = FAMILIES.get(self.model_type)
        if family is None:
            return tensors
        named = {
            family.hub_name(name): replace(t, name=family.hub_name(name), stored=name) for name, t in tensors.items()
        }
        if len(named) < len(tensors):
            twice = next(n for n, t in tensors.items() if named[family.hub_name(n)].stored != n)
            raise CheckpointError(f"{self.path}: tensor {twice} is there under two names; keep one of them")
        return named

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor. Raises CheckpointError naming it if it is missing."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing; the model type or the folder is not what it says"
            )
        return self.tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in its source dtype. Raises CheckpointError naming it if it is missing or not finite."""
        info = self.info(name)
        try:
            with safe_open(self.path / info.file, framework="pt") as f:
                value = f.get_tensor(info.stored or name)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{info.file}: cannot read {name} ({e}); copy the file again") from None
        if (
            value.is_floating_point()
            and not torch.isfinite(value.float() if value.element_size() == 1 else value).all()
        ):
            bad = int((~torch.isfinite(value)).sum())
            raise CheckpointError(f"{info.file}: {name} has {bad} NaN or infinite values; this checkpoint is damaged")
        return value

    @cached_property
    def companions(self) -> list[Path]:
        return [self.path / n for n in COMPANIONS if (self.path / n).is_file()]

    def fingerprint(self) -> dict[str, str]:
        """file → SHA-256 of config.json and of every weight file: the identity that a resumed run must share."""
        files = ["config.json", *sorted({t.file for t in self.tensors.values()})]
        return {name: sha256_file(self.path / name) for name in files}


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
