"""Puts an artifact into a graph: quantized linears become MatMulNBits, other parameters get values.

In the float graphs a linear is `Transpose(X.weight) → MatMul`, followed by `Add X.bias` where it
has a bias. The first two nodes are replaced, and the addition stays. A vision tower may have one
`Gemm` in place of the three, which is taken apart first. An embedding is `Gather(X.weight)`, and
becomes GatherBlockQuantized if it is quantized. A tied output matrix is a linear on the embedding's
integers. The large constants are lazy: a tensor is read from the artifact when its file is written.

No float tensor takes more bytes than the artifact has for it, and scales are float16. A parameter
of a float32 graph may therefore have a constant of 16 bits, until `widen` puts a Cast between the
two. At accuracy_level 4 scales have the type that the graph computes in. Its kernel takes them from
constants while a session is made, and behind a Cast it computes nonsense where the session has
turned graph optimization off.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype, to_torch_dtype

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.graphs.edit import (
    DOMAIN,
    add_constant,
    name_of,
    name_outputs,
    parameters,
    shape_of,
)
from vlmq_export.formats.onnx.passes.packing import NBits, pack_linear
from vlmq_export.quantizer.artifact.manifest import ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.storage.tensors import DTYPES


def fill(model: ir.Model, artifact: Artifact, accuracy_level: int) -> list[str]:
    """Put the artifact into one graph, in place. Returns the hub names of the linears it holds.

    `accuracy_level` is an attribute of MatMulNBits: 0 computes in float32, 4 with int8 activations.

    Raises FormatError for a parameter that the artifact lacks, and for a linear that is not where
    it should be.
    """
    graph = model.graph
    quantized = {f"{name}.weight": name for name in artifact.linear_names()}
    floats = {name: DTYPES[dtype] for name, _, dtype in artifact.float_info()}
    table = artifact.architecture.family.embedding
    embedding = f"{table}.weight"
    done = []
    for value in parameters(graph):
        name = name_of(value)
        if name == embedding and name in quantized:
            _replace_table(graph, value, artifact, table, accuracy_level)
            done.append(table)
        elif name in quantized:
            _replace_linear(graph, value, artifact, quantized[name], accuracy_level)
            done.append(quantized[name])
        elif name == "lm_head.weight" and name not in floats and embedding in quantized:
            _replace_linear(graph, value, artifact, table, accuracy_level)
        elif name.removesuffix(".bias") in artifact.records:
            bias = artifact.linear(name.removesuffix(".bias")).bias
            if bias is None:
                raise FormatError(
                    f"the graph adds {name}, which the artifact does not have; quantize again"
                )
            value.const_value = _typed(bias, value)
        else:
            stored = embedding if name == "lm_head.weight" and name not in floats else name
            if stored not in floats:
                raise FormatError(
                    f"the graph needs {name}, which the artifact does not have; quantize again"
                )
            value.const_value = _lazy(artifact, stored, floats[stored], value)
    if DOMAIN not in model.opset_imports:
        model.opset_imports[DOMAIN] = 1
    return done


def _lazy(artifact: Artifact, stored: str, dtype: torch.dtype, value: ir.Value) -> ir.LazyTensor:
    """The float tensor `stored` of the artifact, as the constant of the parameter `value`.

    `dtype` is the type that the artifact has it in.
    """
    name, shape = name_of(value), shape_of(value)

    def read() -> ir.TensorProtocol:
        tensor = _typed(artifact.float_tensor(stored), value)
        if tensor.shape != shape:
            raise FormatError(
                f"{name} has shape {list(tensor.shape)}, the graph expects {list(shape)};"
                " the config is not this model's"
            )
        return tensor

    kind = from_torch_dtype(_stored_type(dtype, value))
    return ir.LazyTensor(read, kind, ir.Shape(shape), name=name)


def _stored_type(dtype: torch.dtype, value: ir.Value) -> torch.dtype:
    """The type in which a parameter is stored: the artifact's, or the graph's if that is shorter.

    Of two types of 16 bits it is the graph's.
    """
    computed = to_torch_dtype(value.dtype or ir.DataType.FLOAT)
    return dtype if dtype.itemsize < computed.itemsize else computed


def _typed(tensor: torch.Tensor, value: ir.Value) -> TorchTensor:
    """The tensor as the constant of a parameter of the graph, in the type of `_stored_type`.

    Raises FormatError for a number that this type cannot hold.
    """
    dtype = _stored_type(tensor.dtype, value)
    limit = torch.finfo(dtype).max
    if tensor.dtype != dtype and tensor.numel() and tensor.abs().max() > limit:
        raise FormatError(
            f"{value.name} holds numbers beyond {limit:.0f}; use --onnx-dtype float32"
        )
    return TorchTensor(tensor.to(dtype).contiguous(), name=name_of(value))


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


def _replace_table(
    graph: ir.Graph, table: ir.Value, artifact: Artifact, name: str, accuracy_level: int
) -> None:
    """Gather(table, ids) becomes GatherBlockQuantized, which decodes the rows that it takes.

    `accuracy_level` is that of a tied output matrix, which reads the same scales.
    """
    packed = _packed(artifact, name)
    _check_shape(table, artifact.records[name])
    uses = list(table.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Gather":
        raise FormatError(
            f"{name} is not one Gather in the graph; this mobius version is not supported"
        )
    gather, attributes = uses[0].node, {"gather_axis": 0, "quantize_axis": 1}
    constants = _constants(graph, artifact, name, packed, table, accuracy_level, flat=True)
    codes, scales, zeros = constants
    attributes |= {"bits": packed.bits, "block_size": packed.block_size}
    node = ir.Node(
        DOMAIN,
        "GatherBlockQuantized",
        [codes, gather.inputs[1], scales, zeros],
        [ir.AttrInt64(key, value) for key, value in attributes.items()],
        version=1,
        name=name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, gather, [gather], [node], gather.outputs, node.outputs
    )
    graph.initializers.pop(name_of(table))


def _replace_linear(
    graph: ir.Graph, weight: ir.Value, artifact: Artifact, source: str, accuracy_level: int
) -> None:
    """Transpose(weight) → MatMul becomes MatMulNBits, with a Gather before it if columns move.

    `source` is the matrix of the artifact that it multiplies by.
    """
    packed, name = _packed(artifact, source), name_of(weight).removesuffix(".weight")
    _take_apart(graph, weight, name)
    transpose, product = _nodes_of(weight, name)
    _check_shape(weight, artifact.records[source])
    activations = product.inputs[0]
    new: list[ir.Node] = []
    if packed.order is not None:
        # g_idx is never written, because ONNX Runtime computes it wrong.
        gather = _gather(graph, activations, packed.order, name)
        activations = gather.outputs[0]
        new.append(gather)
    constants = _constants(graph, artifact, source, packed, weight, accuracy_level)
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


def _take_apart(graph: ir.Graph, weight: ir.Value, name: str) -> None:
    """Make Transpose, MatMul and Add of a Gemm that reads the weight, if one does.

    One without a bias has no Add.
    """
    for gemm in [node for node in weight.consumers() if node.op_type == "Gemm"]:
        settings = {key: attribute.value for key, attribute in gemm.attributes.items()}
        x, _, *bias = gemm.inputs
        if settings != {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}:
            raise FormatError(
                f"{name} is a Gemm of {settings}; this torch version is not supported"
            )
        tape = ir.tape.Tape()
        product = tape.op("MatMul", [x, tape.op("Transpose", [weight], {"perm": [1, 0]})])
        if bias:
            tape.op("Add", [product, *bias])
        name_outputs(tape.nodes, name)
        _put_in_place(graph, gemm, list(tape.nodes), f"{name}.sum")


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
    graph: ir.Graph,
    artifact: Artifact,
    source: str,  # hub name of the matrix in the artifact
    packed: NBits,
    weight: ir.Value,  # the parameter that they replace; the scales are read in its type
    accuracy_level: int,
    *,
    flat: bool = False,  # whether the blocks of a row lie in one axis: codes are [out, bytes]
) -> list[ir.Value]:
    """Codes, scales and zero-points of a matrix.

    The packed codes are made once more when the file is written, so that those of one matrix at a
    time are in memory.
    """
    name, computed = name_of(weight).removesuffix(".weight"), weight.dtype or ir.DataType.FLOAT
    rows, blocks, size = packed.weight.shape
    shape = (rows, blocks * size) if flat else packed.weight.shape
    codes = ir.LazyTensor(
        lambda: ir.Tensor(_packed(artifact, source).weight.reshape(shape)),
        ir.DataType.UINT8,
        ir.Shape(shape),
    )
    stored = packed.scales.astype(computed.numpy()) if accuracy_level == 4 else packed.scales
    scales = add_constant(graph, f"{name}.scales", ir.Tensor(stored))
    scales.type = ir.TensorType(computed)
    return [
        add_constant(graph, f"{name}.qweight", codes),
        scales,
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
