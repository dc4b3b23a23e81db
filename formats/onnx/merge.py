"""Linears that read the same activations as one product: query, key and value; gate and up.

Rows of one constant stand where rows of several stood, so every integer stays what it was:

    MatMulNBits(x, a|b|c.qweight, ...) → [Add(Concat(a.bias, b.bias, c.bias))] → Split(a|b|c.sizes)

An attention that rotates (fuse.py, `single`) takes the product as it is: no Split, and four nodes less a layer. Beside it gate
and up stay apart, as their Split costs a prompt 1 to 3 % and saves a token nothing. In a graph without such attention merging
pays a token at accuracy_level 4, whose kernel rounds its activations to 8 bits before it multiplies, once instead of three
times; at level 0 linears stay apart.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

DOMAIN = "com.microsoft"
PARTS = ("qweight", "scales", "zero_points")


def merge(model: ir.Model) -> None:
    """Rewrite a filled decoder graph in place. Linears that gather their columns in an order of their own stay alone."""
    groups: dict[tuple, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            kind = tuple(node.attributes[a].as_int() for a in ("K", "bits", "block_size", "accuracy_level"))
            groups[node.inputs[0], (node.name or "").rpartition(".")[0], *kind].append(node)
    single = any(n.op_type == "GroupQueryAttention" and "do_rotary" in n.attributes for n in model.graph)
    for (*_, level), nodes in groups.items():
        attention, order = _rotating_attention(nodes)
        if attention is not None:
            _pack(model.graph, order, attention)
        elif len(nodes) > 1 and level == 4 and not single:
            _split(model.graph, nodes)


def _rotating_attention(nodes: list[ir.Node]) -> tuple[ir.Node | None, list[ir.Node]]:
    """The attention that alone reads these three linears and rotates them itself, and the three in its order."""
    readers = {use.node for n in nodes for use in _result(n).uses()}
    (node,) = readers if len(readers) == 1 else (None,)
    if node is None or node.op_type != "GroupQueryAttention" or "do_rotary" not in node.attributes:
        return None, []
    order = [next((n for n in nodes if _result(n) is node.inputs[i]), None) for i in range(3)]
    alike = len({_bias(n) is None for n in nodes}) == 1
    return (node, order) if len(nodes) == 3 and None not in order and alike else (None, [])


def merged_name(names: list[str]) -> str:
    """model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj → model.layers.0.mlp.gate_proj|up_proj."""
    return "|".join([names[0], *(n.rpartition(".")[2] for n in names[1:])])


def _pack(graph: ir.Graph, nodes: list[ir.Node], attention: ir.Node) -> None:
    """Query, key and value as one input of the attention, which knows their sizes from its numbers of heads."""
    new, old, _ = _merged(graph, nodes)
    graph.insert_before(attention, new)
    for i, value in enumerate([new[-1].outputs[0], None, None]):
        attention.replace_input_with(i, value)
    _remove(graph, nodes, old)


def _split(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    new, old, name = _merged(graph, nodes)
    sizes = np.array([n.attributes["N"].as_int() for n in nodes], np.int64)
    lengths = ir.Value(name=f"{name}.sizes", const_value=ir.Tensor(sizes, name=f"{name}.sizes"),
                       type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(sizes)]))  # fmt: skip
    graph.initializers[f"{name}.sizes"] = lengths
    parts = ir.Node("", "Split", [new[-1].outputs[0], lengths], [ir.AttrInt64("axis", -1)], num_outputs=len(sizes))
    outputs = [n.outputs[0] for n in old]
    for before, after in zip(outputs, parts.outputs, strict=True):
        after.name, before.name = before.name, f"{before.name}.apart"
        after.type, after.shape = before.type, before.shape
    graph.insert_before(nodes[0], [*new, parts])
    for before, after in zip(outputs, parts.outputs, strict=True):
        before.replace_all_uses_with(after)
    _remove(graph, nodes, old)


def _merged(graph: ir.Graph, nodes: list[ir.Node]) -> tuple[list[ir.Node], list[ir.Node], str]:
    """The nodes that stand for several linears, those that gave each one's result before, and their name."""
    name = merged_name([n.name or "" for n in nodes])
    biases = [_bias(n) for n in nodes]
    constants = [_stack(graph, f"{name}.{part}", [n.inputs[1 + i] for n in nodes]) for i, part in enumerate(PARTS)]
    attributes = {k: a for k, a in nodes[0].attributes.items() if k != "N"}
    attributes["N"] = ir.AttrInt64("N", sum(n.attributes["N"].as_int() for n in nodes))
    inputs = [nodes[0].inputs[0], *constants]
    new, old = [ir.Node(DOMAIN, "MatMulNBits", inputs, list(attributes.values()), version=1, name=name)], nodes
    if all(b is not None for b in biases):
        joined = ir.Node("", "Concat", [b for _, b in biases], [ir.AttrInt64("axis", 0)])
        new += [joined, ir.Node("", "Add", [new[0].outputs[0], joined.outputs[0]])]
        old = [add for add, _ in biases]
    for i, node in enumerate(new):
        node.outputs[0].name = f"{name}.{node.op_type}_{i}"
    return new, old, name


def _remove(graph: ir.Graph, nodes: list[ir.Node], old: list[ir.Node]) -> None:
    """Linears and their additions, which nothing reads any more, and their constants."""
    dead = [v for n in nodes for v in n.inputs[1:4]]
    graph.remove([*nodes, *(n for n in old if n not in nodes)], safe=True)
    for value in dead:
        graph.initializers.pop(value.name or "")


def _result(node: ir.Node) -> ir.Value:
    """What a linear gives, its bias added."""
    bias = _bias(node)
    return bias[0].outputs[0] if bias else node.outputs[0]


def _bias(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The addition of a constant that alone reads the node, and that constant."""
    uses = list(node.outputs[0].consumers())
    if len(uses) != 1 or uses[0].op_type != "Add":
        return None
    bias = next(v for v in uses[0].inputs if v is not node.outputs[0])
    return (uses[0], bias) if bias.is_initializer() else None


def _stack(graph: ir.Graph, name: str, values: list[ir.Value]) -> ir.Value:
    """Rows of several constants in one; made when the file is written."""
    tensors = [v.const_value for v in values]
    first = tensors[0]
    shape = ir.Shape([sum(int(t.shape[0]) for t in tensors), *list(first.shape)[1:]])

    def read() -> ir.Tensor:
        return ir.Tensor(np.concatenate([t.numpy() for t in tensors]), name=name)

    value = ir.Value(name=name, type=ir.TensorType(first.dtype), shape=shape,
                     const_value=ir.LazyTensor(read, first.dtype, shape, name=name))  # fmt: skip
    graph.initializers[name] = value
    return value
