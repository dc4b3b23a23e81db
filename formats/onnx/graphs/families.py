"""Which library makes the float graphs of a family, and what these graphs cannot express.

This module imports no ONNX package at its top, so that a plan can be made where none is installed.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from vlmq_export.errors import FormatError

# Families whose graphs are traced by torch.onnx (traced.py). mobius makes those of the others.
TRACED = ("qwen3_vl", "llava_onevision", "internvl")


def graph_refusals(source_config: dict) -> list[str]:
    """What the graphs of a model cannot express, in one line each; empty if nothing.

    The modules that would be traced are made without weights and are not traced. A family of
    mobius is not checked here, and no family is where the ONNX packages are not installed.
    """
    installed = all(find_spec(package) is not None for package in ("onnx_ir", "onnxscript"))
    if source_config["model_type"] not in TRACED or not installed:
        return []
    from vlmq_export.formats.onnx.graphs.traced import Parts, config_of

    try:
        Parts.of(config_of(source_config), torch.float32)
    except FormatError as e:
        return [str(e)]
    return []
