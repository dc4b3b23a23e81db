"""What is in an ONNX folder or one of its graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vlmq_export.formats.base import Inspection, TensorRow
from vlmq_export.formats.onnx.read import GRAPHS, _check_external, _load, guarded


@guarded
def inspect(path: Path) -> Inspection:
    """Raises FormatError for what is damaged or points outside its folder."""
    from onnx import TensorProto, helper

    files = [path] if path.is_file() else [path / f"{g}.onnx" for g in GRAPHS]
    metadata: dict[str, str] = {}
    rows: list[TensorRow] = []
    quantized = stored = version = 0
    for file in files:
        model = _load(file)
        _check_external(file.parent, file.name, model)
        version = model.ir_version
        operators = Counter(n.op_type for n in model.graph.node)
        metadata[f"{file.name} inputs"] = ", ".join(i.name for i in model.graph.input if "past_key" not in i.name)
        metadata[f"{file.name} operators"] = ", ".join(f"{op} {n}" for op, n in operators.most_common(8))
        metadata[f"{file.name} opsets"] = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
        sizes = {}
        for t in model.graph.initializer:
            count = 1
            for d in t.dims:
                count *= d
            sizes[t.name] = count * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
            rows.append(TensorRow(t.name, tuple(t.dims), TensorProto.DataType.Name(t.data_type), sizes[t.name]))
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                attributes = {a.name: a.i for a in node.attribute}
                quantized += attributes["K"] * attributes["N"]
                stored += sum(sizes.get(i, 0) for i in node.input[1:])
                levels = metadata.setdefault("accuracy_level", str(attributes.get("accuracy_level", 0)))
                if levels != str(attributes.get("accuracy_level", 0)):
                    metadata["accuracy_level"] = "mixed"
    return Inspection(f"ONNX, IR version {version}", metadata, rows, 8 * stored / quantized if quantized else 0.0)
