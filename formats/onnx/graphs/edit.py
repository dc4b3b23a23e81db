"""Small steps on onnx_ir graphs that the modules of graphs/ and passes/ share.

onnx_ir declares names, shapes and constants as optional. The functions `name_of`, `shape_of` and
`constant_of` give them where a graph of ours always has them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

IR_VERSION = 11  # ONNX Runtime 1.31 loads up to 13
DOMAIN = "com.microsoft"  # of ONNX Runtime's own operators

# -- reading a value ---------------------------------------------------------------------------


def parameters(graph: ir.Graph) -> list[ir.Value]:
    """The initializers without values, which are the weights of the model."""
    return [v for v in graph.initializers.values() if v.const_value is None]


def name_of(value: ir.Value) -> str:
    """The name of an initializer."""
    assert value.name is not None, "a graph finds its initializers by their names"
    return value.name


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of a parameter."""
    assert value.shape is not None, f"{value.name} is a parameter and has a shape"
    return value.shape.numpy()


def constant_of(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor of an initializer that is filled."""
    assert value is not None and value.const_value is not None, "the graph is filled"
    return value.const_value


def numpy_type(value: ir.Value) -> np.dtype:
    """The type of a float value, as numpy has it; float32 where the graph does not say."""
    return (value.dtype or ir.DataType.FLOAT).numpy()


def merged_name(names: list[str]) -> str:
    """The name of a merged product: `x.gate_proj` and `x.up_proj` give `x.gate_proj|up_proj`."""
    return "|".join([names[0], *(n.rpartition(".")[2] for n in names[1:])])


# -- adding to a graph -------------------------------------------------------------------------


def add_constant(graph: ir.Graph, name: str, tensor: ir.Tensor | ir.LazyTensor) -> ir.Value:
    """A new initializer of the graph."""
    tensor.name = name
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, type=kind, shape=tensor.shape, const_value=tensor)
    graph.initializers[name] = value
    return value


def constant(
    tape: ir.tape.Tape, name: str, values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64
) -> ir.Value:
    """A new initializer of what a tape records."""
    return tape.initializer(ir.Tensor(np.array(values, dtype), name=name))


def length(tape: ir.tape.Tape, value: ir.Value, axis: int) -> ir.Value:
    """The length of `value` along `axis`, int64 [1], computed in the graph."""
    return tape.op("Shape", [value], {"start": axis, "end": axis + 1})


def name_outputs(nodes: Iterable[ir.Node], prefix: str) -> None:
    """Name the output of each node after `prefix`, its operator and its place among the nodes."""
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"{prefix}.{node.op_type}_{i}"


def add_initializers(graph: ir.Graph, tape: ir.tape.Tape) -> None:
    """Give the graph the constants that a tape recorded."""
    for value in tape.initializers:
        graph.initializers[name_of(value)] = value


# -- changing a graph --------------------------------------------------------------------------


def cast_output(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Cast the only output of the graph to another float type. It keeps its name."""
    (value,) = graph.outputs
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)])
    cast = node.outputs[0]
    cast.name, value.name = value.name, f"{value.name}.float32"
    cast.type, cast.shape = ir.TensorType(dtype), value.shape
    graph.append(node)
    graph.outputs[0] = cast


def rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give an initializer another name, under which the graph finds it from then on."""
    graph.initializers.pop(name_of(value))
    value.name = name
    graph.initializers[name] = value
