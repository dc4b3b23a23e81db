"""Writes the files of an artifact. Each appears under its own name only when it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlmq_export.quantizer.artifact.manifest import (
    MANIFEST,
    Manifest,
    ModuleRecord,
    changed_file,
    layer_file,
)
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.model.architecture import untied_config
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.storage.tensors import write_tensors
from vlmq_export.quantizer.storage.whole_files import write_atomic, write_json

_FLOAT_SHARD_BYTES = 2 * 2**30


def write_layer(
    folder: Path, index: int, linears: Iterable[Linear], records: Iterable[ModuleRecord]
) -> None:
    """Write the matrices of one layer.

    The records are in the header, so that a resumed run finds all that it needs in the one file.
    """
    tensors: dict[str, torch.Tensor] = {}
    for linear in linears:
        tensors |= {f"{linear.name}.{part}": value for part, value in linear.tensors().items()}
        if linear.bias is not None:
            tensors[f"{linear.name}.bias"] = linear.bias
    tensors = _plain(tensors)
    metadata = {"records": json.dumps([asdict(r) for r in records])}
    write_atomic(folder / layer_file(index), lambda t: save_file(tensors, t, metadata=metadata))


def write_changed(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write the norms of a decoder layer that took a scale.

    This comes before the layer's integers, which fit no other norms.
    """
    tensors = _plain(tensors)
    write_atomic(folder / changed_file(index), lambda t: save_file(tensors, t))


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the order of their names, each with memory of its own on the CPU."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in sorted(tensors.items())}


def write_floats(folder: Path, checkpoint: Checkpoint, names: list[str]) -> None:
    """Copy every tensor that is not quantized, in its source dtype, in shards of about 2 GiB.

    A shard that is there already is kept. One tensor is in memory at a time. Wide types come first
    in a shard, so that every tensor is aligned to its own width.
    """
    for i, shard in enumerate(_shards(checkpoint, names), start=1):
        file = folder / f"float-{i:05d}.safetensors"
        if file.is_file():
            continue  # left by a stopped run; files are renamed only when they are whole
        infos = [checkpoint.tensors[name] for name in shard]
        infos.sort(key=lambda t: (-t.nbytes // max(1, t.numel), t.name))
        write_atomic(
            file,
            lambda t, infos=infos: write_tensors(
                t, infos, lambda info: checkpoint.tensor(info.name)
            ),
        )


def _shards(checkpoint: Checkpoint, names: list[str]) -> list[list[str]]:
    """The names, cut where a file would become larger than a shard may be."""
    shards: list[list[str]] = [[]]
    room = _FLOAT_SHARD_BYTES
    for name in names:
        size = checkpoint.tensors[name].nbytes
        if shards[-1] and size > room:
            shards.append([])
            room = _FLOAT_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def write_source(folder: Path, checkpoint: Checkpoint, *, own_head: bool = False) -> None:
    """Write config.json, tokenizer and processor files into source/.

    own_head: the output matrix is no longer shared with the embedding, and config.json says so.
    """
    target = folder / "source"
    target.mkdir(parents=True, exist_ok=True)
    checkpoint.write_config(target / "config.json")
    for file in checkpoint.companions:
        shutil.copyfile(file, target / file.name)
    config = untied_config(checkpoint.written_config)
    if own_head and config != checkpoint.written_config:
        write_json(target / "config.json", config)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, which makes the folder a whole artifact.

    A model that is from no repository has no keys for one, as in earlier versions.
    """
    absent = [key for key in ("repository", "revision") if not getattr(manifest, key)]
    write_json(folder / MANIFEST, {k: v for k, v in asdict(manifest).items() if k not in absent})
