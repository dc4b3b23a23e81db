"""Merges linears that read the same activations into one product: query, key, value; gate and up.

The constants of the linears are joined row by row, so that every integer stays what it was:

    MatMulNBits(x, a|b|c.qweight, ...) → [Add(Concat(a.bias, b.bias, c.bias))] → Split(a|b|c.sizes)

An attention that rotates query and key itself (fuse.py, `single`) takes query, key and value as
one product. It needs no Split, and a layer has four nodes less. In such a graph gate and up stay
apart: their Split costs a prompt 1 to 3 % and saves a token nothing.

In any other graph linears are merged at accuracy_level 4 alone. There the kernel rounds its
activations to 8 bits before it multiplies: once instead of three times.

Gate and up of an expert are one product in every graph, because a Concat puts them side by side.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmq_export.formats.onnx.graphs.edit import (
    DOMAIN,
    add_constant,
    constant_of,
    merged_name,
    name_of,
    name_outputs,
)

PARTS = ("qweight", "scales", "zero_points")


@dataclass(frozen=True)
class _Linear:
    """A MatMulNBits node with the addition of its bias, if it has one."""

    product: ir.Node
    addition: ir.Node | None = None
    bias: ir.Value | None = None  # the constant that is added, [out]

    @classmethod
    def of(cls, product: ir.Node) -> _Linear:
        """A bias is a constant that is added where nothing else reads the product."""
        readers = product.outputs[0].consumers()
        if len(readers) == 1 and readers[0].op_type == "Add":
            (bias,) = (v for v in readers[0].inputs if v is not product.outputs[0])
            if bias is not None and bias.is_initializer():
                return cls(product, readers[0], bias)
        return cls(product)

    @property
    def result(self) -> ir.Value:
        """What the linear gives, with its bias."""
        return (self.addition or self.product).outputs[0]

    @property
    def out_features(self) -> int:
        """The rows of its weight."""
        return self.product.attributes["N"].as_int()


@dataclass(frozen=True)
class _Merged:
    """What takes the place of several linears."""

    name: str
    nodes: list[ir.Node]  # the last one gives the results of all linears side by side
    replaced: list[ir.Node]  # those that gave the result of each linear before


def merge(model: ir.Model) -> None:
    """Rewrite a filled decoder graph in place.

    A linear with a Gather of its own before it (act_order dynamic) stays alone.
    """
    graph = model.graph
    single = any(_rotates(node) for node in graph)
    for level, linears in _groups(graph):
        found = _rotating_attention(linears)
        if found is not None:
            _pack(graph, *found)
        elif len(linears) > 1 and level == 4 and not single:
            _split(graph, linears)


def merge_side_by_side(model: ir.Model) -> None:
    """Make one product of linears that a Concat puts side by side, in place.

    They are gate and up of an expert. Those with columns in an order of their own stay apart.
    """
    graph = model.graph
    for joined in [n for n in graph if n.op_type == "Concat" and n.attributes["axis"].value == -1]:
        nodes = [None if value is None else value.producer() for value in joined.inputs]
        products = [n for n in nodes if n is not None and n.op_type == "MatMulNBits"]
        if len(products) < len(nodes) or len({_grid(n) for n in products}) > 1:
            continue
        linears = [_Linear(n) for n in products]
        merged = _merged(graph, linears)
        replace, (made,) = ir.convenience.replace_nodes_and_values, merged.nodes
        replace(graph, joined, [joined], [made], joined.outputs, made.outputs)
        _remove(graph, linears, merged.replaced)


def _grid(node: ir.Node) -> tuple:
    """What linears of one merged product have in common: activations, columns, grid and level."""
    names = ("K", "bits", "block_size", "accuracy_level")
    return node.inputs[0], *(node.attributes[a].as_int() for a in names)


def _groups(graph: ir.Graph) -> list[tuple[int, list[_Linear]]]:
    """Linears of one module that could be merged, with their accuracy_level.

    They read the same activations on the same grid.
    """
    groups: dict[tuple, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMulNBits":
            groups[(node.name or "").rpartition(".")[0], *_grid(node)].append(node)
    return [(level, [_Linear.of(n) for n in nodes]) for (*_, level), nodes in groups.items()]


def _rotates(node: ir.Node) -> bool:
    """Whether this is an attention that rotates query and key itself."""
    return node.op_type == "GroupQueryAttention" and "do_rotary" in node.attributes


def _rotating_attention(linears: list[_Linear]) -> tuple[list[_Linear], ir.Node] | None:
    """Query, key and value of an attention that rotates, and that attention.

    None unless these are the three, nothing else reads them, and either all or none have a bias.
    """
    readers = {use.node for linear in linears for use in linear.result.uses()}
    alike = len({linear.addition is None for linear in linears}) == 1
    if len(linears) != 3 or len(readers) != 1 or not alike:
        return None
    (attention,) = readers
    ordered = [x for value in attention.inputs[:3] for x in linears if x.result is value]
    return (ordered, attention) if _rotates(attention) and len(ordered) == 3 else None


def _pack(graph: ir.Graph, linears: list[_Linear], attention: ir.Node) -> None:
    """Give an attention query, key and value as one input.

    It knows the size of each by its numbers of heads.
    """
    merged = _merged(graph, linears)
    graph.insert_before(attention, merged.nodes)
    for i, value in enumerate([merged.nodes[-1].outputs[0], None, None]):
        attention.replace_input_with(i, value)
    _remove(graph, linears, merged.replaced)


def _split(graph: ir.Graph, linears: list[_Linear]) -> None:
    """Put one product and a Split in the place of several linears."""
    merged = _merged(graph, linears)
    rows = np.array([linear.out_features for linear in linears], np.int64)
    sizes = add_constant(graph, f"{merged.name}.sizes", ir.Tensor(rows))
    whole, axis = merged.nodes[-1].outputs[0], ir.AttrInt64("axis", -1)
    parts = ir.Node("", "Split", [whole, sizes], [axis], num_outputs=len(rows))
    results = [node.outputs[0] for node in merged.replaced]
    pairs = list(zip(results, parts.outputs, strict=True))
    for before, after in pairs:
        after.name, before.name = before.name, f"{before.name}.apart"
        after.type, after.shape = before.type, before.shape
    graph.insert_before(linears[0].product, [*merged.nodes, parts])
    for before, after in pairs:
        before.replace_all_uses_with(after)
    _remove(graph, linears, merged.replaced)


def _merged(graph: ir.Graph, linears: list[_Linear]) -> _Merged:
    """The product of several linears, with the addition of their biases if all have one."""
    products = [linear.product for linear in linears]
    name = merged_name([p.name or "" for p in products])
    constants = [
        _joined(graph, f"{name}.{part}", [p.inputs[1 + i] for p in products])
        for i, part in enumerate(PARTS)
    ]
    attributes = {k: a for k, a in products[0].attributes.items() if k != "N"}
    attributes["N"] = ir.AttrInt64("N", sum(linear.out_features for linear in linears))
    inputs = [products[0].inputs[0], *constants]
    nodes = [
        ir.Node(DOMAIN, "MatMulNBits", inputs, list(attributes.values()), version=1, name=name)
    ]
    additions = [linear.addition for linear in linears if linear.addition is not None]
    biased = len(additions) == len(linears)
    if biased:
        biases = ir.Node("", "Concat", [x.bias for x in linears], [ir.AttrInt64("axis", 0)])
        nodes += [biases, ir.Node("", "Add", [nodes[0].outputs[0], biases.outputs[0]])]
    name_outputs(nodes, name)
    return _Merged(name, nodes, additions if biased else products)


def _remove(graph: ir.Graph, linears: list[_Linear], replaced: list[ir.Node]) -> None:
    """Remove linears with their constants, and the additions that were replaced with them."""
    products = [linear.product for linear in linears]
    dead = [value for p in products for value in p.inputs[1:4]]
    graph.remove([*products, *(n for n in replaced if n not in products)], safe=True)
    for value in dead:
        assert value is not None, "a MatMulNBits of ours has all its constants"
        graph.initializers.pop(name_of(value))


def _joined(graph: ir.Graph, name: str, values: list[ir.Value | None]) -> ir.Value:
    """The rows of several constants in one, which is made when the file is written."""
    tensors = [constant_of(value) for value in values]
    rows = sum(t.shape.numpy()[0] for t in tensors)
    shape = ir.Shape([rows, *tensors[0].shape.numpy()[1:]])

    def read() -> ir.Tensor:
        return ir.Tensor(np.concatenate([t.numpy() for t in tensors]), name=name)

    joined = add_constant(graph, name, ir.LazyTensor(read, tensors[0].dtype, shape))
    # Scales may be stored in less than the graph computes in, until `widen` casts them.
    joined.type = None if values[0] is None else values[0].type
    return joined
