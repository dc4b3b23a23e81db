"""What is known of a run before any weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vlmq_export.errors import CheckpointError, FormatError
from vlmq_export.quantizer.artifact.manifest import VISION
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import TOWER, VISION_GROUP, QuantConfig
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import Family
from vlmq_export.quantizer.storage.tensors import DTYPES
from vlmq_export.quantizer.vision.stage import tower_names

# The parts of a model whose sizes a plan tells apart. Metadata is all that is no weight.
PARTS: tuple[str, ...] = ("text", "embedding", "head", "vision", "metadata")


@dataclass(frozen=True)
class LinearSpec:
    """A linear that is to be quantized."""

    name: str  # hub name of the module
    out_features: int
    in_features: int
    bias: bool
    # Of the source's weight, in safetensors' spelling; empty where it is not known.
    dtype: str = field(default="", compare=False)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that stays as it is."""

    name: str  # hub name
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelPlan:
    """A model and a recipe for it, from its settings and the headers of its files alone."""

    name: str
    architecture: Architecture
    linears: list[LinearSpec]  # to be quantized
    floats: list[TensorSpec]  # everything else, but for the biases of these linears
    config: QuantConfig
    folder: Path  # with config.json, tokenizer and image processor, as the writers will find them
    # The linears of the vision tower and the projector that are to be quantized, if the recipe asks
    # for that. They are not among `linears`.
    tower: list[LinearSpec] = field(default_factory=list)

    @cached_property
    def job(self) -> Job:
        """The same with its method looked up. Raises UsageError for one that is not known."""
        return Job.of(self.architecture, self.config)


def part_of(name: str, family: Family) -> str:
    """The part that a module or a tensor belongs to, by its hub name: one of PARTS."""
    if family.is_vision(name):
        return "vision"
    owners = {family.embedding: "embedding", family.head: "head"}
    return owners.get(name) or owners.get(name.rpartition(".")[0]) or "text"


def sized_parts(model: ModelPlan, sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Part → bytes, from the bytes of modules or tensors by their hub names."""
    found = dict.fromkeys(PARTS, 0)
    for name, size in sizes:
        found[part_of(name, model.architecture.family)] += size
    return found


def source_parts(model: ModelPlan) -> dict[str, int]:
    """Part → bytes of the source's tensors; empty where they are not known.

    An output matrix that the source has not, because it is the embedding, takes none.
    """
    solved = [linear for linear in (*model.linears, *model.tower) if linear.dtype]
    if not solved:
        return {}
    width = {x.name: DTYPES[x.dtype].itemsize for x in (*solved, *model.floats)}
    biases = [(x.name, width[x.name] * x.out_features) for x in solved if x.bias]
    return sized_parts(
        model, [*((x.name, width[x.name] * x.numel) for x in (*solved, *model.floats)), *biases]
    )


def tower_note(model: ModelPlan, kind: str, now: int, before: int | None) -> list[str]:
    """What becomes of a quantized vision tower and its projector in a format; else nothing.

    kind: how a quantized linear is stored.
    now, before: bytes of all their tensors, with and without the option; None: not known.
    """
    if not model.tower:
        return []
    size = f"{now / 2**20:,.1f} MiB"
    size += f" ({before / 2**20:,.1f} MiB without --vision-bits)" if before else ""
    said = f"vision tower and projector: {len(model.tower)} linears {kind}, {size}"
    vision = [t for t in model.floats if model.architecture.family.is_vision(t.name)]
    odd = [t for t in vision if len(t.shape) == 2 and t.shape[1] % VISION_GROUP]
    if odd:
        columns = ", ".join(str(n) for n in sorted({t.shape[1] for t in odd}))
        said += (
            f"; {len(odd)} linears have rows of {columns} columns, which no blocks of"
            f" {VISION_GROUP} fill, and stay float"
        )
    return [said]


def decoder_attention(architecture: Architecture) -> tuple[str, set[str]]:
    """The type of the decoder's rotary positions, and what its layers attend over.

    The type is a key of transformers' ROPE_INIT_FUNCTIONS, or `default`. Layers attend over
    `full_attention`, or `sliding_attention`. Where these have positions of their own, the type is
    that of `full_attention`.
    """
    text = architecture.text
    layers = set(text.get("layer_types") or ["full_attention"])
    rope = text.get("rope_parameters") or {}
    return str(rope.get("full_attention", rope).get("rope_type", "default")), layers


def require_even_positions(side: int) -> None:
    """Raises FormatError where Idefics3 gives two neighbouring patches the same learned position.

    side: the number of patches along a side of a tile.

    transformers rounds i/side in float32 before it looks the position up, and for some sides a
    quotient falls short. No published model has such a side, and no runtime rounds so.
    """
    parts = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor([side]))
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    found = torch.bucketize(parts.clamp(max=1.0 - 1e-6), bounds, right=True)
    if not torch.equal(found, torch.arange(side)):
        raise FormatError(
            f"config.json: {side} patches along a side of a tile, whose positions transformers"
            " rounds to fewer; no runtime does, so only --format gptq holds this model"
        )


def model_plan(checkpoint: Checkpoint, config: QuantConfig, name: str) -> ModelPlan:
    """The plan of a run that quantizes `checkpoint`.

    Raises CheckpointError for a model that is not supported or lacks a tensor.
    """
    architecture = checkpoint.architecture
    linears = [_linear(checkpoint, linear) for linear in architecture.linears]
    head, embedding = architecture.family.head, architecture.family.embedding
    taken = set()
    if config.embedding_bits:
        linears.insert(0, _linear(checkpoint, embedding))
        taken = {f"{head}.weight"} if architecture.tied else set()
    if config.head_bits:
        if f"{head}.weight" in checkpoint.tensors:
            linears.append(replace(_linear(checkpoint, head), bias=False))
        else:
            linears.append(replace(_linear(checkpoint, embedding), name=head, dtype=""))
        architecture = architecture.untied()
    names = tower_names(checkpoint, short=config.vision_short) if config.vision_bits else []
    tower = [_linear(checkpoint, linear) for linear in names]
    solved = [*linears, *tower]
    taken |= {f"{linear.name}.{part}" for linear in solved for part in ("weight", "bias")}
    infos = [t for t in checkpoint.tensors.values() if t.name not in taken]
    floats = [TensorSpec(t.name, t.shape, t.dtype) for t in infos]
    return ModelPlan(name, architecture, linears, floats, config, checkpoint.path, tower)


def _linear(checkpoint: Checkpoint, name: str) -> LinearSpec:
    shape = checkpoint.info(f"{name}.weight").shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f"{name}.weight has shape {list(shape)}, which is no linear's; copy the file again"
        )
    bias = f"{name}.bias" in checkpoint.tensors
    return LinearSpec(name, shape[0], shape[1], bias, checkpoint.info(f"{name}.weight").dtype)


def embedding_note(model: ModelPlan, size_of: Callable[[LinearSpec], int]) -> list[str]:
    """What a quantized embedding takes, beside 16 bits; nothing where it stays float.

    size_of: gives the bytes of a matrix in the format.
    """
    family, tied = model.architecture.family, model.architecture.tied
    found = [x for x in model.linears if x.name == family.embedding]
    return [
        f"the embedding takes {size_of(x) / 1e6:,.1f} MB, in 16 bits"
        f" {2 * x.out_features * x.in_features / 1e6:,.1f} MB"
        + ("; it is the output matrix too" if tied else "")
        for x in found
        if model.config.embedding_bits
    ]


def widths_note(model: ModelPlan, bits_of: Callable[[LinearSpec], int | None]) -> list[str]:
    """How many linears of the decoder have which width, and what they take; else nothing.

    bits_of: gives the bits of a linear in the format.
    """
    widths = model.config.widths
    chosen = [x for x in model.linears if x.name in widths]
    if not chosen:
        return []
    taken = sum(bits_of(x) or 0 for x in chosen) / sum(x.numel for x in chosen)
    counts = sorted(Counter(widths[x.name] for x in chosen).items())
    first, *others = [f"{n} linears at {bits} bits" for bits, n in counts]
    spread = ", ".join([first, *(said.replace("linears ", "") for said in others)])
    return [f"mixed widths, {taken:.3f} bits per weight: {spread}"]


def with_kinds(model: ModelPlan, kinds: Mapping[str, str | int], mix: str = "") -> ModelPlan:
    """The same run on these block types and widths.

    kinds: hub name of a module → GGUF type, or bits; under TOWER the bits of the vision tower.
    mix: what the types came from; empty if from nothing that has a name.
    """
    parts = {name: kinds[name] for name in parts_of(model) if isinstance(kinds.get(name), int)}
    types = {name: kind for name, kind in kinds.items() if isinstance(kind, str)}
    widths = {n: k for n, k in kinds.items() if isinstance(k, int) and n not in parts}
    config = replace(model.config, gguf_type=mix, types=types, widths=widths)
    for name, bits in parts.items():
        config = with_part(replace(model, config=config), name, int(bits)).config
    return replace(model, config=config)


def parts_of(model: ModelPlan) -> dict[str, str]:
    """Name of a part outside the decoder layers → the key of its width in a recipe."""
    family = model.architecture.family
    return {TOWER: "vision_bits", family.embedding: "embedding_bits", family.head: "head_bits"}


def with_part(model: ModelPlan, name: str, bits: int) -> ModelPlan:
    """The same run with so many bits for a part of `parts_of`."""
    if name == TOWER:
        return replace(model, config=model.config.with_vision(bits))
    own: dict[str, Any] = {parts_of(model)[name]: bits}
    return replace(model, config=replace(model.config, **own))


def artifact_plan(artifact: Artifact) -> ModelPlan:
    """The plan of an export of a model that is quantized already."""
    m = artifact.manifest
    parts: tuple[list[LinearSpec], list[LinearSpec]] = [], []
    for r in m.modules:
        parts[r.layer == VISION].append(LinearSpec(r.name, r.out_features, r.in_features, r.bias))
    linears, tower = parts
    floats = [TensorSpec(*info) for info in artifact.float_info()]
    return ModelPlan(
        m.name, artifact.architecture, linears, floats, artifact.config, artifact.source, tower
    )
