"""Linears that read the same activations as one product: query, key and value; gate and up.

At accuracy_level 4 the kernel rounds its activations to 8 bits before it multiplies: once instead of three times, and
fewer nodes (measured: 5 to 7 % of a decoded token's time; nothing at level 0, where the pass is left out). Rows of
one constant stand where rows of several stood, so every integer stays what it was:

    MatMulNBits(x, a|b|c.qweight, ...) → [Add(Concat(a.bias, b.bias, c.bias))] → Split(a|b|c.sizes)
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
    for nodes in groups.values():
        if len(nodes) > 1:
            _merge(model.graph, nodes)


def merged_name(names: list[str]) -> str:
    """model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj → model.layers.0.mlp.gate_proj|up_proj."""
    return "|".join([names[0], *(n.rpartition(".")[2] for n in names[1:])])


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    name = merged_name([n.name or "" for n in nodes])
    sizes = [n.attributes["N"].as_int() for n in nodes]
    biases = [_bias(n) for n in nodes]
    constants = [_stack(graph, f"{name}.{part}", [n.inputs[1 + i] for n in nodes]) for i, part in enumerate(PARTS)]
    attributes = {k: a for k, a in nodes[0].attributes.items() if k != "N"}
    attributes["N"] = ir.AttrInt64("N", sum(sizes))
    new = [
        ir.Node(
            DOMAIN, "MatMulNBits", [nodes[0].inputs[0], *constants], list(attributes.values()), version=1, name=name
        )
    ]
    outputs = [n.outputs[0] for n in nodes]
    if all(b is not None for b in biases):
        joined = ir.Node("", "Concat", [b for _, b in biases], [ir.AttrInt64("axis", 0)])
        new += [joined, ir.Node("", "Add", [new[0].outputs[0], joined.outputs[0]])]
        outputs = [add.outputs[0] for add, _ in biases]
    lengths = ir.Value(name=f"{name}.sizes", const_value=ir.Tensor(np.array(sizes, np.int64), name=f"{name}.sizes"),
                       type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(sizes)]))  # fmt: skip
    graph.initializers[f"{name}.sizes"] = lengths
    parts = ir.Node("", "Split", [new[-1].outputs[0], lengths], [ir.AttrInt64("axis", -1)], num_outputs=len(sizes))
    for i, node in enumerate(new):
        node.outputs[0].name = f"{name}.{node.op_type}_{i}"
    old = [o.producer() for o in outputs] + (nodes if outputs[0].producer() is not nodes[0] else [])
    dead = [v for n in nodes for v in n.inputs[1:4]]
    ir.convenience.replace_nodes_and_values(graph, nodes[0], old, [*new, parts], outputs, parts.outputs)
    for value in dead:
        graph.initializers.pop(value.name or "")


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
