"""The graph pass: every quantized linear becomes one MatMulNBits, every other parameter its values.

In mobius' graphs a linear is `Transpose(X.weight) → MatMul (→ Add X.bias)`; the first two nodes are replaced and the
addition stays. Constants are lazy: a tensor is read from the artifact when its file is written.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.packing import NBits, pack_linear
from vlmq_export.quantizer.artifact import Artifact

DOMAIN = "com.microsoft"


def fill(model: ir.Model, artifact: Artifact, accuracy_level: int) -> list[str]:
    """Put the artifact into one graph. Returns the linears that it holds.

    Raises FormatError for a parameter that the artifact lacks or a linear that is not where it should be.
    """
    graph = model.graph
    quantized = {f"{name}.weight": name for name in artifact.linear_names()}
    floats = set(artifact.float_names())
    embedding = next((n for n in floats if n.endswith("embed_tokens.weight")), "the embedding")
    done = []
    for value in list(graph.initializers.values()):
        name = value.name or ""
        if value.const_value is not None:
            continue
        if name in quantized:
            _replace_linear(model, value, artifact, quantized[name], accuracy_level)
            done.append(quantized[name])
        elif name.removesuffix(".bias") in artifact.records:
            bias = artifact.linear(name.removesuffix(".bias")).bias
            if bias is None:
                raise FormatError(f"the graph adds {name}, which the artifact does not have; quantize again")
            value.const_value = ir.Tensor(_typed(bias.float().numpy(), value), name=name)
        else:
            stored = embedding if name == "lm_head.weight" and name not in floats else name
            if stored not in floats:
                raise FormatError(f"the graph needs {name}, which the artifact does not have; quantize again")
            value.const_value = _lazy(artifact, stored, value, name)
    if DOMAIN not in model.opset_imports:
        model.opset_imports[DOMAIN] = 1
    return done


def _lazy(artifact: Artifact, stored: str, value: ir.Value, name: str) -> ir.LazyTensor:
    shape = value.shape
    assert shape is not None

    def read() -> ir.Tensor:
        array = _typed(artifact.float_tensor(stored).float().numpy(), value)
        if list(array.shape) != list(shape):
            raise FormatError(
                f"{name} has shape {list(array.shape)}, the graph expects {list(shape)}; the config is not this model's"
            )
        return ir.Tensor(array, name=name)

    return ir.LazyTensor(read, ir.DataType.from_numpy(_numpy(value)), ir.Shape(shape), name=name)


def _typed(array: np.ndarray, value: ir.Value) -> np.ndarray:
    """In the type of the graph's parameter. Raises FormatError for a number that float16 cannot hold."""
    limit = np.finfo(_numpy(value)).max
    if np.abs(array).max(initial=0) > limit:
        raise FormatError(f"{value.name} holds numbers beyond {limit:.0f}; use --onnx-dtype float32")
    return array.astype(_numpy(value), copy=False)


def _numpy(value: ir.Value) -> np.dtype:
    """A parameter's type in the graph: float32, or float16 in a graph of that type."""
    return (value.dtype or ir.DataType.FLOAT).numpy()


def _packed(artifact: Artifact, name: str) -> NBits:
    q = artifact.linear(name)
    parts = (q.codes, q.scales, q.zero_points, q.g_idx)
    return pack_linear(*(p.numpy() for p in parts), q.bits, q.group_size)


def _replace_linear(model: ir.Model, weight: ir.Value, artifact: Artifact, name: str, accuracy_level: int) -> None:
    """Transpose(weight) → MatMul becomes [Gather(A, order) →] MatMulNBits.

    The packed codes are made again when the file is written, so that one linear's are in memory at a time.
    """
    graph, packed, record = model.graph, _packed(artifact, name), artifact.records[name]
    transposes = [n for n in weight.consumers() if n.op_type == "Transpose"]
    products = [n for t in transposes for n in t.outputs[0].consumers() if n.op_type == "MatMul"]
    if len(transposes) != 1 or len(products) != 1 or len(list(weight.consumers())) != 1:
        raise FormatError(
            f"{name} is not one Transpose and one MatMul in the graph; this mobius version is not supported"
        )
    transpose, product = transposes[0], products[0]
    assert weight.shape is not None
    out_features, in_features = (int(d) for d in weight.shape)  # type: ignore[call-overload]
    if (record.out_features, record.in_features) != (out_features, in_features):
        raise FormatError(
            f"{name} is {out_features}×{in_features} in the graph, {record.out_features}×{record.in_features} in the artifact"
        )

    activations = product.inputs[0]
    new: list[ir.Node] = []
    if packed.order is not None:  # g_idx is never written: ONNX Runtime computes it wrong
        gather = ir.Node(
            "",
            "Gather",
            [activations, _constant(graph, f"{name}.order", ir.Tensor(packed.order))],
            [ir.AttrInt64("axis", -1)],
        )
        gather.outputs[0].name = f"{name}.gathered"
        activations = gather.outputs[0]
        new.append(gather)
    shape = ir.Shape(packed.weight.shape)
    codes = ir.LazyTensor(lambda: ir.Tensor(_packed(artifact, name).weight), ir.DataType.UINT8, shape)
    node = ir.Node(
        DOMAIN,
        "MatMulNBits",
        [
            activations,
            _constant(graph, f"{name}.qweight", codes),
            _constant(graph, f"{name}.scales", ir.Tensor(packed.scales.astype(_numpy(weight)))),
            _constant(graph, f"{name}.zero_points", ir.Tensor(packed.zero_points)),
        ],
        [
            ir.AttrInt64("K", in_features),
            ir.AttrInt64("N", out_features),
            ir.AttrInt64("bits", packed.bits),
            ir.AttrInt64("block_size", packed.block_size),
            ir.AttrInt64("accuracy_level", accuracy_level),
        ],
        version=1,
        name=name,
    )
    new.append(node)
    old = product.outputs[0]
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{name}.product", old.type, old.shape
    if old.is_graph_output():  # the output head's: logits keep their name
        node.outputs[0].name, old.name = old.name, f"{old.name}.float"
    graph.insert_before(product, new)
    old.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    graph.remove(product, safe=True)
    graph.remove(transpose, safe=True)
    graph.initializers.pop(weight.name or "")


def _constant(graph: ir.Graph, name: str, tensor: ir.Tensor | ir.LazyTensor) -> ir.Value:
    tensor.name = name
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.initializers[name] = value
    return value
