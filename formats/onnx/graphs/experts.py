"""Experts of a decoder layer, of which each token takes some, as nodes of a graph.

The tokens are put in the order of the experts that they take, each as often as it takes one:

    rows [tokens·k, in] → Split(rows of each expert) → MatMul, one for each expert → Concat

An expert that no token takes multiplies no rows. Its weights are not read then, so that a step
reads as many weights as its token takes. Gate and up of an expert stand side by side, so that
passes/merge.py makes one product of them: a layer of 128 experts has many nodes.

torch traces the products of all experts as one operator, which `take_apart` replaces by the nodes
of each. So a trace takes as long as that of a dense model.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.onnx.ops import symbolic

from vlmq_export.formats.onnx.graphs.edit import merged_name
from vlmq_export.quantizer.model.families import SubBlock

_DOMAIN, _PRODUCTS = "vlmq", "Products"  # the operator that stands for those of all experts


def routed(
    module: Any,  # router and experts, as transformers has them
    block: SubBlock,
    x: torch.Tensor,  # [B, S, hidden]
    prefix: str,  # of the hub names in the layer
) -> torch.Tensor:
    """What the experts of each token give together, [B, S, hidden]."""
    _, shares, chosen = module.gate(x)  # [tokens, k] each
    count, k = module.gate.weight.shape[0], chosen.shape[-1]
    expert, order = chosen.flatten().sort()  # [tokens·k] each
    counts = (expert[:, None] == torch.arange(count)).long().sum(0)  # [experts]
    rows = x.flatten(0, 1)[order // k]
    inner, hidden = module.experts.down_proj.shape[2], x.shape[-1]
    ins, out = ([prefix + name for name in names] for names in (block.ins, [block.out]))
    both = _products(rows, counts, ins, inner)  # [tokens·k, 2·inner]
    mixed = module.experts.act_fn(both[:, :inner]) * both[:, inner:]
    y = _products(mixed, counts, out, hidden)
    y = y * shares.flatten()[order][:, None]
    return y[order.argsort()].unflatten(0, (-1, k)).sum(1).view_as(x)


def _products(
    rows: torch.Tensor,  # [tokens·k, in], in the order of the experts
    counts: torch.Tensor,  # int64 [experts]: how many rows are an expert's
    linears: list[str],  # hub names, in which `*` is the number of the expert
    out: int,  # of each linear
) -> torch.Tensor:
    """Each expert's rows through its linears, side by side, as one operator of the graph.

    [tokens·k, out·linears]
    """
    return symbolic(
        f"{_DOMAIN}::{_PRODUCTS}",
        (rows, counts),
        {"linears": linears, "experts": counts.shape[0], "in": rows.shape[1], "out": out},
        dtype=rows.dtype,
        shape=(rows.shape[0], out * len(linears)),
        version=1,
    )


def take_apart(model: ir.Model) -> None:
    """Put the nodes of each expert in the place of the operator that stands for all, in place.

    Their weights become parameters of the graph, with their hub names and no values.
    """
    graph = model.graph
    for products in [n for n in graph if n.domain == _DOMAIN]:
        linears = list(products.attributes["linears"].as_strings())
        split = _split(products, f"{linears[0]}.rows")
        nodes, parts = [split], []
        for number, rows in enumerate(split.outputs):
            own = [linear.replace("*", str(number)) for linear in linears]
            given = []
            for linear in own:
                nodes += _product(graph, rows, products, linear)
                given.append(nodes[-1].outputs[0])
            if len(given) > 1:
                nodes.append(_concat(given, -1, own))
            parts.append(nodes[-1].outputs[0])
        nodes.append(_concat(parts, 0, linears))
        replace, results = ir.convenience.replace_nodes_and_values, [products.outputs[0]]
        replace(graph, products, [products], nodes, results, [nodes[-1].outputs[0]])
    model.opset_imports.pop(_DOMAIN, None)


def _split(products: ir.Node, name: str) -> ir.Node:
    """The rows of each expert."""
    count, axis = products.attributes["experts"].as_int(), ir.AttrInt64("axis", 0)
    node = ir.Node("", "Split", products.inputs, [axis], num_outputs=count, name=name)
    for number, output in enumerate(node.outputs):
        output.name = name.replace("*", str(number))
    return node


def _concat(parts: list[ir.Value], axis: int, linears: list[str]) -> ir.Node:
    """What several linears give, side by side (axis −1), or one expert after the other (0)."""
    name = merged_name(linears)
    node = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", axis)], name=name)
    node.outputs[0].name = f"{name}.joined"
    return node


def _product(
    graph: ir.Graph, rows: ir.Value, products: ir.Node, linear: str
) -> tuple[ir.Node, ir.Node]:
    """Transpose and MatMul of one expert's linear, whose weight [out, in] the graph is given."""
    out, columns = (products.attributes[key].as_int() for key in ("out", "in"))
    kind = ir.TensorType(products.outputs[0].dtype or ir.DataType.FLOAT)
    weight = ir.Value(name=f"{linear}.weight", type=kind, shape=ir.Shape((out, columns)))
    graph.initializers[f"{linear}.weight"] = weight
    turn = ir.Node("", "Transpose", [weight], [ir.AttrInt64s("perm", [1, 0])])
    product = ir.Node("", "MatMul", [rows, turn.outputs[0]])
    turn.outputs[0].name, product.outputs[0].name = f"{linear}.turned", f"{linear}.product"
    product.outputs[0].type = kind
    return turn, product
