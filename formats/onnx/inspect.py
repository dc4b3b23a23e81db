"""What `vlmq-export inspect` shows of an ONNX folder, or of one of its graphs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from vlmq_export.formats.contract import Inspection, TensorRow
from vlmq_export.formats.onnx.read import GRAPHS, check_external, guarded, load_graph, stored_inputs

if TYPE_CHECKING:
    from onnx import ModelProto


@guarded
def inspect(path: Path) -> Inspection:
    """What is in a folder or a graph.

    Raises FormatError for a file that is damaged, or whose data are outside its folder.
    """
    files = [path] if path.is_file() else [path / f"{g}.onnx" for g in GRAPHS]
    metadata: dict[str, str] = {}
    rows: list[TensorRow] = []
    quantized = stored = version = 0
    for file in files:
        model = load_graph(file)
        check_external(file.parent, file.name, model)
        version = model.ir_version
        metadata |= _described(file.name, model)
        own = _rows(model)
        rows += own
        sizes = {row.name: row.nbytes for row in own}
        producers = {o: n for n in model.graph.node for o in n.output}
        for node in model.graph.node:
            if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
                continue
            attributes = {a.name: a.i for a in node.attribute}
            stored += sum(sizes.get(name, 0) for name in stored_inputs(node, producers))
            if node.op_type == "GatherBlockQuantized":  # codes of whole bytes
                quantized += 8 * sizes[node.input[0]] // attributes["bits"]
                continue
            quantized += attributes["K"] * attributes["N"]
            level = str(attributes.get("accuracy_level", 0))
            if metadata.setdefault("accuracy_level", level) != level:
                metadata["accuracy_level"] = "mixed"
    bits = 8 * stored / quantized if quantized else 0.0
    return Inspection(f"ONNX, IR version {version}", metadata, rows, bits)


def _described(name: str, model: ModelProto) -> dict[str, str]:
    """Inputs, most frequent operators and opsets of a graph."""
    operators = Counter(node.op_type for node in model.graph.node).most_common(8)
    inputs = [i.name for i in model.graph.input if "past_key" not in i.name]
    opsets = [f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import]
    return {
        f"{name} inputs": ", ".join(inputs),
        f"{name} operators": ", ".join(f"{op} {n}" for op, n in operators),
        f"{name} opsets": ", ".join(opsets),
    }


def _rows(model: ModelProto) -> list[TensorRow]:
    """The constants of a graph."""
    from onnx import TensorProto, helper

    rows = []
    for t in model.graph.initializer:
        size = math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        kind = TensorProto.DataType.Name(t.data_type)
        rows.append(TensorRow(t.name, tuple(t.dims), kind, size))
    return rows
