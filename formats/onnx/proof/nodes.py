"""L2: every MatMulNBits node alone, on random activations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmq_export.formats.onnx.proof.runner import run, session
from vlmq_export.formats.onnx.proof.whole_model import rank
from vlmq_export.formats.onnx.read import Linear, OnnxFolder
from vlmq_export.formats.proof.checks import Check, CheckSettings
from vlmq_export.formats.proof.reference import Reference

if TYPE_CHECKING:
    from onnx import GraphProto
    from onnxruntime import InferenceSession

LINEAR_ROWS = 64  # random rows that a node is run on: the worst output is then near the others
_HALF_ROUNDING = 2.0**-11  # what a float16 output may be off by itself


def linear_gate(in_features: int) -> float:
    """Error that float32 additions may cost an output over `in_features` columns.

    It is 2⁻²⁴·√in, in the unit of `_worst_output`. A running sum of K random terms rounds K times,
    by at most 2⁻²⁴ of a partial sum that grows as √i. If these roundings are independent they add
    up to 2⁻²⁴·√(K/6). Measured for K from 512 to 29568 were 0.28 to 0.33 of the gate at 4 bits over
    all outputs, less at 2 and 8, and 0.61 for the worst of 16384 outputs at K = 512.
    """
    return 2.0**-24 * math.sqrt(in_features)


def serialized(graph: GraphProto) -> bytes:
    """A model of this graph alone."""
    from onnx import helper

    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def node_session(
    linear: Linear, *, accuracy_level: int, threads: int, provider: str = "cpu"
) -> InferenceSession:
    """A model of one MatMulNBits node with the file's constants.

    Input "a" [M, in] has the type of the scales, and so has output "y" [M, out].
    """
    from onnx import helper, numpy_helper

    columns, rows = linear.in_features, linear.weight.shape[0]
    kind = helper.np_dtype_to_tensor_dtype(linear.scales.dtype)
    constants = {"b": linear.weight, "scales": linear.scales, "zero_points": linear.zero_points}
    node = helper.make_node(
        "MatMulNBits",
        ["a", *constants],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=linear.bits,
        block_size=linear.block_size,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("a", kind, ["m", columns])],
        [helper.make_tensor_value_info("y", kind, ["m", rows])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
    )
    return session(serialized(graph), threads=threads, provider=provider)


def table_session(table: Linear, threads: int) -> InferenceSession:
    """A model of one GatherBlockQuantized node with the file's constants.

    Output "y" [n, in] are the rows at input "ids", int64 [n], in the type of the scales.
    """
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = len(table.weight), table.in_features
    kind = helper.np_dtype_to_tensor_dtype(table.scales.dtype)
    constants = {"scales": table.scales, "zero_points": table.zero_points}
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "ids", *constants],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        bits=table.bits,
        block_size=table.block_size,
    )
    constants["codes"] = table.weight.reshape(rows, -1)
    graph = helper.make_graph(
        [node],
        "table",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", kind, ["n", columns])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
    )
    return session(serialized(graph), threads=threads)


@dataclass(frozen=True)
class _Error:
    """How far a node is from the product that it stands for."""

    value: float  # relative error
    linear: str
    gate: float

    @property
    def share(self) -> float:
        """The part of the gate that the error takes."""
        return self.value / self.gate if self.gate else math.inf


def linear_rows(
    written: OnnxFolder, reference: Reference, settings: CheckSettings, provider: str
) -> list[Check]:
    """Two rows, over all nodes: level 0 computes in float32, level 4 rounds activations to int8.

    The gate is that of the linear which is nearest to its own. Level 4 has none.
    """
    exact, rounded = _errors(written, reference, settings, provider)
    worst = max(exact, key=lambda e: rank(e.share))
    half = " + 2⁻¹¹ of a float16 output" if written.half else ""
    rows = [
        Check.at_most(
            "onnx",
            "L2",
            "each MatMulNBits at level 0",
            worst.value,
            worst.gate,
            unit="rel",
            compared=len(exact),
            detail=f"float32 accumulation against a float64 product: 2⁻²⁴·√in{half}",
            worst=worst.linear,
        )
    ]
    if rounded:
        worst = max(rounded, key=lambda e: rank(e.value))
        rows.append(
            Check(
                "onnx",
                "L2",
                "each MatMulNBits at level 4",
                "info",
                worst.value,
                unit="rel",
                compared=len(rounded),
                detail="int8 activations: what the fast kernel gives up",
                worst=worst.linear,
            )
        )
    return rows


def _errors(
    written: OnnxFolder, reference: Reference, settings: CheckSettings, provider: str
) -> tuple[list[_Error], list[_Error]]:
    """The errors at levels 0 and 4, against a float64 product with the reference's weights.

    A linear that the file lacks is infinitely wrong at level 0.
    """
    errors: dict[int, list[_Error]] = {0: [], 4: []}
    rng = np.random.default_rng(0)
    for name, node_name in _products(reference):
        weights = reference.weights.array(f"{name}.weight").astype(np.float64)
        x = rng.standard_normal((LINEAR_ROWS, weights.shape[1])).astype(np.float32)
        if node_name not in written.linears:
            errors[0].append(_Error(math.inf, f"{node_name} (missing)", 0.0))
            continue
        linear = written.linear(node_name)
        x = x.astype(linear.scales.dtype)
        given = x if linear.order is None else x[:, linear.order]
        want = x.astype(np.float64) @ weights.T
        gate = linear_gate(weights.shape[1]) + (_HALF_ROUNDING if written.half else 0)
        for level, found in errors.items():
            node = node_session(
                linear, accuracy_level=level, threads=settings.threads, provider=provider
            )
            got = run(node, {"a": given}, ["y"])[0]
            found.append(_Error(_worst_output(got, want, x, weights), node_name, gate))
    return errors[0], errors[4]


def _products(reference: Reference) -> Iterator[tuple[str, str]]:
    """(hub name of a quantized matrix, name of the node that multiplies by it).

    An embedding is looked up, and multiplied by where it is the output matrix too.
    """
    for name in reference.weights.linears:
        if name != reference.architecture.family.embedding:
            yield name, name
        elif reference.architecture.tied:
            yield name, "lm_head"


def _worst_output(got: np.ndarray, want: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    """The largest error of an output, relative to ‖w row‖·‖X‖/√K, its size for random inputs.

    got, want: [M, N]; x: [M, K]; weight: [N, K]. Every output is measured by its own row of the
    weight. Over all of them together, the largest row would hide an error in the others.
    """
    lost = np.linalg.norm(got.astype(np.float64) - want, axis=0)
    columns = weight.shape[1]
    size = np.linalg.norm(weight, axis=1) * np.linalg.norm(x.astype(np.float64)) / columns**0.5
    return float((lost / np.maximum(size, np.finfo(np.float64).tiny)).max())
