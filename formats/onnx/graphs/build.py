"""The three float graphs of a model, from the library that can make them for its family."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from vlmq_export.formats.onnx.graphs import mobius, traced
from vlmq_export.formats.onnx.graphs.families import TRACED


def float_graphs(
    source: Path,  # folder with config.json
    known: Collection[str],  # hub names of the checkpoint's tensors
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> dict[str, ir.Model]:
    """The graphs `vision`, `embedding` and `text`.

    Their parameters have a hub name from `known`, a type and a shape, but no values. `dtype` is the
    type of the embedding and the decoder: of weights, activations and cache. The vision tower
    computes in float32, and its features are cast to `dtype`.

    Raises FormatError for a model whose graphs cannot be made.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    library = traced if config["model_type"] in TRACED else mobius
    return library.float_graphs(source, known, dtype)
