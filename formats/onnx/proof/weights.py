"""L1: every weight of a folder, by our reader and by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vlmq_export.formats.onnx.proof.nodes import node_session, serialized
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

    The identity as input of a node returns its weights. Float constants come back as outputs.
    """

    def read(name: str) -> np.ndarray | None:
        module = name.removesuffix(".weight")
        if module in written.linears:
            return identity_through_node(written.linear(module), settings.threads)
        names = _copies(name, reference)
        if any(n not in written.floats for n in names):
            return None
        return agreeing(
            [_constant_through_runtime(written, t) for n in names for t in written.floats[n]]
        )

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
    """Floats that the file holds in float16 are compared with the reference's rounded to it.

    Integers and their scales are never rounded.
    """
    items = (
        (n, want.astype(written.stored_as(n), copy=False)) for n, want in reference.weights.items()
    )
    detail = "float weights against the reference's rounded to float16" if written.half else ""
    return compare_weights("onnx", name, items, read, count=reference.weights.count, detail=detail)


def _constant_through_runtime(written: OnnxFolder, tensor: TensorProto) -> np.ndarray:
    """A constant of the file as the output of a graph that only returns it."""
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node("Identity", [tensor.name], ["value"])],
        "constant",
        [],
        [helper.make_tensor_value_info("value", tensor.data_type, list(tensor.dims))],
        [tensor],
    )
    return run(session(serialized(graph), threads=1, folder=written.path), {})[0]


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
