"""Writes an artifact as a GPTQ folder. One linear, or one float tensor, is in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.layout import (
    Entry,
    check_uniform,
    entries,
    quantization_config,
    renamer,
)
from vlmq_export.formats.gptq.packing import pack_codes, pack_zeros
from vlmq_export.formats.gptq.plan import notes, plan
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.storage.tensors import write_tensors
from vlmq_export.quantizer.storage.whole_files import write_atomic, write_json

INDEX = "model.safetensors.index.json"


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write the whole VLM into an empty folder. Returns notes for log and card.

    Raises FormatError before anything is written if the artifact cannot be a GPTQ folder, and at
    the linear whose values cannot be packed.
    """
    model = artifact_plan(artifact)
    if refusals := plan(model, options).refusals:
        raise FormatError(refusals[0])
    check_uniform(artifact.manifest.modules, artifact.config)
    rename = renamer(model.architecture, options)
    table = {e.name: e for e in entries(model.linears, model.floats, model.config, rename)}
    split = split_state_dict_into_shards_factory(
        table,
        get_storage_size=lambda e: e.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=options.gptq_shard_bytes,
    )
    shards = {
        file: [table[name] for name in names] for file, names in split.filename_to_tensors.items()
    }
    permuted = write_shards(artifact, folder, shards, options.gptq_version)
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": weight_map})
    for file in sorted(artifact.source.iterdir()):
        if file.name != "config.json":
            write_atomic(folder / file.name, lambda path, file=file: shutil.copyfile(file, path))
    quantization = quantization_config(
        artifact.config, options.gptq_version, permuted, artifact.architecture
    )
    write_json(folder / "quantize_config.json", quantization)
    config = artifact.source_config | {"quantization_config": quantization}
    write_json(folder / "config.json", config)
    return notes(model, options)


def write_shards(
    artifact: Artifact, folder: Path, shards: Mapping[str, Sequence[Entry]], version: str
) -> bool:
    """Write every shard. Returns whether the g_idx of some linear is permuted.

    Raises FormatError at a tensor that is not as planned.
    """
    permuted: set[str] = set()

    # The parts of a linear follow each other, also from one shard to the next.
    @lru_cache(maxsize=1)
    def packed(name: str) -> dict[str, torch.Tensor]:
        linear = artifact.linear(name)
        assert isinstance(linear, QuantizedLinear), f"{name} is on a block type, which is GGUF's"
        check_linear(linear, version)
        if not linear.solution.natural_order:
            permuted.add(name)
        return pack_linear(linear, version)

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
    return bool(permuted)


def pack_linear(linear: QuantizedLinear, version: str) -> dict[str, torch.Tensor]:
    """The tensors of one linear as they lie in the file, by the name of the part."""
    solution = linear.solution
    parts = {
        "qweight": pack_codes(solution.codes, linear.bits),
        "qzeros": pack_zeros(solution.zero_points, linear.bits, version),
        "scales": solution.scales.half().T.contiguous(),
        "g_idx": solution.g_idx.int(),
    }
    return parts | ({} if linear.bias is None else {"bias": linear.bias.half()})


def check_linear(linear: QuantizedLinear, version: str) -> None:
    """Raises FormatError for values of the grid that not every reader would decode as we do."""
    zeros, middle = linear.solution.zero_points, 2 ** (linear.bits - 1)
    if linear.symmetric and bool((wrong := zeros != middle).any()):
        raise FormatError(
            f"{linear.name}: {int(wrong.sum())} zero-points other than the symmetric {middle};"
            " the artifact is damaged, quantize again"
        )
    # v1 stores the zero-point minus one, and each reader makes something else of −1.
    if version == "v1" and bool((zeros == 0).any()):
        raise FormatError(
            f"{linear.name}: a zero-point of 0 cannot be written in GPTQ v1;"
            " use --gptq-version v2 or quantize again"
        )
