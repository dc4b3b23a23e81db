"""Reads an artifact: the folder of integers and floats that every format is written from.

    artifact/
      manifest.json                    schema, source model with the hashes of its files, recipe,
                                       and for each quantized matrix its grid and metrics
      layer-00000.safetensors          a decoder layer's integers: the codes of each linear with
                                       the parameters of its grid, its bias, and the energy of its
                                       inputs. A quantized output head follows the last layer
      layer-outer.safetensors          a quantized embedding
      layer-vision.safetensors         the quantized linears of the vision tower and the projector
      float-00001.safetensors          every tensor that is not quantized, with the source's bytes
      float-changed-00000.safetensors  norms of a decoder layer that took a scale (awq, mbq,
                                       --smooth), in place of the source's
      timing.json                      seconds by phase and layer, tokens per second, peak memory
      source/                          config.json, tokenizer and processor files

Each file is written under a temporary name and renamed when it is whole. manifest.json comes last:
a folder that has one is complete, and a folder without one belongs to a run that can be resumed.
Codes are stored in the original column order with one byte each, because packing belongs to the
formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from vlmq_export.errors import ArtifactError, CheckpointError
from vlmq_export.quantizer.artifact.manifest import (
    MANIFEST,
    SCHEMA,
    Manifest,
    ModuleRecord,
    changed_file,
    layer_file,
    manifest_problems,
)
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.checkpoint import COMPANIONS
from vlmq_export.quantizer.storage.tensors import TensorInfo, read_infos, read_tensor
from vlmq_export.quantizer.storage.untrusted import contained, read_json


def read_layer_records(folder: Path, index: int) -> list[ModuleRecord]:
    """The records of one published layer, from the header of its file.

    Raises ArtifactError when the file is damaged.
    """
    file = folder / layer_file(index)
    try:
        with safe_open(file, framework="pt") as f:
            return [ModuleRecord(**r) for r in json.loads(f.metadata()["records"])]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise _damaged_layer(file, e) from None


def read_layer(folder: Path, index: int) -> list[Linear]:
    """The linears of one published layer, before there is a manifest.

    Raises ArtifactError when the file is damaged.
    """
    file = folder / layer_file(index)
    damage = CheckpointError, SafetensorError, EOFError, KeyError, TypeError, ValueError
    try:
        infos = read_infos(file)
        linears = [
            r.linear(lambda key: read_tensor(folder, infos[key]))
            for r in read_layer_records(folder, index)
        ]
        for linear in linears:
            if problem := linear.out_of_range():
                raise ValueError(f"{linear.name}: {problem}")
        return linears
    except (*damage, RuntimeError) as e:
        raise _damaged_layer(file, e) from None


def read_changed(folder: Path, index: int) -> dict[str, torch.Tensor]:
    """The floats of a published layer that took a scale, by hub name; none where there is no file.

    Raises ArtifactError when the file is damaged.
    """
    file = folder / changed_file(index)
    try:
        return load_file(file) if file.is_file() else {}
    except (SafetensorError, OSError, ValueError) as e:
        raise _damaged_layer(file, e) from None


def _damaged_layer(file: Path, reason: Exception) -> ArtifactError:
    """The error for a layer's file that cannot be used."""
    return ArtifactError(
        f"{file}: damaged ({reason}); delete it and resume to solve this layer again"
    )


class Artifact:
    """A whole artifact. A tensor is read when it is asked for.

    Raises ArtifactError when something is missing or does not fit together.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            raise ArtifactError(
                f"{path}: no {MANIFEST}; not an artifact,"
                " or one whose run was stopped (try --resume)"
            )
        _refuse_strangers(self.path)
        raw = read_json(manifest, error=ArtifactError)
        if raw.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{manifest}: schema {raw.get('schema')},"
                f" this version reads {SCHEMA}; quantize again"
            )
        try:
            raw["modules"] = [ModuleRecord(**m) for m in raw["modules"]]
            self.manifest = Manifest(**raw)
            self.config = QuantConfig(**self.manifest.config)
        except (KeyError, TypeError) as e:
            raise ArtifactError(f"{manifest}: damaged ({e!r}); quantize again") from None
        if problems := manifest_problems(self.manifest, self.config):
            raise ArtifactError(f"{manifest}: damaged ({'; '.join(problems[:4])}); quantize again")
        self.records = {m.name: m for m in self.manifest.modules}  # by hub name
        self._where, self._floats = self._index()

    def _index(self) -> tuple[dict[str, TensorInfo], list[TensorInfo]]:
        """Where each tensor is, by its name, and the tensors of the float files."""
        layers = sorted({m.layer for m in self.manifest.modules})
        files = [self.path / layer_file(i) for i in layers]
        missing = [f.name for f in files if not f.is_file()]
        float_files = sorted(self.path.glob("float-*.safetensors"))
        if missing or not float_files:
            raise ArtifactError(
                f"{self.path}: incomplete, {', '.join(missing[:8]) or 'float tensors'} missing"
            )
        where: dict[str, TensorInfo] = {}
        floats: list[TensorInfo] = []
        expected = self._expected()
        for file in [*files, *float_files]:
            infos = _infos(file)
            if twice := where.keys() & infos.keys():
                raise ArtifactError(
                    f"{self.path}: tensor {min(twice)} is in two files; quantize again"
                )
            where |= infos
            if file.name.startswith("float-"):
                floats += infos.values()
            for name, info in infos.items():
                found, want = (info.dtype, info.shape), expected.pop(name, None)
                if found != want and (want or file.name.startswith("layer-")):
                    raise ArtifactError(
                        f"{file}: {name} is {found}, the manifest says {want}; quantize again"
                    )
        if expected:
            raise ArtifactError(
                f"{self.path}: {len(expected)} tensors of the manifest missing,"
                f" first {min(expected)}; quantize again"
            )
        return where, floats

    def _expected(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor of the layer files: its dtype and shape, as the manifest has them."""
        return {
            f"{m.name}.{part}": held
            for m in self.manifest.modules
            for part, held in m.stored().items()
        }

    @property
    def source(self) -> Path:
        """The folder with the source's config.json, tokenizer and processor files."""
        return self.path / "source"

    @property
    def companions(self) -> list[Path]:
        """Tokenizer and processor files of the source."""
        return [self.source / n for n in COMPANIONS if (self.source / n).is_file()]

    @cached_property
    def source_config(self) -> dict:
        """The source's config.json. Raises ArtifactError where it is no JSON object."""
        return read_json(self.source / "config.json", error=ArtifactError)

    @cached_property
    def architecture(self) -> Architecture:
        """What the source's config.json says. Raises CheckpointError for an unknown model."""
        return Architecture.of(self.source_config)

    def _read(self, key: str) -> torch.Tensor:
        """The tensor that is stored under this name."""
        try:
            return read_tensor(self.path, self._where[key])
        except (KeyError, EOFError, OSError) as e:
            raise ArtifactError(
                f"{self.path}: cannot read {key} ({e}); the artifact is damaged"
            ) from None

    def linear_names(self) -> list[str]:
        """Hub names of the quantized modules, in layer order."""
        return list(self.records)

    def linear(self, name: str) -> Linear:
        """A quantized module by its hub name. Raises ArtifactError for values outside its grid."""
        linear = self.records[name].linear(self._read)
        if problem := linear.out_of_range():
            file = self.path / self._where[f"{name}.codes"].file
            raise ArtifactError(f"{file}: {name}: {problem}; the artifact is damaged")
        return linear

    def linears(self) -> Iterator[Linear]:
        """The quantized modules in layer order, one at a time."""
        return (self.linear(name) for name in self.linear_names())

    def float_names(self) -> list[str]:
        """Hub names of all tensors but the weights and biases of quantized modules."""
        return [t.name for t in self._floats]

    def float_info(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(hub name, shape, dtype in safetensors' spelling) of the same tensors."""
        return ((t.name, t.shape, t.dtype) for t in self._floats)

    def float_tensor(self, name: str) -> torch.Tensor:
        """One of these tensors, in the source's dtype and with its bytes."""
        return self._read(name)


def _infos(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by their names. Raises ArtifactError where its header is damaged."""
    try:
        return read_infos(file)
    except CheckpointError as e:
        raise ArtifactError(f"{file.parent}: {e}") from None


def _refuse_strangers(folder: Path) -> None:
    """Raises ArtifactError for a link that leads out of the folder, and for an unknown source file.

    An artifact is copied whole into an output folder, and its source/ into every export. A link
    could bring somebody's own files there, and a file could take the place of one that we write.
    """
    for file in folder.rglob("*"):
        if file.is_symlink():
            try:
                contained(folder, file.relative_to(folder).as_posix())
            except ValueError as e:
                raise ArtifactError(f"{folder}: {e}") from None
    source = folder / "source"
    if not (source / "config.json").is_file():
        raise ArtifactError(f"{folder}: source/config.json is missing; quantize again")
    if strange := sorted({p.name for p in source.iterdir()} - {"config.json", *COMPANIONS}):
        raise ArtifactError(f"{source}: {strange[0]} does not belong there; delete it")
