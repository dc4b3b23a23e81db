"""Puts an artifact into a graph: quantized linears become MatMulNBits, other parameters get values.

In the float graphs a linear is `Transpose(X.weight) → MatMul`, followed by `Add X.bias` where it
has a bias. The first two nodes are replaced, and the addition stays. The large constants are lazy:
a tensor is read from the artifact when its file is written.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.graphs.edit import (
    DOMAIN,
    add_constant,
    name_of,
    numpy_type,
    parameters,
    shape_of,
)
from vlmq_export.formats.onnx.passes.packing import NBits, pack_linear
from vlmq_export.quantizer.artifact.manifest import ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.grids.linears import QuantizedLinear


def fill(model: ir.Model, artifact: Artifact, accuracy_level: int) -> list[str]:
    """Put the artifact into one graph, in place. Returns the hub names of the linears it holds.

    `accuracy_level` is an attribute of MatMulNBits: 0 computes in float32, 4 with int8 activations.

    Raises FormatError for a parameter that the artifact lacks, and for a linear that is not where
    it should be.
    """
    graph = model.graph
    quantized = {f"{name}.weight": name for name in artifact.linear_names()}
    floats = set(artifact.float_names())
    embedding = next((n for n in floats if n.endswith("embed_tokens.weight")), "the embedding")
    done = []
    for value in parameters(graph):
        name = name_of(value)
        if name in quantized:
            _replace_linear(graph, value, artifact, quantized[name], accuracy_level)
            done.append(quantized[name])
        elif name.removesuffix(".bias") in artifact.records:
            bias = artifact.linear(name.removesuffix(".bias")).bias
            if bias is None:
                raise FormatError(
                    f"the graph adds {name}, which the artifact does not have; quantize again"
                )
            value.const_value = ir.Tensor(_typed(bias.float().numpy(), value), name=name)
        else:
            stored = embedding if name == "lm_head.weight" and name not in floats else name
            if stored not in floats:
                raise FormatError(
                    f"the graph needs {name}, which the artifact does not have; quantize again"
                )
            value.const_value = _lazy(artifact, stored, value)
    if DOMAIN not in model.opset_imports:
        model.opset_imports[DOMAIN] = 1
    return done


def _lazy(artifact: Artifact, stored: str, value: ir.Value) -> ir.LazyTensor:
    """The float tensor `stored` of the artifact, as the constant of the parameter `value`."""
    name, shape, dtype = name_of(value), shape_of(value), numpy_type(value)

    def read() -> ir.Tensor:
        array = _typed(artifact.float_tensor(stored).float().numpy(), value)
        if array.shape != shape:
            raise FormatError(
                f"{name} has shape {list(array.shape)}, the graph expects {list(shape)};"
                " the config is not this model's"
            )
        return ir.Tensor(array, name=name)

    return ir.LazyTensor(read, ir.DataType.from_numpy(dtype), ir.Shape(shape), name=name)


def _typed(array: np.ndarray, value: ir.Value) -> np.ndarray:
    """The array in the type of the graph's parameter, which is float32 or float16.

    Raises FormatError for a number that float16 cannot hold.
    """
    dtype = numpy_type(value)
    limit = np.finfo(dtype).max
    if np.abs(array).max(initial=0) > limit:
        raise FormatError(
            f"{value.name} holds numbers beyond {limit:.0f}; use --onnx-dtype float32"
        )
    return array.astype(dtype, copy=False)


def _packed(artifact: Artifact, name: str) -> NBits:
    """One linear of the artifact as the inputs of MatMulNBits."""
    linear = artifact.linear(name)
    assert isinstance(linear, QuantizedLinear), "block types are GGUF's; no other format has them"
    s = linear.solution
    return pack_linear(
        s.codes.numpy(),
        s.scales.numpy(),
        s.zero_points.numpy(),
        s.g_idx.numpy(),
        linear.bits,
        linear.group_size,
    )


def _replace_linear(
    graph: ir.Graph, weight: ir.Value, artifact: Artifact, name: str, accuracy_level: int
) -> None:
    """Transpose(weight) → MatMul becomes MatMulNBits, with a Gather before it if columns move."""
    packed = _packed(artifact, name)
    transpose, product = _nodes_of(weight, name)
    _check_shape(weight, artifact.records[name])
    activations = product.inputs[0]
    new: list[ir.Node] = []
    if packed.order is not None:
        # g_idx is never written, because ONNX Runtime computes it wrong.
        gather = _gather(graph, activations, packed.order, name)
        activations = gather.outputs[0]
        new.append(gather)
    constants = _constants(graph, artifact, name, packed, numpy_type(weight))
    out_features, in_features = shape_of(weight)
    attributes = {
        "K": in_features,
        "N": out_features,
        "bits": packed.bits,
        "block_size": packed.block_size,
        "accuracy_level": accuracy_level,
    }
    new.append(
        ir.Node(
            DOMAIN,
            "MatMulNBits",
            [activations, *constants],
            [ir.AttrInt64(key, value) for key, value in attributes.items()],
            version=1,
            name=name,
        )
    )
    _put_in_place(graph, product, new, f"{name}.product")
    graph.remove(transpose, safe=True)
    graph.initializers.pop(name_of(weight))


def _nodes_of(weight: ir.Value, name: str) -> tuple[ir.Node, ir.Node]:
    """The Transpose and the MatMul of a linear. Raises FormatError for any other structure."""
    transposes = [n for n in weight.consumers() if n.op_type == "Transpose"]
    products = [n for t in transposes for n in t.outputs[0].consumers() if n.op_type == "MatMul"]
    if len(transposes) != 1 or len(products) != 1 or len(weight.consumers()) != 1:
        raise FormatError(
            f"{name} is not one Transpose and one MatMul in the graph;"
            " this mobius version is not supported"
        )
    return transposes[0], products[0]


def _constants(
    graph: ir.Graph, artifact: Artifact, name: str, packed: NBits, dtype: np.dtype
) -> list[ir.Value]:
    """Codes, scales and zero-points of a linear. `dtype` is that of the scales.

    The packed codes are made once more when the file is written, so that those of one linear at a
    time are in memory.
    """
    codes = ir.LazyTensor(
        lambda: ir.Tensor(_packed(artifact, name).weight),
        ir.DataType.UINT8,
        ir.Shape(packed.weight.shape),
    )
    return [
        add_constant(graph, f"{name}.qweight", codes),
        add_constant(graph, f"{name}.scales", ir.Tensor(packed.scales.astype(dtype))),
        add_constant(graph, f"{name}.zero_points", ir.Tensor(packed.zero_points)),
    ]


def _check_shape(weight: ir.Value, record: ModuleRecord) -> None:
    """Raises FormatError for a linear that has other sizes in the graph than in the artifact."""
    out_features, in_features = shape_of(weight)
    if (record.out_features, record.in_features) != (out_features, in_features):
        raise FormatError(
            f"{record.name} is {out_features}×{in_features} in the graph,"
            f" {record.out_features}×{record.in_features} in the artifact"
        )


def _gather(graph: ir.Graph, activations: ir.Value | None, order: np.ndarray, name: str) -> ir.Node:
    """The activations of a linear, their columns in the order of its groups."""
    index = add_constant(graph, f"{name}.order", ir.Tensor(order))
    gather = ir.Node("", "Gather", [activations, index], [ir.AttrInt64("axis", -1)])
    gather.outputs[0].name = f"{name}.gathered"
    return gather


def _put_in_place(graph: ir.Graph, product: ir.Node, new: list[ir.Node], name: str) -> None:
    """Replace a MatMul by new nodes. The last of them gives its result, under the name `name`."""
    old, made = product.outputs[0], new[-1].outputs[0]
    made.name, made.type, made.shape = name, old.type, old.shape
    if old.is_graph_output():
        # The result of the output head, whose name `logits` stays.
        made.name, old.name = old.name, f"{old.name}.float"
    graph.insert_before(product, new)
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(product, safe=True)
