"""Writes a folder that transformers loads. One tensor, or one linear, is in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from vlmq_export.errors import FormatError
from vlmq_export.formats.model_plan import ModelPlan, TensorSpec
from vlmq_export.quantizer.artifact.manifest import VISION, ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.storage.tensors import TensorInfo, write_tensors
from vlmq_export.quantizer.storage.whole_files import write_atomic, write_json

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of the folder: a part of a quantized linear, or a float tensor as it is."""

    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling
    source: str  # hub name of the linear, or of the float tensor
    part: str = ""  # the part of the linear, or its bias; empty for a float tensor

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return TensorInfo(self.name, self.shape, self.dtype, "").nbytes


def float_entries(floats: Iterable[TensorSpec], rename: Callable[[str], str] = str) -> list[Entry]:
    """The float tensors by item size, the widest first, so that each of them is aligned.

    rename: hub tensor name → name in the file.
    """
    plain = [Entry(rename(t.name), t.shape, t.dtype, t.name) for t in floats]
    return sorted(plain, key=lambda e: -TensorInfo("", (1,), e.dtype, "").nbytes)


def bits_per_weight(model: ModelPlan, table: Iterable[Entry]) -> float:
    """Bits that a quantized weight takes, with everything but biases. The tower does not count."""
    names = {linear.name for linear in model.linears}
    packed = sum(e.nbytes for e in table if e.part not in ("", "bias") and e.source in names)
    return 8 * packed / sum(s.out_features * s.in_features for s in model.linears)


def write_folder(
    artifact: Artifact,
    folder: Path,
    table: Iterable[Entry],
    pack: Callable[[QuantizedLinear], Mapping[str, torch.Tensor]],  # its parts by their names
    shard_bytes: int,
) -> None:
    """Write every tensor, the index of several shards, and the source's files but config.json.

    Raises FormatError at a tensor that is not as planned, and what `pack` raises.
    """
    by_name = {e.name: e for e in table}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda e: e.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    shards = {f: [by_name[n] for n in names] for f, names in split.filename_to_tensors.items()}
    write_shards(artifact, folder, shards, pack)
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": weight_map})
    for file in sorted(artifact.source.iterdir()):
        if file.name != "config.json":
            write_atomic(folder / file.name, lambda path, file=file: shutil.copyfile(file, path))


def write_shards(
    artifact: Artifact,
    folder: Path,
    shards: Mapping[str, Sequence[Entry]],
    pack: Callable[[QuantizedLinear], Mapping[str, torch.Tensor]],
) -> None:
    """Write every shard. Raises FormatError at a tensor that is not as planned."""

    # The parts of a linear follow each other, also from one shard to the next.
    @lru_cache(maxsize=1)
    def packed(name: str) -> Mapping[str, torch.Tensor]:
        linear = artifact.linear(name)
        assert isinstance(linear, QuantizedLinear), f"{name} is on a block type, which is GGUF's"
        check_symmetric(linear)
        bias = {} if linear.bias is None else {"bias": linear.bias.half()}
        return {**pack(linear), **bias}

    def read(entry: Entry) -> torch.Tensor:
        if entry.part:
            value = packed(entry.source)[entry.part]
        else:
            value = artifact.float_tensor(entry.source)
        if tuple(value.shape) != entry.shape or value.nbytes != entry.nbytes:
            raise FormatError(
                f"{entry.source}: {tuple(value.shape)} where {entry.shape} was planned;"
                " the artifact is damaged"
            )
        return value

    for file, shard in shards.items():
        write_atomic(
            folder / file,
            lambda path, shard=shard: write_tensors(path, shard, read, {"format": "pt"}),
        )


def check_symmetric(linear: QuantizedLinear) -> None:
    """Raises FormatError for a symmetric grid with zero-points that it does not have."""
    zeros, middle = linear.solution.zero_points, 2 ** (linear.bits - 1)
    if linear.symmetric and bool((wrong := zeros != middle).any()):
        raise FormatError(
            f"{linear.name}: {int(wrong.sum())} zero-points other than the symmetric {middle};"
            " the artifact is damaged, quantize again"
        )


def check_uniform(records: Iterable[ModuleRecord], config: QuantConfig) -> None:
    """Raises FormatError for a linear on another grid than `config` has for it.

    transformers reads the grid from config.json, and not from the tensors.
    """
    for r in records:
        own = config.vision if r.layer == VISION else config.of(r.name)
        if (r.bits, r.group_size, r.symmetric) != (own.bits, own.group_size, own.symmetric):
            raise FormatError(
                f"{r.name}: its grid differs from the artifact's own, which config.json states for"
                " all of them; quantize again"
            )


def embedding_refusals(config: QuantConfig, format: str) -> list[str]:
    """A line where the embedding is quantized. `format` is the name of the folder's format."""
    if not config.embedding_bits:
        return []
    return [
        f"--embedding-bits {config.embedding_bits}: transformers reads quantized linears, and the"
        f" embedding in floats; leave out --format {format}, or quantize with --embedding-bits off"
    ]


def group_refusals(model: ModelPlan) -> list[str]:
    """A line where the columns of some linear do not fill groups."""
    size = model.config.group_size
    bad = [s for s in model.linears if size > 0 and s.in_features % size]
    if not bad:
        return []
    return [
        f"--group-size {size} does not divide in_features {bad[0].in_features} of"
        f" {bad[0].name}; choose a divisor or -1"
    ]
