"""ONNX Runtime's own decoder operators in place of the standard ones: the same function, as its own builder writes it.

    Attention (opset 23)              → com.microsoft::GroupQueryAttention, whose past and present may be one buffer
    RotaryEmbedding and what feeds it → com.microsoft::MRotaryEmbedding, which reads the tables by position itself
    SkipSimplifiedLayerNormalization  → the runtime's kernel; the standard operators that spell it out go

GroupQueryAttention takes a length a row and expects padding on the right; prompts of a batch are padded on the left. So
every row is given the full length, and the mask goes in as attention_bias. One thing the operator cannot do: several new
tokens on top of a cache with more than one row. The plain graph can.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "com.microsoft"
TABLES = ("rotary_emb.cos_cache", "rotary_emb.sin_cache")


def fuse(model: ir.Model, mrope_section: list[int] | None) -> bool:
    """Rewrite a decoder graph in place, before it is filled. False: it has no attention that can be fused.

    `mrope_section`: frequencies that turn with the temporal, height and width position; None: rotation stays as it is.
    """
    graph, inputs = model.graph, {v.name: v for v in model.graph.inputs}
    attentions = [n for n in graph if n.op_type == "Attention" and n.domain == ""]
    masks = {n.inputs[3] for n in attentions if len(n.inputs) == 6 and len(n.outputs) == 3}
    causal = all(n.attributes["is_causal"].as_int() for n in attentions if "is_causal" in n.attributes)
    if len(masks) != 1 or not causal or _depends_on(masks.pop()) != {"attention_mask"}:
        return False
    tables = [next((v for n, v in graph.initializers.items() if n.endswith(t)), None) for t in TABLES]
    if mrope_section is not None and None not in tables:
        for node in [n for n in graph if n.op_type == "RotaryEmbedding"]:
            _rotate(graph, node, [inputs["position_ids"], *tables], mrope_section)
    shared = _mask_inputs(graph, inputs["attention_mask"], inputs["inputs_embeds"])
    for node in attentions:
        _attend(graph, node, shared)
    model.opset_imports[DOMAIN] = 1
    model.functions.pop((DOMAIN, "SkipSimplifiedLayerNormalization", ""), None)
    RemoveUnusedNodesPass()(model)
    return True


def _depends_on(value: ir.Value) -> set[str]:
    """Names of the graph inputs whose values, not only shapes, reach `value`."""
    found, queue = set(), [value]
    while queue:
        v = queue.pop()
        node = v.producer()
        if node is None:
            found |= {v.name} if v.is_graph_input() else set()
        elif node.op_type != "Shape":
            queue += [i for i in node.inputs if i is not None]
    return found


def _replace(graph: ir.Graph, old: ir.Node, op: str, inputs: list, attributes: list[ir.Attr]) -> None:
    """Another operator with as many outputs, under the same names."""
    node = ir.Node(DOMAIN, op, inputs, attributes, version=1, num_outputs=len(old.outputs), name=old.name)
    ir.convenience.replace_nodes_and_values(graph, old, [old], [node], old.outputs, node.outputs)


def _rotate(graph: ir.Graph, node: ir.Node, places: list[ir.Value], sections: list[int]) -> None:
    heads = node.attributes["num_heads"].as_int()
    attributes = [ir.AttrInt64("num_heads", heads), ir.AttrInt64s("mrope_section", sections)]
    _replace(graph, node, "MRotaryEmbedding", [node.inputs[0], *places], attributes)


def _attend(graph: ir.Graph, node: ir.Node, shared: list[ir.Value]) -> None:
    a = node.attributes
    query, key, value, _, past_key, past_value = node.inputs
    lengths, total, bias = shared
    attributes = [
        ir.AttrInt64("num_heads", a["q_num_heads"].as_int()),
        ir.AttrInt64("kv_num_heads", a["kv_num_heads"].as_int()),
        ir.AttrFloat32("scale", a["scale"].as_float()),
    ]
    inputs = [query, key, value, past_key, past_value, lengths, total, None, None, None, bias]
    _replace(graph, node, "GroupQueryAttention", inputs, attributes)


def _mask_inputs(graph: ir.Graph, mask: ir.Value, embeds: ir.Value) -> list[ir.Value]:
    """[last position of each row int32 [B], cached and new tokens int32, bias [B, 1, S, T]] from the 0/1 mask [B, T].

    A masked key gets half the lowest number: −inf would make NaN of a row that is padding throughout.
    """
    tape = ir.tape.Tape()

    def constant(name: str, values: list, dtype: type | np.dtype) -> ir.Value:
        return tape.initializer(ir.Tensor(np.array(values, dtype), name=f"attention_bias.{name}"))

    dtype = (embeds.dtype or ir.DataType.FLOAT).numpy()
    one, axes = constant("one", [1], np.int64), constant("axes", [1, 2], np.int64)
    by_value = constant("by_value", [np.finfo(dtype).min / 2, 0], dtype)
    new = tape.op("Shape", [embeds], {"start": 1, "end": 2})
    total = tape.op("Cast", [tape.op("Shape", [mask], {"start": 1, "end": 2})], {"to": ir.DataType.INT32})
    last = tape.op(
        "ArgMax", [mask], {"axis": 1, "keepdims": 0, "select_last_index": 1}
    )  # [B], that of the newest token
    of_keys = tape.op("Unsqueeze", [tape.op("Gather", [by_value, mask]), axes])  # [B, 1, 1, T]
    bias = tape.op("Expand", [of_keys, tape.op("Concat", [one, one, new, one], {"axis": 0})])
    wanted = [tape.op("Cast", [last], {"to": ir.DataType.INT32}), total, bias]
    for i, node in enumerate(tape.nodes):
        node.outputs[0].name = f"attention_bias.{node.op_type}_{i}"
    for value in tape.initializers:
        graph.initializers[value.name or ""] = value
    graph.insert_before(graph[0], tape.nodes)
    return wanted
