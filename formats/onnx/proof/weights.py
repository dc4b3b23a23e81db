"""L1: every weight of a folder, by our reader and by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vlmq_export.formats.onnx.proof.nodes import node_session, serialized, table_session
from vlmq_export.formats.onnx.proof.runner import run, session
from vlmq_export.formats.onnx.read import Linear, OnnxFolder, agreeing
from vlmq_export.formats.proof.checks import Check, CheckSettings, compare_weights
from vlmq_export.formats.proof.reference import Reference

if TYPE_CHECKING:
    from onnx import TensorProto


def own_reader(written: OnnxFolder, reference: Reference) -> list[Check]:
    """One row: the weights by `read.py`."""

    def read(name: str) -> np.ndarray | None:
        copies = [written.weight(n) for n in _copies(name, reference)]
        found = [copy for copy in copies if copy is not None]
        return agreeing(found) if len(found) == len(copies) else None

    return [_compare("weights by our reader", written, reference, read)]


def runtime_reader(
    written: OnnxFolder, reference: Reference, settings: CheckSettings
) -> list[Check]:
    """One row: the weights as ONNX Runtime decodes them.

    The identity as input of a node returns its weights, and so do all ids as input of a table.
    Float constants come back as outputs.
    """

    def read(name: str) -> np.ndarray | None:
        copies = [_through_runtime(written, n, settings.threads) for n in _copies(name, reference)]
        return agreeing([array for found in copies for array in found]) if all(copies) else None

    name = "weights by ONNX Runtime (identity through each node)"
    return [_compare(name, written, reference, read)]


def _copies(name: str, reference: Reference) -> list[str]:
    """Hub names that must all hold the weight `name`.

    A tied output matrix has no weight of its own, and is a second copy of the embedding.
    """
    own_head = any(n.endswith("lm_head.weight") for n in reference.weights.names())
    tied = name.endswith("embed_tokens.weight") and not own_head
    return [name, "lm_head.weight"] if tied else [name]


def _compare(
    name: str,
    written: OnnxFolder,
    reference: Reference,
    read: Callable[[str], np.ndarray | None],
) -> Check:
    """Floats of a float16 decoder are compared with the reference's rounded to float16.

    Integers and their scales are never rounded.
    """
    items = (
        (n, want.astype(written.rounded_to(n), copy=False)) for n, want in reference.weights.items()
    )
    detail = "float weights against the reference's rounded to float16" if written.half else ""
    return compare_weights("onnx", name, items, read, count=reference.weights.count, detail=detail)


def _through_runtime(written: OnnxFolder, name: str, threads: int) -> list[np.ndarray]:
    """What the runtime says of a weight: once for each constant. Empty where the file lacks it."""
    module = name.removesuffix(".weight")
    if module not in written.linears:
        return [_constant_through_runtime(written, t) for t in written.floats.get(name, [])]
    linear = written.linear(module)
    if linear.looked_up:
        return [every_row(linear, threads)]
    return [identity_through_node(linear, threads)]


def _constant_through_runtime(written: OnnxFolder, tensor: TensorProto) -> np.ndarray:
    """A constant of the file as float32, the output of a graph that only casts it."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Cast", [tensor.name], ["value"], to=TensorProto.FLOAT)],
        "constant",
        [],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, list(tensor.dims))],
        [tensor],
    )
    return run(session(serialized(graph), threads=1, folder=written.path), {})[0]


def every_row(table: Linear, threads: int) -> np.ndarray:
    """The rows of a table as the runtime decodes them, float32 [out, in]. Scales are widened."""
    wide = replace(table, scales=table.scales.astype(np.float32))
    return run(table_session(wide, threads), {"ids": np.arange(len(table.scales))}, ["y"])[0]


def identity_through_node(linear: Linear, threads: int, rows: int = 1024) -> np.ndarray:
    """The weights that the runtime's kernel decodes at level 0, columns in their original order.

    rows: how many rows of the identity are run at a time.

    float32 [out, in]. Scales are widened to float32, because a float16 output would round what is
    decoded.
    """
    wide = replace(linear, scales=linear.scales.astype(np.float32))
    node = node_session(wide, accuracy_level=0, threads=threads)
    columns = linear.in_features
    gathered = np.empty((linear.weight.shape[0], columns), np.float32)
    for start in range(0, columns, rows):
        stop = min(start + rows, columns)
        eye = np.zeros((stop - start, columns), np.float32)
        eye[np.arange(stop - start), np.arange(start, stop)] = 1
        gathered[:, start:stop] = run(node, {"a": eye}, ["y"])[0].T
    return linear.original_order(gathered)
