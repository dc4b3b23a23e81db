"""What an ONNX folder would be, from settings and shapes: its size, what is refused, and notes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vlmq_export.errors import VlmqError
from vlmq_export.formats.contract import FormatOptions, FormatPlan
from vlmq_export.formats.model_plan import (
    LinearSpec,
    ModelPlan,
    embedding_note,
    sized_parts,
    tower_note,
    widths_note,
)
from vlmq_export.formats.onnx.genai_config import genai_files
from vlmq_export.formats.onnx.graphs.families import TRACED, graph_refusals
from vlmq_export.formats.onnx.passes.packing import block_size_for, container_bits
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.storage.tensors import DTYPES

# Bytes of nodes and names in the graphs for each quantized linear, the nodes of its layer among
# them, and for each tensor of a vision tower that torch traced or mobius made.
_LINEAR_BYTES, _TRACED_BYTES, _MOBIUS_BYTES = 3_300, 1_400, 4_100
# Of one linear of an expert, and of what brings a layer's tokens to its experts and back.
_EXPERT_BYTES, _ROUTING_BYTES = 1_100, 18_000
_TOWER_BYTES = 800  # what a tensor of the tower takes more where it is quantized


def plan(model: ModelPlan, options: FormatOptions) -> FormatPlan:
    """Size, bits per weight and refusals. The size is that of graphs and data."""
    refusals = [*_option_refusals(model.config, options)]
    refusals += graph_refusals(model.architecture)
    if not refusals:
        refusals += _genai_refusals(model, options)
    if refusals:
        return FormatPlan(0.0, 0, refusals)
    width, scale = 2 if options.onnx_dtype == "float16" else 4, _scale_bytes(options)
    stored = {x.name: _stored_bytes(x, model.config, scale) for x in model.linears}
    parts = sized_parts(model, [*stored.items(), *_float_bytes(model, width)])
    parts["vision"] += _tower_bytes(model, options)
    parts["metadata"] += _table_bytes(model, width) + _graph_bytes(model)
    weights = sum(x.out_features * x.in_features for x in model.linears)
    table = embedding_note(model, lambda x: _stored_bytes(x, model.config, scale))
    return FormatPlan(
        8 * sum(stored.values()) / weights,
        sum(parts.values()),
        [],
        [*notes_for(model, options), *table],
        parts,
    )


def linear_bits(linear: LinearSpec, config: QuantConfig, options: FormatOptions) -> int:
    """Bits of a quantized linear in the data of the decoder, without its bias.

    config: the recipe of this one linear.
    """
    return 8 * _stored_bytes(replace(linear, bias=False), config, _scale_bytes(options))


def _scale_bytes(options: FormatOptions) -> int:
    """Bytes of a scale of the decoder."""
    width = 2 if options.onnx_dtype == "float16" else 4
    return width if options.onnx_accuracy_level == 4 else 2


def _genai_refusals(model: ModelPlan, options: FormatOptions) -> list[str]:
    """What the files that onnxruntime-genai reads would lack; empty if nothing.

    They are made as the writer will make them.
    """
    try:
        genai_files(model.architecture, model.folder, options)
    except VlmqError as e:
        return [str(e)]
    return []


def _option_refusals(config: QuantConfig, options: FormatOptions) -> Iterator[str]:
    """Options that MatMulNBits cannot follow."""
    if config.types:
        yield "the integers are on GGUF's block types; leave out --format onnx, or quantize again"
    if config.bits not in (2, 3, 4, 8):
        yield (
            f"--bits {config.bits}: ONNX Runtime's MatMulNBits decodes 2, 4 and 8 bits"
            " (3 in the 4-bit container)"
        )
    if block_size_for(config.group_size) is None:
        yield (
            f"--group-size {config.group_size}: MatMulNBits takes blocks of 16 to 256;"
            " use a multiple of 16"
        )
    level = options.onnx_accuracy_level
    if not 0 <= level <= 4:
        yield f"--accuracy-level {level}: 0 (float32) to 4 (int8 activations)"


def _stored_bytes(
    linear: LinearSpec,
    config: QuantConfig,
    scale: int,  # bytes of one
) -> int:
    """Bytes of a quantized linear: codes, scales, zero-points, and its order of columns.

    Its bias has 16 bits, as in the artifact.
    """
    own = config.of(linear.name)
    block, bits = block_size_for(own.group_size), container_bits(own.bits)
    assert block is not None, "a group size without a block is refused"
    blocks = -(-linear.in_features // block)
    codes, scales, zeros = blocks * block * bits // 8, scale * blocks, -(-blocks * bits // 8)
    stored = linear.out_features * (codes + scales + zeros + 2 * linear.bias)
    if _permuted(own):
        stored += 8 * linear.in_features
    return stored


def _tower_bytes(model: ModelPlan, options: FormatOptions) -> int:
    """Bytes of the quantized linears of the vision tower, which computes in float32."""
    scale = 4 if options.onnx_accuracy_level == 4 else 2
    return sum(_stored_bytes(linear, model.config.vision, scale) for linear in model.tower)


def _float_bytes(model: ModelPlan, width: int) -> Iterator[tuple[str, int]]:
    """Name and bytes of all other tensors: as in the source, or less where the graph takes less.

    The vision tower computes in float32, the decoder in floats of `width` bytes. A tied output
    matrix lies in the embedding's bytes.
    """
    for tensor in model.floats:
        most = 4 if model.architecture.family.is_vision(tensor.name) else width
        yield tensor.name, tensor.numel * min(DTYPES[tensor.dtype].itemsize, most)


def _table_bytes(model: ModelPlan, width: int) -> int:
    """Bytes of the cosines and sines of every position, which mobius stores.

    Traced graphs compute them.
    """
    architecture = model.architecture
    if architecture.model_type in TRACED:
        return 0
    return width * architecture.text["max_position_embeddings"] * architecture.head_dim


def _graph_bytes(model: ModelPlan) -> int:
    """Bytes of the graphs without their data."""
    architecture = model.architecture
    tower = sum(architecture.family.is_vision(tensor.name) for tensor in model.floats)
    tower += sum(1 + linear.bias for linear in model.tower)
    each = _TRACED_BYTES if architecture.model_type in TRACED else _MOBIUS_BYTES
    sparse = architecture.text["num_hidden_layers"] if architecture.experts else 0
    experts = 3 * architecture.experts * sparse
    nodes = _LINEAR_BYTES * (len(model.linears) - experts) + _TOWER_BYTES * len(model.tower)
    nodes += _EXPERT_BYTES * experts + _ROUTING_BYTES * sparse
    return nodes + each * tower


def _permuted(config: QuantConfig) -> bool:
    """Whether the columns of a group may lie apart."""
    return config.act_order == "dynamic" and config.group_size != -1


def notes_for(model: ModelPlan, options: FormatOptions) -> list[str]:
    """What the user should know of these files."""
    config = model.config
    mixed = widths_note(model, lambda x: linear_bits(x, config.of(x.name), options))
    vision = _vision_notes(model, options)
    return [*mixed, *_graph_notes(config, options), *_grid_notes(config), *vision]


def _vision_notes(model: ModelPlan, options: FormatOptions) -> list[str]:
    """What becomes of a quantized vision tower."""
    is_vision = model.architecture.family.is_vision
    rest = sum(t.numel * DTYPES[t.dtype].itemsize for t in model.floats if is_vision(t.name))
    before = None
    if all(linear.dtype for linear in model.tower):
        before = rest + sum(x.numel * DTYPES[x.dtype].itemsize for x in model.tower)
    kind = f"MatMulNBits of {model.config.vision_bits} bits"
    return tower_note(model, kind, rest + _tower_bytes(model, options), before)


def _graph_notes(config: QuantConfig, options: FormatOptions) -> Iterator[str]:
    """The types that the graphs compute in, and the operators that they do without."""
    if options.onnx_dtype == "float16":
        yield "embeddings, decoder and cache are float16, the vision tower computes in float32"
    else:
        head = "" if config.head_bits else " and output head"
        kept = f"vision tower, embeddings, norms{head} are"
        if config.vision_bits or config.embedding_bits:
            kept = "what is not quantized is"
        yield (
            f"{kept} stored as in the source and cast to float32 when loaded: what the CPU kernels"
            " compute in"
        )
    if options.onnx_graph == "single" and options.onnx_provider == "cpu":
        yield "the decoder runs one prompt at a time; --onnx-graph fused takes batches"
    if options.onnx_provider == "cuda" and options.onnx_graph != "plain":
        yield (
            "the decoder keeps its standard operators:"
            " CUDA's GroupQueryAttention has no fast path with a mask"
        )


def _grid_notes(config: QuantConfig) -> Iterator[str]:
    """Where the integers are stored otherwise than the grid says."""
    if config.head_bits:
        embedding = "" if config.embedding_bits else "; the embedding stays as it was"
        yield f"the output head is a tensor of its own, {config.head_bits} bits{embedding}"
    if 3 in (config.head_bits, config.vision_bits, *(config.widths.values() or (config.bits,))):
        yield (
            "3-bit codes lie in the 4-bit container, at the size of 4 bits;"
            " no runtime decodes three"
        )
    if config.group_size == -1:
        yield "one scale a channel is written as blocks of 256 with the scale repeated"
    if _permuted(config):
        yield (
            "each quantized linear gathers its inputs in the order of the groups;"
            " g_idx is never written"
        )
