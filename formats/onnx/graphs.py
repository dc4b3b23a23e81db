"""Float graphs of a VLM without weights, from mobius (torch_graphs: of the others), every parameter under its hub name.

mobius computes every index (windows, M-RoPE, feature positions) inside the graphs, so that any image size, batch and
past length runs. It knows nothing of quantization: `fill` puts the integers in.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.planning import TRACED

# our file name → mobius' component; the prefixes turn mobius' parameter names into the hub's
GRAPHS = {"vision": "vision_encoder", "embedding": "embedding", "text": "decoder"}
_HUB_NAMES = (
    ("decoder.model.", "model."),
    ("decoder.lm_head.", "lm_head."),
    ("vision_encoder.visual.merger.mlp_", "visual.merger.mlp."),
    ("vision_encoder.visual.", "visual."),
    ("embedding.", "model."),
)
IR_VERSION = 11  # ONNX Runtime 1.31 loads up to 13


# Qwen2-VL's vision MLP, which mobius names as Qwen2.5-VL's
_OTHER_SPELLINGS = ((".mlp.up_proj.", ".mlp.fc1."), (".mlp.down_proj.", ".mlp.fc2."))


def hub_name(name: str, known: Collection[str]) -> str:
    """Hub name of a mobius parameter, one of `known` if it can be; anything else keeps its own."""
    for prefix, hub in _HUB_NAMES:
        if name.startswith(prefix):
            name = hub + name.removeprefix(prefix)
            break
    for ours, theirs in _OTHER_SPELLINGS:
        if name not in known and name.replace(ours, theirs) in known:
            return name.replace(ours, theirs)
    return name


def float_graphs(source: Path, known: Collection[str], dtype: ir.DataType = ir.DataType.FLOAT) -> dict[str, ir.Model]:
    """The three graphs of the model in `source` (config.json), parameters typed and shaped but empty.

    `known` are the checkpoint's tensor names; parameters get theirs. `dtype` is that of embedding and
    decoder: weights, activations, cache. The vision tower computes in float32 (mobius' float16 tower rounds rotary angles
    to float16) and hands over features of that type.

    Raises FormatError when mobius cannot build this architecture.
    """
    import transformers

    from vlmq_export.formats.onnx import torch_graphs

    whole = transformers.AutoConfig.from_pretrained(source)
    if whole.model_type in TRACED:
        return torch_graphs.float_graphs(source, known, dtype)
    from mobius import build_from_module, registry
    from mobius.__main__ import _config_from_hf, _default_task_for_model  # what `mobius build --config` does

    try:
        config = _config_from_hf(getattr(whole, "text_config", whole), parent_config=whole)
        packages = {}
        for kind in {dtype, ir.DataType.FLOAT}:
            typed = dataclasses.replace(config, dtype=kind)
            module = registry.get(whole.model_type)(typed)
            with warnings.catch_warnings():  # the mask of the float16 tower, which is not used, overflows
                warnings.simplefilter("ignore", RuntimeWarning)
                packages[kind] = build_from_module(module, typed, task=_default_task_for_model(whole.model_type))
        graphs = {name: packages[dtype][component] for name, component in GRAPHS.items()}
        graphs["vision"] = packages[ir.DataType.FLOAT][GRAPHS["vision"]]
        embed(graphs["embedding"].graph, int(whole.image_token_id))
        if dtype != ir.DataType.FLOAT:
            cast_output(graphs["vision"].graph, dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise FormatError(
            f"mobius cannot build ONNX graphs for {whole.model_type} ({' '.join(repr(e).split())[:200]}); leave out --format onnx"
        ) from None
    for name, model in graphs.items():
        model.graph.name = name
        model.ir_version = IR_VERSION
        for value in _parameters(model.graph):
            rename(model.graph, value, hub_name(value.name or "", known))
    return graphs


def embed(graph: ir.Graph, image_token: int) -> None:
    """input_ids, image_features → inputs_embeds as torch_text.Embedding has it, in place of mobius' nodes.

    Those count features anew in every row of a batch, and give an image token that the model generated a zero or another
    image's feature, where transformers feeds the word.
    """
    (ids, features), (out,), (table,) = graph.inputs, graph.outputs, _parameters(graph)
    dtype, width = table.dtype, table.shape[1]
    tape = ir.tape.Tape()

    def constant(name: str, values) -> ir.Value:
        return tape.initializer(ir.Tensor(np.asarray(values), name=f"embedding.{name}"))

    zero, last = constant("zero", [0]), constant("last", [-1])
    words = tape.op("Gather", [table, ids])  # [B, S, hidden]
    some = tape.op("Greater", [tape.op("Shape", [features], {"start": 0, "end": 1}), zero])
    image = tape.op("And", [tape.op("Equal", [ids, constant("image_token", image_token)]), some])  # [B, S]
    counted = tape.op("CumSum", [tape.op("Reshape", [tape.op("Cast", [image], {"to": ir.DataType.INT64}), last]), zero])
    nth = tape.op("Reshape", [counted, tape.op("Shape", [ids])])  # from 1: a feature too few is out of bounds
    rows = tape.op("Concat", [constant("none", np.zeros((1, width), dtype.numpy())), features], {"axis": 0})
    picked = tape.op("Gather", [rows, nth])
    made = tape.op("Where", [tape.op("Unsqueeze", [image, last]), picked, words])
    for i, node in enumerate(tape.nodes):
        node.outputs[0].name = f"embedding.{node.op_type}_{i}"
    made.name, made.type, made.shape = out.name, out.type, out.shape
    old = list(graph)
    graph.outputs[0] = made
    graph.remove(old, safe=True)
    for name in [n for n, v in graph.initializers.items() if v is not table]:
        graph.initializers.pop(name)
    for value in tape.initializers:
        graph.initializers[value.name or ""] = value
    graph.extend(tape.nodes)


def _parameters(graph: ir.Graph) -> list[ir.Value]:
    return [v for v in graph.initializers.values() if v.const_value is None]


def cast_output(graph: ir.Graph, dtype: ir.DataType) -> None:
    """The graph's only output in another float type, under the same name."""
    (value,) = graph.outputs
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)])
    cast = node.outputs[0]
    cast.name, value.name = value.name, f"{value.name}.float32"
    cast.type, cast.shape = ir.TensorType(dtype), value.shape
    graph.append(node)
    graph.outputs[0] = cast


def rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give an initializer another name; the graph finds initializers by it."""
    graph.initializers.pop(value.name or "")
    value.name = name
    graph.initializers[name] = value
