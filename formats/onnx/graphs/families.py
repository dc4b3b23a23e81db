"""Which library makes the float graphs of a family, and what these graphs cannot express.

This module imports no ONNX package at its top, so that a plan can be made where none is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch

from vlmq_export.errors import CheckpointError, VlmqError
from vlmq_export.formats.model_plan import decoder_attention
from vlmq_export.quantizer.model.architecture import Architecture, pretrained_config

# Families whose graphs are traced by torch.onnx (traced.py). mobius makes those of the others.
TRACED = (
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "llava_onevision", "internvl"),
    *("idefics3", "smolvlm", "gemma3", "mistral3"),
)


def graph_refusals(architecture: Architecture) -> list[str]:
    """What the graphs of a model cannot express, in one line each; empty if nothing.

    The modules that would be traced are made without weights and are not traced. They are not made
    where the ONNX packages are not installed.
    """
    if architecture.model_type not in TRACED:
        try:
            return list(_mobius_refusals(architecture))
        except CheckpointError as e:
            return [str(e)]
    if not all(find_spec(package) is not None for package in ("onnx_ir", "onnxscript")):
        return []
    from vlmq_export.formats.onnx.graphs.traced import Parts

    try:
        Parts.of(pretrained_config(architecture.config), torch.float32)
    except VlmqError as e:
        return [str(e)]
    return []


def _mobius_refusals(architecture: Architecture) -> Iterator[str]:
    """What config.json asks for and mobius leaves out of its graphs without a word.

    Its decoders with three axes of positions compute unscaled frequencies, and full attention.
    """
    kind, layers = decoder_attention(architecture)
    family = architecture.model_type
    if kind != "default":
        yield (
            f"config.json: the ONNX graphs of {family} have no rotary positions of type {kind};"
            " leave out --format onnx"
        )
    if other := layers - {"full_attention"}:
        yield (
            f"config.json: the ONNX graphs of {family} have no {min(other)};"
            " leave out --format onnx"
        )
