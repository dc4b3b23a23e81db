"""What a compressed-tensors folder would be, from shapes alone: size, refusals, who can read it."""

from __future__ import annotations

from collections.abc import Iterator

from vlmq_export.formats.compressed_tensors.layout import entries, schemes
from vlmq_export.formats.compressed_tensors.runtimes import RUNTIMES
from vlmq_export.formats.contract import FormatOptions, FormatPlan
from vlmq_export.formats.in_transformers import runtimes
from vlmq_export.formats.in_transformers.files import (
    bits_per_weight,
    embedding_refusals,
    group_refusals,
)
from vlmq_export.formats.model_plan import LinearSpec, ModelPlan, sized_parts, widths_note
from vlmq_export.quantizer.config import QuantConfig


def plan(model: ModelPlan, options: FormatOptions) -> FormatPlan:
    """Size, bits per weight and refusals. The size is that of the tensors, without other files."""
    if refusals := [*_refusals(model), *group_refusals(model)]:
        return FormatPlan(0.0, 0, refusals)
    table = list(entries(model.linears, model.floats, model.config))
    parts = sized_parts(model, ((e.source, e.nbytes) for e in table))
    size, bits = sum(parts.values()), bits_per_weight(model, table)
    return FormatPlan(bits, size, [], notes(model, options), parts)


def linear_bits(linear: LinearSpec, config: QuantConfig, options: FormatOptions) -> int:
    """Bits of a quantized linear, without its bias. config: the recipe of this one linear."""
    return 8 * sum(e.nbytes for e in entries([linear], [], config) if e.part != "bias")


def _refusals(model: ModelPlan) -> Iterator[str]:
    """What the layout or its reader in transformers cannot hold."""
    config = model.config
    if config.types:
        yield (
            "the integers are on GGUF's block types;"
            " leave out --format compressed-tensors, or quantize again"
        )
    if config.vision_bits:
        yield (
            f"--vision-bits {config.vision_bits}: these files hold the vision tower in floats,"
            " which this run would not have calibrated on; leave out --format compressed-tensors,"
            " or quantize with --vision-bits off"
        )
    if config.act_order == "dynamic" and config.group_size != -1:
        yield (
            "--act-order dynamic: compressed-tensors has no groups of permuted columns since 0.20;"
            " use gar, static or off, or --group-size -1"
        )
    yield from embedding_refusals(config, "compressed-tensors")
    if config.widths:
        yield from _mixed_refusals(model)
        return
    if len(schemes(config, model.architecture.family)) == 1:
        return
    if not (config.symmetric and config.head.symmetric):
        yield (
            f"--head-bits {config.head_bits}: transformers 5.24 decodes all linears of a file with"
            f" zero-points by one grid; use --head-bits {config.bits}, or --sym at 2 to 4 bits"
        )
    elif _answers_only_decoded(model):
        yield (
            f"--head-bits {config.head_bits}: transformers 5.24 cannot decode two grids while it"
            " loads, and compressed-tensors 0.20.1 then breaks generate() of this model;"
            f" use --head-bits {config.bits}"
        )


def _mixed_refusals(model: ModelPlan) -> Iterator[str]:
    """What transformers cannot load of several widths."""
    if not model.config.symmetric:
        yield (
            "mixed widths: transformers 5.24 decodes all linears of a file with zero-points by one"
            " grid; add --sym, or leave out --format compressed-tensors"
        )
    elif _answers_only_decoded(model):
        yield (
            "mixed widths: transformers 5.24 cannot decode two grids while it loads, and"
            " compressed-tensors 0.20.1 then breaks generate() of this model; leave out"
            " --format compressed-tensors, or give one width with --bits"
        )


def _answers_only_decoded(model: ModelPlan) -> bool:
    """Whether `generate` runs only where transformers decoded the weights while it loaded them.

    The library's own decoding wraps each module that has parameters of its own, and makes a plain
    dict of the image features that pass through it. LLaVA-OneVision's model owns the newline.
    """
    return model.architecture.family.newline > 0


def notes(model: ModelPlan, options: FormatOptions) -> list[str]:
    """What the user should know of this file: who loads it, and how."""
    config = model.config
    found = widths_note(model, lambda x: linear_bits(x, config.of(x.name), options))
    found += runtimes.notes(RUNTIMES, model, options)
    decoded = "quantization_config=CompressedTensorsConfig(dequantize=True)"
    if not config.symmetric:
        found.append(f"transformers 5.24 loads zero-points only with {decoded}")
    elif _answers_only_decoded(model):
        found.append(f"transformers 5.24 generates with this model only with {decoded}")
    return found
