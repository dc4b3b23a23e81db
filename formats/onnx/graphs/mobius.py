"""Float graphs without weights that mobius makes, every parameter under its hub name.

mobius makes the graphs of the families that traced.py does not. It computes every index (windows,
M-RoPE, places of image features) inside the graphs, so that images of any size, any batch and any
length of the cache can be run. It knows nothing of quantization: passes/fill.py puts the integers
into the graphs.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.graphs.edit import (
    IR_VERSION,
    add_initializers,
    cast_output,
    constant,
    length,
    name_of,
    name_outputs,
    numpy_type,
    parameters,
    rename,
    shape_of,
)

# Name of our file → name of mobius' component.
GRAPHS = {"vision": "vision_encoder", "embedding": "embedding", "text": "decoder"}
# Prefix of mobius' parameter names → prefix on the hub. The first match wins.
_HUB_NAMES = (
    ("decoder.model.", "model."),
    ("decoder.lm_head.", "lm_head."),
    ("vision_encoder.visual.merger.mlp_", "visual.merger.mlp."),
    ("vision_encoder.visual.", "visual."),
    ("embedding.", "model."),
)
# mobius gives the vision MLP of Qwen2-VL the names of Qwen2.5-VL: mobius' name → the hub's.
_OTHER_SPELLINGS = ((".mlp.up_proj.", ".mlp.fc1."), (".mlp.down_proj.", ".mlp.fc2."))


def hub_name(name: str, known: Collection[str]) -> str:
    """The hub name of one of mobius' parameters, if possible one that is in `known`.

    Constants that only mobius has, such as rotary tables, keep mobius' own name.
    """
    for prefix, hub in _HUB_NAMES:
        if name.startswith(prefix):
            name = hub + name.removeprefix(prefix)
            break
    for ours, theirs in _OTHER_SPELLINGS:
        if name not in known and name.replace(ours, theirs) in known:
            return name.replace(ours, theirs)
    return name


def float_graphs(
    source: Path, known: Collection[str], dtype: ir.DataType = ir.DataType.FLOAT
) -> dict[str, ir.Model]:
    """The three graphs of the model in `source`. Arguments and result are those of build.py.

    The vision tower is always the float32 one, because mobius' float16 tower rounds rotary angles
    to float16.

    Raises FormatError when mobius cannot build this architecture.
    """
    import transformers

    whole: Any = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    # What the command `mobius build --config` calls.
    from mobius.__main__ import _config_from_hf

    try:
        config = _config_from_hf(getattr(whole, "text_config", whole), parent_config=whole)
        kinds = {dtype, ir.DataType.FLOAT}
        packages = {kind: _package(whole.model_type, config, kind) for kind in kinds}
        graphs = {name: packages[dtype][component] for name, component in GRAPHS.items()}
        graphs["vision"] = packages[ir.DataType.FLOAT][GRAPHS["vision"]]
        embed(graphs["embedding"].graph, int(whole.image_token_id))
        if dtype != ir.DataType.FLOAT:
            cast_output(graphs["vision"].graph, dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        reason = " ".join(repr(e).split())[:200]
        raise FormatError(
            f"mobius cannot build ONNX graphs for {whole.model_type} ({reason});"
            " leave out --format onnx"
        ) from None
    for name, model in graphs.items():
        model.graph.name = name
        model.ir_version = IR_VERSION
        for value in parameters(model.graph):
            rename(model.graph, value, hub_name(name_of(value), known))
    return graphs


def _package(model_type: str, config: Any, dtype: ir.DataType) -> Any:
    """Every graph of the model in one float type, by mobius' name of the component."""
    from mobius import build_from_module, registry
    from mobius.__main__ import _default_task_for_model

    typed = dataclasses.replace(config, dtype=dtype)
    # mobius declares this class as an onnxscript module, whose constructor takes a name.
    model: Any = registry.get(model_type)
    module = model(typed)
    with warnings.catch_warnings():
        # The mask of the float16 tower, which is not used, overflows.
        warnings.simplefilter("ignore", RuntimeWarning)
        return build_from_module(module, typed, task=_default_task_for_model(model_type))


def embed(graph: ir.Graph, image_token: int) -> None:
    """Replace the nodes of mobius' embedding graph by those of `traced_text.Embedding`.

    The graph's inputs are input_ids [B, S] and image_features [image tokens, hidden], its output is
    inputs_embeds [B, S, hidden]. mobius' own nodes count the features anew in every row of a batch.
    They also give an image token that the model generated a zero, or a feature of another image,
    where transformers feeds the token's own embedding.
    """
    (ids, features), (out,), (table,) = graph.inputs, graph.outputs, parameters(graph)
    tape = ir.tape.Tape()
    made = _embeddings(tape, ids, features, table, image_token)
    name_outputs(tape.nodes, "embedding")
    made.name, made.type, made.shape = out.name, out.type, out.shape
    old = list(graph)
    graph.outputs[0] = made
    graph.remove(old, safe=True)
    for name in [n for n, v in graph.initializers.items() if v is not table]:
        graph.initializers.pop(name)
    add_initializers(graph, tape)
    graph.extend(tape.nodes)


def _embeddings(
    tape: ir.tape.Tape, ids: ir.Value, features: ir.Value, table: ir.Value, image_token: int
) -> ir.Value:
    """The rows of `table` at `ids`, with the features at image tokens, [B, S, hidden].

    Features are numbered from 1. Row 0 of the features is a row of zeros, for the other tokens.
    """
    zero, last = constant(tape, "embedding.zero", [0]), constant(tape, "embedding.last", [-1])
    words = tape.op("Gather", [table, ids])  # [B, S, hidden]
    some = tape.op("Greater", [length(tape, features, 0), zero])
    token = constant(tape, "embedding.image_token", image_token)
    image = tape.op("And", [tape.op("Equal", [ids, token]), some])  # bool [B, S]
    flat = tape.op("Reshape", [tape.op("Cast", [image], {"to": ir.DataType.INT64}), last])
    counted = tape.op("CumSum", [flat, zero])
    # [B, S]. If there are fewer features than image tokens, a number is out of bounds.
    number = tape.op("Reshape", [counted, tape.op("Shape", [ids])])
    zeros = np.zeros((1, shape_of(table)[1]))
    none = constant(tape, "embedding.none", zeros, numpy_type(table))
    rows = tape.op("Concat", [none, features], {"axis": 0})
    picked = tape.op("Gather", [rows, number])
    return tape.op("Where", [tape.op("Unsqueeze", [image, last]), picked, words])
