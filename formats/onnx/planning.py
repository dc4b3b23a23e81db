"""What ONNX would cost, and what it cannot hold, from shapes alone."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions, FormatPlan, ModelPlan
from vlmq_export.formats.onnx.packing import block_size_for, container_bits
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.families import family_of, text_config

TRACED = ("qwen3_vl", "llava_onevision", "internvl")  # families whose graphs torch_graphs makes
_GRAPH_BYTES = 9_000  # protobuf a linear: its node, names, and its share of the other nodes


def plan(model: ModelPlan, options: FormatOptions) -> FormatPlan:
    config = model.config
    refusals = []
    if config.bits not in (2, 3, 4, 8):
        refusals.append(
            f"--bits {config.bits}: ONNX Runtime's MatMulNBits decodes 2, 4 and 8 bits (3 in the 4-bit container)"
        )
    if block_size_for(config.group_size) is None:
        refusals.append(
            f"--group-size {config.group_size}: MatMulNBits takes blocks of 16 to 256; use a multiple of 16"
        )
    if not 0 <= options.onnx_accuracy_level <= 4:
        refusals.append(f"--accuracy-level {options.onnx_accuracy_level}: 0 (float32) to 4 (int8 activations)")
    half = options.onnx_dtype == "float16"
    refusals += graph_refusals(model.source_config)
    if refusals:
        return FormatPlan(0.0, 0, refusals)
    block = block_size_for(config.group_size)
    assert block is not None
    weights = stored = 0
    width = 2 if half else 4  # bytes a float outside the vision tower
    for x in model.linears:
        blocks, bits = -(-x.in_features // block), container_bits(config.of(x.name).bits)
        weights += x.out_features * x.in_features
        stored += x.out_features * (
            blocks * block * bits // 8 + width * blocks + -(-blocks * bits // 8) + width * x.bias
        )
        if config.act_order == "dynamic" and config.group_size != -1:
            stored += 8 * x.in_features
    family = family_of(model.source_config)
    floats = sum((4 if family.is_vision(t.name) else width) * t.numel for t in model.floats)
    embedding = next((width * t.numel for t in model.floats if t.name.endswith("embed_tokens.weight")), 0)
    tied = not config.head_bits and not any(t.name.endswith("lm_head.weight") for t in model.floats)
    text = text_config(model.source_config)
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    traced = model.model_type in TRACED  # computes cosines and sines, where mobius stores those of every position
    rope = 0 if traced else width * text["max_position_embeddings"] * head
    size = stored + floats + (embedding if tied else 0) + rope + _GRAPH_BYTES * len(model.linears)
    return FormatPlan(8 * stored / weights, size, [], notes_for(config, options))


def is_fused(options: FormatOptions) -> bool:
    """Whether the decoder gets ONNX Runtime's CPU operators."""
    return options.onnx_graph != "plain" and options.onnx_provider == "cpu"


def graph_refusals(source_config: dict) -> list[str]:
    """What the graphs of this model lack, found by making its modules without weights and without tracing them."""
    if source_config["model_type"] not in TRACED or any(find_spec(p) is None for p in ("onnx_ir", "onnxscript")):
        return []
    from vlmq_export.formats.onnx import torch_graphs

    try:
        torch_graphs.Parts(torch_graphs.config_of(source_config), torch.float32)
    except FormatError as e:
        return [str(e)]
    return []


def notes_for(config: QuantConfig, options: FormatOptions) -> list[str]:
    head = "" if config.head_bits else " and output head"
    notes = [f"vision tower, embeddings, norms{head} are float32, scales too: what the CPU kernels compute in"]
    if options.onnx_dtype == "float16":
        notes = ["embeddings, decoder and cache are float16, the vision tower computes in float32"]
    if options.onnx_graph == "single" and options.onnx_provider == "cpu":
        notes.append("the decoder runs one prompt at a time; --onnx-graph fused takes batches")
    if options.onnx_provider == "cuda" and options.onnx_graph != "plain":
        notes.append(
            "the decoder keeps its standard operators: CUDA's GroupQueryAttention has no fast path with a mask"
        )
    if config.head_bits:
        notes.append(f"the output head is a tensor of its own, {config.head_bits} bits; the embedding stays as it was")
    if 3 in (config.bits, config.head_bits):
        notes.append("3-bit codes lie in the 4-bit container, at the size of 4 bits; no runtime decodes three")
    if config.group_size == -1:
        notes.append("one scale a channel is written as blocks of 256 with the scale repeated")
    if config.act_order == "dynamic" and config.group_size != -1:
        notes.append("each quantized linear gathers its inputs in the order of the groups; g_idx is never written")
    return notes
