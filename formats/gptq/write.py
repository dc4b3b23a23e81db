"""Artifact → a GPTQ folder. One tensor is in memory at a time, whatever the size of the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions, ModelPlan, TensorSpec
from vlmq_export.formats.gptq.layout import Entry, check_uniform, entries, notes, plan, quantization_config, renamer
from vlmq_export.formats.gptq.packing import pack_codes, pack_zeros
from vlmq_export.quantizer.artifact import Artifact, QuantizedLinear, write_atomic, write_json
from vlmq_export.quantizer.tensor_file import write_tensors

INDEX = "model.safetensors.index.json"


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write the whole VLM into an empty folder; returns notes for log and card.

    Raises FormatError before anything is written when the artifact cannot be a GPTQ file, and at the linear that is
    damaged when its values cannot be packed.
    """
    model = _model_plan(artifact)
    if refusals := plan(model, options).refusals:
        raise FormatError(refusals[0])
    check_uniform(artifact.manifest.modules, artifact.config)
    table = {
        e.name: e for e in entries(model.linears, model.floats, model.config, renamer(model.source_config, options))
    }
    split = split_state_dict_into_shards_factory(
        table, get_storage_size=lambda e: e.nbytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=options.gptq_shard_bytes,
    )  # fmt: skip
    tensors = _Tensors(artifact, options.gptq_version)
    for file, names in split.filename_to_tensors.items():
        shard = [table[name] for name in names]
        write_atomic(folder / file, lambda path, shard=shard: write_tensors(path, shard, tensors.get, {"format": "pt"}))
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": weight_map})
    for file in sorted(artifact.source.iterdir()):
        if file.name != "config.json":
            write_atomic(folder / file.name, lambda path, file=file: shutil.copyfile(file, path))
    quantization = quantization_config(artifact.config, options.gptq_version, tensors.permuted)
    write_json(folder / "quantize_config.json", quantization)
    write_json(folder / "config.json", artifact.source_config | {"quantization_config": quantization})
    return notes(model, options)


def _model_plan(artifact: Artifact) -> ModelPlan:
    m = artifact.manifest
    floats = [TensorSpec(*info) for info in artifact.float_info()]
    return ModelPlan(m.name, m.model_type, artifact.source_config, m.modules, floats, artifact.config)


class _Tensors:
    """Entry → tensor. Holds one packed linear; remembers whether any g_idx was permuted."""

    def __init__(self, artifact: Artifact, version: str):
        self.artifact, self.version = artifact, version
        self.permuted = False
        self._name = ""
        self._parts: dict[str, torch.Tensor] = {}

    def get(self, entry: Entry) -> torch.Tensor:
        """Raises FormatError when it is not as planned."""
        value = self._part(entry) if entry.part else self.artifact.float_tensor(entry.source)
        if tuple(value.shape) != entry.shape or value.nbytes != entry.nbytes:
            raise FormatError(
                f"{entry.source}: {tuple(value.shape)} where {entry.shape} was planned; the artifact is damaged"
            )
        return value

    def _part(self, entry: Entry) -> torch.Tensor:
        if entry.source != self._name:
            linear = self.artifact.linear(entry.source)
            check_linear(linear, self.version)
            self._name, self._parts = entry.source, pack_linear(linear, self.version)
            self.permuted |= not linear.natural_order
        return self._parts[entry.part]


def pack_linear(q: QuantizedLinear, version: str) -> dict[str, torch.Tensor]:
    """The tensors of one linear as they lie in the file."""
    parts = {
        "qweight": pack_codes(q.codes, q.bits),
        "qzeros": pack_zeros(q.zero_points, q.bits, version),
        "scales": q.scales.half().T.contiguous(),
        "g_idx": q.g_idx.int(),
    }
    return parts | ({} if q.bias is None else {"bias": q.bias.half()})


def check_linear(q: QuantizedLinear, version: str) -> None:
    """Raises FormatError for values inside the grid that no reader, or not every reader, would decode as we do."""
    middle = 2 ** (q.bits - 1)
    if q.symmetric and bool((wrong := q.zero_points != middle).any()):
        raise FormatError(
            f"{q.name}: {int(wrong.sum())} zero-points other than the symmetric {middle}; the artifact is damaged, "
            "quantize again"
        )
    if version == "v1" and bool((q.zero_points == 0).any()):  # stored as z − 1: each reader makes something else of −1
        raise FormatError(
            f"{q.name}: a zero-point of 0 cannot be written in GPTQ v1; use --gptq-version v2 or quantize again"
        )
