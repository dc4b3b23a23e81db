"""What `vlmq-export inspect` shows of a folder that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping

from vlmq_export.formats.contract import Inspection, TensorRow
from vlmq_export.formats.in_transformers.read import QuantizedFolder


def inspection(
    folder: QuantizedFolder, kind: str, weights: int, stated: Mapping[str, object]
) -> Inspection:
    """What is in a folder.

    weights: the number of its quantized weights.
    stated: what its quantization_config says.
    """
    rows = [TensorRow(t.name, t.shape, t.dtype, t.nbytes) for t in folder.tensors.values()]
    names = {f"{module}.{part}" for module in folder.linears for part in folder.parts}
    packed = sum(t.nbytes for t in folder.tensors.values() if t.name in names)
    metadata = {key: _text(value) for key, value in stated.items()} | {
        "architecture": _text(folder.config.get("architectures")).strip('[]"'),
        "model_type": folder.family.model_type,
        "quantized linears": str(len(folder.linears)),
        "files": ", ".join(sorted({t.file for t in folder.tensors.values()})),
    }
    return Inspection(kind, metadata, rows, 8 * packed / weights if weights else 0.0)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
