"""Puts ONNX Runtime's own decoder operators in place of the standard ones, with the same results.

The graph is then much like the one that onnxruntime-genai's own builder writes:

    Attention (opset 23)              → com.microsoft::GroupQueryAttention, whose past and present
                                        cache may be one buffer
    RotaryEmbedding and its inputs    → com.microsoft::MRotaryEmbedding, which looks up the tables
                                        by position itself
    SkipSimplifiedLayerNormalization  → the runtime's kernel; the standard operators that spell it
                                        out as a function are removed
    Transpose(weight) → MatMul        → com.microsoft::FusedMatMul, once the graph is filled: a
                                        float output matrix is used as it is stored

GroupQueryAttention takes one length per row and expects padding on the right, but the prompts of a
batch are padded on the left. So every row is given the full length, and the mask goes in as
attention_bias. One thing the operator cannot do: several new tokens after a cache, with more than
one row. The plain graph can.

With `single` the batch is one, and the operator rotates query and key itself, by cosines and sines
of the current tokens. It takes the same ones for every row of a batch, hence the one. merge.py then
gives it query, key and value as one product. A single row has no padding, so that only the length
of its mask is read and there is no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmq_export.formats.onnx.graphs.edit import (
    DOMAIN,
    add_initializers,
    constant,
    length,
    name_outputs,
    numpy_type,
)

# The ends of the names of mobius' cosines and sines of every position, [positions, head size / 2]
# each. A traced graph has no such tables: it computes them from the current positions.
TABLES = ("rotary_emb.cos_cache", "rotary_emb.sin_cache")


@dataclass(frozen=True)
class _Shared:
    """What every attention of the decoder is given besides its query, key, value and cache."""

    last: ir.Value  # int32 [B]: the last position of each row
    total: ir.Value  # int32 [1]: how many tokens there are, cached and new
    bias: ir.Value | None  # [B, 1, S, total]: added to the scores
    # Cosines and sines, [total, head size / 2] each. None: query and key come rotated.
    rotary: tuple[ir.Value, ir.Value] | None = None


def fuse(model: ir.Model, mrope_section: list[int] | None, *, single: bool = False) -> bool:
    """Rewrite a decoder graph in place, before it is filled.

    mrope_section: how many frequencies turn with the temporal, height and width position; None for
        positions of one axis, whose rotation stays as it is.
    single: for a batch of one, which is rotated inside the attention.

    Returns False, and changes nothing, where no attention can be fused.
    """
    graph = model.graph
    attentions = [n for n in graph if n.op_type == "Attention" and n.domain == ""]
    if not _can_fuse(attentions):
        return False
    inputs = {v.name: v for v in graph.inputs}
    tables = None if mrope_section is None else _tables(graph)
    if single:
        shared = _one_row_inputs(graph, attentions, inputs, tables, mrope_section)
    else:
        shared = _batch_inputs(graph, inputs["attention_mask"], inputs["inputs_embeds"])
        if mrope_section is not None and tables is not None:
            for node in [n for n in graph if n.op_type == "RotaryEmbedding"]:
                _rotate(graph, node, [inputs["position_ids"], *tables], mrope_section)
    for node in attentions:
        _attend(graph, node, shared)
    for node in graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            for i in (1, 2):  # mean and inverse deviation, which nothing reads
                node.outputs[i].name = ""
    model.opset_imports[DOMAIN] = 1
    model.functions.pop((DOMAIN, "SkipSimplifiedLayerNormalization", ""), None)
    RemoveUnusedNodesPass()(model)
    return True


def fuse_transposed(model: ir.Model) -> None:
    """Multiply by float matrices as the checkpoint stores them, [out, in].

    A matrix that is transposed when the graph is loaded is in memory twice for a moment. Once it is
    freed, glibc takes smaller buffers from the heap, packed weights among them, also those of
    graphs that are opened later. Tokens are slower there (docs/onnx.md, "Weights belong in maps of
    their own").
    """
    graph = model.graph
    for node in [n for n in graph if n.op_type == "Transpose"]:
        matrix = node.inputs[0]
        if matrix is None or not matrix.is_initializer():
            continue
        uses = list(node.outputs[0].uses())
        if all(u.node.op_type == "MatMul" and u.idx == 1 for u in uses):
            for product in [u.node for u in uses]:
                operands = [product.inputs[0], matrix]
                _replace(graph, product, "FusedMatMul", operands, [ir.AttrInt64("transB", 1)])
            graph.remove(node, safe=True)


# -- what can be fused -------------------------------------------------------------------------


def _can_fuse(attentions: list[ir.Node]) -> bool:
    """Whether these share a mask that is made from attention_mask alone, and look back only."""
    masks = {n.inputs[3] for n in attentions if len(n.inputs) == 6 and len(n.outputs) == 3}
    causal = (n.attributes["is_causal"] for n in attentions if "is_causal" in n.attributes)
    if len(masks) != 1 or not all(a.as_int() for a in causal):
        return False
    mask = masks.pop()
    return mask is not None and _depends_on(mask) == {"attention_mask"}


def _depends_on(value: ir.Value) -> set[str | None]:
    """Names of the graph inputs whose values, and not only their shapes, reach `value`."""
    found, queue = set(), [value]
    while queue:
        v = queue.pop()
        node = v.producer()
        if node is None:
            found |= {v.name} if v.is_graph_input() else set()
        elif node.op_type != "Shape":
            queue += [i for i in node.inputs if i is not None]
    return found


def _tables(graph: ir.Graph) -> tuple[ir.Value, ir.Value] | None:
    """The values of TABLES; None in a graph that computes its cosines and sines."""
    cosines, sines = (
        next((v for n, v in graph.initializers.items() if n.endswith(t)), None) for t in TABLES
    )
    return None if cosines is None or sines is None else (cosines, sines)


# -- inputs that are made once for all attentions ----------------------------------------------


def _batch_inputs(graph: ir.Graph, mask: ir.Value, embeds: ir.Value) -> _Shared:
    """The shared inputs for a batch that is padded on the left, from its 0/1 mask [B, T].

    The bias of a masked key is half the lowest number. −inf would make NaN of a row in which
    everything is masked.
    """
    tape, dtype = ir.tape.Tape(), numpy_type(embeds)
    one = constant(tape, "attention_bias.one", [1])
    axes = constant(tape, "attention_bias.axes", [1, 2])
    lowest = np.finfo(dtype).min / 2
    by_value = constant(tape, "attention_bias.by_value", [lowest, 0], dtype)
    new = length(tape, embeds, 1)
    total = _as_int32(tape, length(tape, mask, 1))
    # [B]: the position of the newest token.
    last = tape.op("ArgMax", [mask], {"axis": 1, "keepdims": 0, "select_last_index": 1})
    of_keys = tape.op("Unsqueeze", [tape.op("Gather", [by_value, mask]), axes])  # [B, 1, 1, T]
    bias = tape.op("Expand", [of_keys, tape.op("Concat", [one, one, new, one], {"axis": 0})])
    shared = _Shared(_as_int32(tape, last), total, bias)
    _insert(graph, graph[0], tape, "attention_bias")
    return shared


def _one_row_inputs(
    graph: ir.Graph,
    attentions: list[ir.Node],
    inputs: Mapping[str | None, ir.Value],
    tables: tuple[ir.Value, ir.Value] | None,
    mrope_section: list[int] | None,
) -> _Shared:
    """The shared inputs for a batch of one. The graph's inputs and outputs say so in their shapes.

    Row i of the cosines and sines is what the operator takes at position i. It asks for as many
    rows as there are tokens, and those of the past are zeros.
    """
    tape, mask = ir.tape.Tape(), inputs["attention_mask"]
    one = constant(tape, "lengths.one", [1], np.int32)
    total = _as_int32(tape, length(tape, mask, 1))
    last = tape.op("Sub", [total, one])
    _insert(graph, graph[0], tape, "lengths")
    _set_batch_to_one(graph, inputs["inputs_embeds"])

    tape = ir.tape.Tape()
    if mrope_section is not None and tables is not None:
        rows = _rows_by_axis(tape, inputs["position_ids"], tables, mrope_section)
    else:
        rows = _rows_of_graph(tape, attentions)
    new, all_tokens = length(tape, inputs["inputs_embeds"], 1), length(tape, mask, 1)
    none = constant(tape, "rotary.no_pads", [0, 0, 0])
    pads = tape.op("Concat", [tape.op("Sub", [all_tokens, new]), none], {"axis": 0})
    cosines, sines = (tape.op("Pad", [x, pads]) for x in rows)
    first = next(n for n in graph if n.op_type == "RotaryEmbedding")
    _insert(graph, first, tape, "rotary")
    return _Shared(last, total, None, (cosines, sines))


def _rows_by_axis(
    tape: ir.tape.Tape,
    position_ids: ir.Value,  # [3, 1, S]
    tables: tuple[ir.Value, ir.Value],
    mrope_section: list[int],
) -> list[ir.Value]:
    """Cosines and sines of the current tokens from the tables, [S, head size / 2] each."""
    sections = np.repeat(np.arange(3), mrope_section)
    axis_of = constant(tape, "rotary.axis", sections)  # of each frequency
    by_axis = constant(tape, "rotary.by_axis", [3, -1])
    flat = tape.op("Reshape", [position_ids, by_axis])  # [3, S]
    positions = tape.op("Gather", [flat, axis_of])
    index = tape.op("Transpose", [positions], {"perm": [1, 0]})  # [S, head size / 2]
    return [tape.op("GatherElements", [table, index]) for table in tables]


def _rows_of_graph(tape: ir.tape.Tape, attentions: list[ir.Node]) -> list[ir.Value]:
    """The cosines and sines that the graph itself computes, [S, head size / 2] each."""
    rotations = {tuple(_rotation(n, i).inputs[1:3]) for n in attentions for i in (0, 1)}
    (computed,) = rotations  # float [1, S, head size / 2] each
    axis = constant(tape, "rotary.batch_axis", [0])
    return [tape.op("Squeeze", [x, axis]) for x in computed]


def _set_batch_to_one(graph: ir.Graph, embeds: ir.Value) -> None:
    """Write 1 for the batch in the shapes of inputs and outputs. A runtime then refuses others."""
    assert embeds.shape is not None, "the inputs of a graph have shapes"
    batch = embeds.shape[0]
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape([1 if d == batch else d for d in value.shape])


def _as_int32(tape: ir.tape.Tape, value: ir.Value) -> ir.Value:
    return tape.op("Cast", [value], {"to": ir.DataType.INT32})


def _insert(graph: ir.Graph, before: ir.Node, tape: ir.tape.Tape, name: str) -> None:
    """Put what a tape recorded into the graph, with values named after `name`."""
    name_outputs(tape.nodes, name)
    add_initializers(graph, tape)
    graph.insert_before(before, tape.nodes)


# -- replacing operators -----------------------------------------------------------------------


def _attend(graph: ir.Graph, node: ir.Node, shared: _Shared) -> None:
    """Attention becomes GroupQueryAttention."""
    a = node.attributes
    query, key, value, _, past_key, past_value = node.inputs
    attributes = [
        ir.AttrInt64("num_heads", a["q_num_heads"].as_int()),
        ir.AttrInt64("kv_num_heads", a["kv_num_heads"].as_int()),
        ir.AttrFloat32("scale", a["scale"].as_float()),
    ]
    if shared.rotary is not None:
        query, key = (_rotation(node, i).inputs[0] for i in (0, 1))
        attributes.append(ir.AttrInt64("do_rotary", 1))
    cosines, sines = shared.rotary or (None, None)
    lengths = [shared.last, shared.total]
    inputs = [query, key, value, past_key, past_value, *lengths, cosines, sines, None, shared.bias]
    _replace(graph, node, "GroupQueryAttention", inputs, attributes)


def _rotation(attention: ir.Node, i: int) -> ir.Node:
    """The RotaryEmbedding of an attention's query (0) or key (1)."""
    rotated = attention.inputs[i]
    node = None if rotated is None else rotated.producer()
    assert node is not None, "query and key of a decoder are rotated"
    return node


def _rotate(graph: ir.Graph, node: ir.Node, places: list[ir.Value], sections: list[int]) -> None:
    """RotaryEmbedding becomes MRotaryEmbedding. `places`: position_ids, and the two tables."""
    heads = node.attributes["num_heads"].as_int()
    attributes = [ir.AttrInt64("num_heads", heads), ir.AttrInt64s("mrope_section", sections)]
    _replace(graph, node, "MRotaryEmbedding", [node.inputs[0], *places], attributes)


def _replace(
    graph: ir.Graph,
    old: ir.Node,
    op: str,
    inputs: list[ir.Value | None],
    attributes: list[ir.Attr],
) -> None:
    """Put another operator with as many outputs in the place of a node, under the same names."""
    count = len(old.outputs)
    node = ir.Node(DOMAIN, op, inputs, attributes, version=1, num_outputs=count, name=old.name)
    ir.convenience.replace_nodes_and_values(graph, old, [old], [node], old.outputs, node.outputs)
