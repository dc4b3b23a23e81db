"""What a compressed-tensors folder would be, from shapes alone: size, refusals, who can read it."""

from __future__ import annotations

from collections.abc import Iterator

from vlmq_export.formats.compressed_tensors.layout import entries, graded, schemes
from vlmq_export.formats.compressed_tensors.runtimes import RUNTIMES
from vlmq_export.formats.contract import FormatOptions, FormatPlan
from vlmq_export.formats.in_transformers import runtimes
from vlmq_export.formats.in_transformers.files import (
    bits_per_weight,
    embedding_refusals,
    group_refusals,
)
from vlmq_export.formats.model_plan import (
    LinearSpec,
    ModelPlan,
    sized_parts,
    tower_note,
    widths_note,
)
from vlmq_export.quantizer.config import VISION_GROUP, QuantConfig
from vlmq_export.quantizer.storage.tensors import DTYPES


def plan(model: ModelPlan, options: FormatOptions) -> FormatPlan:
    """Size, bits per weight and refusals. The size is that of the tensors, without other files."""
    if refusals := [*_refusals(model), *group_refusals(model)]:
        return FormatPlan(0.0, 0, refusals)
    table = list(entries(graded(model), model.floats))
    parts = sized_parts(model, ((e.source, e.nbytes) for e in table))
    size, bits = sum(parts.values()), bits_per_weight(model, table)
    return FormatPlan(bits, size, [], notes(model, options), parts)


def linear_bits(linear: LinearSpec, config: QuantConfig, options: FormatOptions) -> int:
    """Bits of a quantized linear, without its bias. config: the recipe of this one linear."""
    return 8 * sum(e.nbytes for e in entries([(linear, config)], []) if e.part != "bias")


def _refusals(model: ModelPlan) -> Iterator[str]:
    """What the layout or its reader in transformers cannot hold."""
    config, family = model.config, model.architecture.family
    if family.sparse:
        yield (
            f"{family.model_type} has experts, which transformers 5.24 does not load from integers"
            " of this family; leave out --format compressed-tensors"
        )
    if config.types:
        yield (
            "the integers are on GGUF's block types;"
            " leave out --format compressed-tensors, or quantize again"
        )
    if short := [x for x in model.tower if x.in_features % VISION_GROUP]:
        yield (
            f"{len(short)} quantized linears of the vision tower have rows of"
            f" {short[0].in_features} columns, which groups of {VISION_GROUP} do not fill; quantize"
            " again with compressed-tensors among the formats, and they stay float"
        )
    if config.act_order == "dynamic" and config.group_size != -1:
        yield (
            "--act-order dynamic: compressed-tensors has no groups of permuted columns since 0.20;"
            " use gar, static or off, or --group-size -1"
        )
    yield from embedding_refusals(config, "compressed-tensors")


def notes(model: ModelPlan, options: FormatOptions) -> list[str]:
    """What the user should know of this file: who loads it, and how."""
    config = model.config
    found = widths_note(model, lambda x: linear_bits(x, config.of(x.name), options))
    found += _tower_notes(model)
    found += runtimes.notes(RUNTIMES, model, options)
    decoded = "quantization_config=CompressedTensorsConfig(dequantize=True)"
    if len(schemes(model)) > 1:
        found.append(
            "transformers 5.24 decodes all linears of a file by one grid; compressed-tensors"
            " decodes each by its own, into a folder that transformers loads, as the card shows"
        )
    elif not config.symmetric:
        found.append(f"transformers 5.24 loads zero-points only with {decoded}")
    elif model.architecture.family.newline:
        # The library's own decoding wraps each module that has parameters of its own, and makes a
        # plain dict of the image features that pass through it. Here the model owns the newline.
        found.append(f"transformers 5.24 generates with this model only with {decoded}")
    return found


def _tower_notes(model: ModelPlan) -> list[str]:
    """What becomes of a quantized vision tower."""
    vision = model.architecture.family.is_vision
    linears = [(x, model.config.vision) for x in model.tower]
    rest = sum(t.numel * DTYPES[t.dtype].itemsize for t in model.floats if vision(t.name))
    before = None
    if all(linear.dtype for linear in model.tower):
        before = rest + sum(
            DTYPES[x.dtype].itemsize * (x.numel + x.bias * x.out_features) for x in model.tower
        )
    now = rest + sum(e.nbytes for e in entries(linears, []))
    return tower_note(model, f"of {model.config.vision_bits} bits", now, before)
