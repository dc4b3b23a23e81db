"""ONNX Runtime's own decoder operators in place of the standard ones: the same function, as its own builder writes it.

    Attention (opset 23)              → com.microsoft::GroupQueryAttention, whose past and present may be one buffer
    RotaryEmbedding and what feeds it → com.microsoft::MRotaryEmbedding, which reads the tables by position itself
    SkipSimplifiedLayerNormalization  → the runtime's kernel; the standard operators that spell it out go
    Transpose(weight) → MatMul        → com.microsoft::FusedMatMul, once filled: a float output matrix as it is stored

GroupQueryAttention takes a length a row and expects padding on the right; prompts of a batch are padded on the left. So
every row is given the full length, and the mask goes in as attention_bias. One thing the operator cannot do: several new
tokens on top of a cache with more than one row. The plain graph can.

With `single` the batch is one and the operator rotates query and key itself, from the cosines and sines of the tokens at
hand (it takes the same ones for every row of a prompt, hence the one). Then merge.py hands it all three as one product.
One row has nothing to pad: of its mask only the length is read, and there is no bias.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "com.microsoft"
TABLES = ("rotary_emb.cos_cache", "rotary_emb.sin_cache")


def fuse(model: ir.Model, mrope_section: list[int] | None, *, single: bool = False) -> bool:
    """Rewrite a decoder graph in place, before it is filled. False: it has no attention that can be fused.

    `mrope_section`: frequencies that turn with the temporal, height and width position; None: rotation stays as it is.
    `single`: a batch of one, rotated inside the attention.
    """
    graph, inputs = model.graph, {v.name: v for v in model.graph.inputs}
    attentions = [n for n in graph if n.op_type == "Attention" and n.domain == ""]
    masks = {n.inputs[3] for n in attentions if len(n.inputs) == 6 and len(n.outputs) == 3}
    causal = all(n.attributes["is_causal"].as_int() for n in attentions if "is_causal" in n.attributes)
    if len(masks) != 1 or not causal or _depends_on(masks.pop()) != {"attention_mask"}:
        return False
    tables = [next((v for n, v in graph.initializers.items() if n.endswith(t)), None) for t in TABLES]
    rotary: list = [None, None]
    if single:
        shared = _lengths(graph, inputs["attention_mask"])
        _one_row(graph)
        rotary = _token_rotary(graph, attentions, inputs, tables, mrope_section)
    else:
        shared = _mask_inputs(graph, inputs["attention_mask"], inputs["inputs_embeds"])
        if mrope_section is not None and None not in tables:
            for node in [n for n in graph if n.op_type == "RotaryEmbedding"]:
                _rotate(graph, node, [inputs["position_ids"], *tables], mrope_section)
    for node in attentions:
        _attend(graph, node, shared, rotary)
    for node in [n for n in graph if n.op_type == "SkipSimplifiedLayerNormalization"]:
        for i in (1, 2):  # mean and inverse deviation, which nothing reads
            node.outputs[i].name = ""
    model.opset_imports[DOMAIN] = 1
    model.functions.pop((DOMAIN, "SkipSimplifiedLayerNormalization", ""), None)
    RemoveUnusedNodesPass()(model)
    return True


def fuse_transposed(model: ir.Model) -> None:
    """Products with a float matrix of the checkpoint [out, in] as it is, in place of one that is turned when the graph is loaded.

    A turned matrix is twice in memory for a moment. And once that is freed, glibc keeps whatever is smaller on the heap, packed
    weights among them, of any graph opened afterwards: a token is 7 % slower there (docs/onnx.md).
    """
    for node in [n for n in model.graph if n.op_type == "Transpose" and n.inputs[0].is_initializer()]:
        uses = list(node.outputs[0].uses())
        if all(u.node.op_type == "MatMul" and u.idx == 1 for u in uses):
            for product in [u.node for u in uses]:
                operands = [product.inputs[0], node.inputs[0]]
                _replace(model.graph, product, "FusedMatMul", operands, [ir.AttrInt64("transB", 1)])
            model.graph.remove(node, safe=True)


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


def _one_row(graph: ir.Graph) -> None:
    """A batch of one in the shapes of inputs and outputs: a runtime refuses any other by name."""
    batch = next(v for v in graph.inputs if v.name == "inputs_embeds").shape[0]
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape([1 if d == batch else d for d in value.shape])


def _token_rotary(
    graph: ir.Graph, attentions: list[ir.Node], inputs: dict, tables: list, mrope_section: list[int] | None
) -> list[ir.Value]:
    """Cosines and sines of the tokens at hand, [past + S, head size / 2] each, those of the past left zero: row i is what
    the operator takes at position i, and it asks for as many rows as there are tokens."""
    tape = ir.tape.Tape()

    def constant(name: str, values: list) -> ir.Value:
        return tape.initializer(ir.Tensor(np.array(values, np.int64), name=f"rotary.{name}"))

    if mrope_section is not None and None not in tables:
        axis_of = constant("axis", np.repeat(np.arange(3), mrope_section).tolist())
        flat = tape.op("Reshape", [inputs["position_ids"], constant("by_axis", [3, -1])])  # [3, S]
        index = tape.op("Transpose", [tape.op("Gather", [flat, axis_of])], {"perm": [1, 0]})  # [S, head size / 2]
        rows = [tape.op("GatherElements", [table, index]) for table in tables]
    else:
        rotations = {tuple(n.inputs[i].producer().inputs[1:3]) for n in attentions for i in (0, 1)}
        ((cosines, sines),) = rotations  # float [1, S, head size / 2]
        axis = constant("batch_axis", [0])
        rows = [tape.op("Squeeze", [x, axis]) for x in (cosines, sines)]
    new = tape.op("Shape", [inputs["inputs_embeds"]], {"start": 1, "end": 2})
    total = tape.op("Shape", [inputs["attention_mask"]], {"start": 1, "end": 2})
    pads = tape.op("Concat", [tape.op("Sub", [total, new]), constant("no_pads", [0, 0, 0])], {"axis": 0})
    padded = [tape.op("Pad", [x, pads]) for x in rows]
    first = next(n for n in graph if n.op_type == "RotaryEmbedding")
    return _insert(graph, first, tape, "rotary", padded)


def _attend(graph: ir.Graph, node: ir.Node, shared: list[ir.Value], rotary: list) -> None:
    a = node.attributes
    query, key, value, _, past_key, past_value = node.inputs
    lengths, total, bias = shared
    if rotary[0] is not None:
        query, key = (x.producer().inputs[0] for x in (query, key))
    attributes = [
        ir.AttrInt64("num_heads", a["q_num_heads"].as_int()),
        ir.AttrInt64("kv_num_heads", a["kv_num_heads"].as_int()),
        ir.AttrFloat32("scale", a["scale"].as_float()),
    ]
    if rotary[0] is not None:
        attributes.append(ir.AttrInt64("do_rotary", 1))
    inputs = [query, key, value, past_key, past_value, lengths, total, *rotary, None, bias]
    _replace(graph, node, "GroupQueryAttention", inputs, attributes)


def _lengths(graph: ir.Graph, mask: ir.Value) -> list[ir.Value | None]:
    """[last position int32 [1], cached and new tokens int32 [1], no bias] from a mask of ones [1, T]."""
    tape = ir.tape.Tape()
    one = tape.initializer(ir.Tensor(np.array([1], np.int32), name="lengths.one"))
    total = tape.op("Cast", [tape.op("Shape", [mask], {"start": 1, "end": 2})], {"to": ir.DataType.INT32})
    return _insert(graph, graph[0], tape, "lengths", [tape.op("Sub", [total, one]), total, None])


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
    return _insert(graph, graph[0], tape, "attention_bias", wanted)


def _insert(graph: ir.Graph, before: ir.Node, tape: ir.tape.Tape, name: str, wanted: list) -> list:
    """What was recorded goes into the graph, its values named after `name`; returns `wanted`."""
    for i, node in enumerate(tape.nodes):
        node.outputs[0].name = f"{name}.{node.op_type}_{i}"
    for value in tape.initializers:
        graph.initializers[value.name or ""] = value
    graph.insert_before(before, tape.nodes)
    return wanted
