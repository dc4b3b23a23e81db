"""Puts ONNX Runtime's own decoder operators in place of the standard ones, with the same results.

The graph is then much like the one that onnxruntime-genai's own builder writes:

    Attention (opset 23)              → com.microsoft::GroupQueryAttention, whose past and present
                                        cache may be one buffer
    RotaryEmbedding and its inputs    → com.microsoft::MRotaryEmbedding, which looks up the tables
                                        by position itself
    SkipSimplifiedLayerNormalization, → the runtime's kernels; the standard operators that spell
    CausalConvWithState,                them out as functions are removed
    LinearAttention
    Transpose(weight) → MatMul        → com.microsoft::FusedMatMul, once the graph is filled: a
                                        float output matrix is used as it is stored

GroupQueryAttention takes one length per row and expects padding on the right, but the prompts of a
batch are padded on the left. So every row is given the full length, and the mask goes in as
attention_bias. One thing the operator cannot do: several new tokens after a cache, with more than
one row. The plain graph can.

Gemma 3's graph has a mask for each kind of layer, which says all of what a query sees. It becomes
the attention_bias of an operator that is not causal.

With `single` the batch is one, and the operator rotates query and key itself, by cosines and sines
of the current tokens. It takes the same ones for every row of a batch, hence the one. merge.py then
gives it query, key and value as one product. A single row has no padding, so that only the length
of its mask is read. There is no bias, but in Gemma 3.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmq_export.formats.onnx.graphs.edit import DOMAIN
from vlmq_export.formats.onnx.passes.attention_inputs import (
    Given,
    Turn,
    attention_inputs,
    masks_say_all,
    rotation,
)

# The ends of the names of mobius' cosines and sines of every position, [positions, head size / 2]
# each. A traced graph has no such tables: it computes them from the current positions.
TABLES = ("rotary_emb.cos_cache", "rotary_emb.sin_cache")
# Operators of the runtime that the graphs spell out as functions.
_SPELLED_OUT = ("SkipSimplifiedLayerNormalization", "CausalConvWithState", "LinearAttention")


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
    tables = None if mrope_section is None else _tables(graph)
    given = attention_inputs(graph, attentions, tables, mrope_section, single=single)
    if mrope_section is not None and tables is not None and not single:
        positions = next(v for v in graph.inputs if v.name == "position_ids")
        for node in [n for n in graph if n.op_type == "RotaryEmbedding"]:
            _rotate(graph, node, [positions, *tables], mrope_section)
    for node in attentions:
        _attend(graph, node, given[node])
    for node in graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            for i in (1, 2):  # mean and inverse deviation, which nothing reads
                node.outputs[i].name = ""
    model.opset_imports[DOMAIN] = 1
    for name in _SPELLED_OUT:
        model.functions.pop((DOMAIN, name, ""), None)
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
    """Whether these have a cache, and masks that an attention_bias can stand for.

    That is one mask, made from attention_mask alone, of attentions that look back only. Or it is
    masks that say all of what a query sees.
    """
    if not all(len(n.inputs) == 6 and len(n.outputs) == 3 for n in attentions):
        return False
    masks = {n.inputs[3] for n in attentions}
    if masks_say_all(attentions):
        return None not in masks
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


def _tables(graph: ir.Graph) -> Turn | None:
    """The values of TABLES; None in a graph that computes its cosines and sines."""
    cosines, sines = (
        next((v for n, v in graph.initializers.items() if n.endswith(t)), None) for t in TABLES
    )
    return None if cosines is None or sines is None else (cosines, sines)


# -- replacing operators -----------------------------------------------------------------------


def _attend(graph: ir.Graph, node: ir.Node, given: Given) -> None:
    """Attention becomes GroupQueryAttention."""
    a = node.attributes
    query, key, value, _, past_key, past_value = node.inputs
    attributes = [
        ir.AttrInt64("num_heads", a["q_num_heads"].as_int()),
        ir.AttrInt64("kv_num_heads", a["kv_num_heads"].as_int()),
        ir.AttrFloat32("scale", a["scale"].as_float()),
    ]
    if given.turn is not None:
        query, key = (rotation(node, i).inputs[0] for i in (0, 1))
        attributes.append(ir.AttrInt64("do_rotary", 1))
    if not given.causal:
        attributes.append(ir.AttrInt64("causal", 0))
    cosines, sines = given.turn or (None, None)
    lengths = [given.last, given.total]
    inputs = [query, key, value, past_key, past_value, *lengths, cosines, sines, None, given.bias]
    _replace(graph, node, "GroupQueryAttention", inputs, attributes)


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
