"""What a GPTQ folder would be, from shapes alone: its size, what is refused, who can read it."""

from __future__ import annotations

from collections.abc import Iterator

from vlmq_export.formats.contract import FormatOptions, FormatPlan
from vlmq_export.formats.gptq.layout import (
    FORMAT_TAG,
    GPTQMODEL_LOADS,
    VERSIONS,
    entries,
    renamer,
)
from vlmq_export.formats.gptq.runtimes import BITS, GROUP_SIZES, RUNTIMES
from vlmq_export.formats.in_transformers import runtimes
from vlmq_export.formats.in_transformers.files import (
    bits_per_weight,
    embedding_refusals,
    group_refusals,
)
from vlmq_export.formats.model_plan import LinearSpec, ModelPlan, sized_parts, widths_note
from vlmq_export.quantizer.config import QuantConfig

FUSED_CPU_GROUPS = (32, 64, 128, 256)  # those of the 4-bit kernel that GPTQModel picks on CPU


def plan(model: ModelPlan, options: FormatOptions) -> FormatPlan:
    """Size, bits per weight and refusals. The size is that of the tensors, without other files."""
    refusals = [*_option_refusals(model, options), *_shape_refusals(model)]
    if refusals:
        return FormatPlan(0.0, 0, refusals)
    rename = renamer(model.architecture, options)
    table = list(entries(model.linears, model.floats, model.config, rename))
    parts = sized_parts(model, ((e.source, e.nbytes) for e in table))
    size, bits = sum(parts.values()), bits_per_weight(model, table)
    return FormatPlan(bits, size, [], notes(model, options), parts)


def linear_bits(linear: LinearSpec, config: QuantConfig, options: FormatOptions) -> int:
    """Bits of a quantized linear, without its bias. config: the recipe of this one linear."""
    return 8 * sum(e.nbytes for e in entries([linear], [], config, str) if e.part != "bias")


def _option_refusals(model: ModelPlan, options: FormatOptions) -> Iterator[str]:
    """Options that no reader, or not the reader that they are for, could follow."""
    config, model_type = model.config, model.architecture.model_type
    if options.gptq_version not in VERSIONS:
        yield f"--gptq-version {options.gptq_version}: choose v1 or v2"
    if options.gptq_names not in ("hub", "module"):
        yield f"--gptq-names {options.gptq_names}: choose hub or module"
    if options.gptq_names == "module" and model_type not in GPTQMODEL_LOADS:
        yield (
            f"--gptq-names module is for GPTQModel.load, which has no class for {model_type};"
            " use --gptq-names hub"
        )
    if config.widths and model_type not in GPTQMODEL_LOADS:
        yield (
            "mixed widths load in GPTQModel.load alone, which has no class for"
            f" {model_type}; leave out --format gptq, or give one width with --bits"
        )
    elif config.widths and options.gptq_names != "module":
        yield (
            "mixed widths load in GPTQModel.load alone, as transformers builds all linears of one"
            " width (optimum 2.3); add --gptq-names module"
        )
    if config.types:
        yield "the integers are on GGUF's block types; leave out --format gptq, or quantize again"
    if config.bits not in BITS:
        yield f"--bits {config.bits}: GPTQ readers decode 2, 3, 4 or 8 bits; choose one of these"
    if config.group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        yield (
            f"--group-size {config.group_size}: GPTQModel and transformers load only {allowed};"
            " choose one of these"
        )
    if config.vision_bits:
        yield (
            f"--vision-bits {config.vision_bits}: GPTQ files hold the vision tower in floats, which"
            " this run would not have calibrated on; leave out --format gptq, or quantize with"
            " --vision-bits off"
        )
    if config.head_bits:
        yield (
            f"--head-bits {config.head_bits}: transformers loads quantized linears of the decoder"
            " layers only (optimum 2.3); leave out --format gptq, or quantize with --head-bits off"
        )
    yield from embedding_refusals(config, "gptq")


def _shape_refusals(model: ModelPlan) -> Iterator[str]:
    """Linears whose codes or zero-points do not fill words, or whose columns do not fill groups."""
    for axis in ("out_features", "in_features"):
        odd = [s for s in model.linears if getattr(s, axis) % 32]
        if odd:
            yield (
                f"{odd[0].name} has {axis} {getattr(odd[0], axis)}, which is no multiple of 32 and"
                f" cannot be packed ({len(odd)} such linears); leave --format gptq out"
            )
    yield from group_refusals(model)


def notes(model: ModelPlan, options: FormatOptions) -> list[str]:
    """What the user should know of this file: who loads it, and how fast its kernels are."""
    config = model.config
    return [
        *widths_note(model, lambda x: linear_bits(x, config.of(x.name), options)),
        *runtimes.notes(RUNTIMES, model, options),
        *_kernel_notes(model),
        *_reader_notes(model, options),
    ]


def _kernel_notes(model: ModelPlan) -> Iterator[str]:
    """The fast kernels that this grid cannot use."""
    config = model.config
    if config.act_order == "dynamic" and config.group_size != -1:
        yield (
            "--act-order dynamic permutes g_idx (desc_act true): kernels gather activations, and"
            " ORT-GenAI's importer gets it wrong when asymmetric; static or gar avoid it"
        )
    if config.bits == 4 and not config.widths and config.group_size not in FUSED_CPU_GROUPS:
        yield (
            f"group size {config.group_size}: the 4-bit kernel that transformers may pick on CPU"
            " refuses it; load with"
            ' quantization_config=GPTQConfig(bits=4, backend="gptq_torch")'
        )


def _reader_notes(model: ModelPlan, options: FormatOptions) -> Iterator[str]:
    """What is unusual about this version of the format."""
    if options.gptq_version == "v2":
        yield "checkpoint_format gptq_v2: AutoGPTQ and ORT-GenAI cannot read it"
    if not model.config.symmetric and options.gptq_version == "v1":
        yield (
            f"meta.quantizer lists {FORMAT_TAG} as a format tag:"
            " GPTQModel takes asymmetric v1 only with it"
        )
