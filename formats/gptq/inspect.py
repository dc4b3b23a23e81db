"""What `vlmq-export inspect` shows of a GPTQ folder."""

from __future__ import annotations

import json
from pathlib import Path

from vlmq_export.formats.contract import Inspection, TensorRow
from vlmq_export.formats.gptq.read import PARTS, GptqFolder


def inspect(path: str | Path) -> Inspection:
    """What is in a folder, or in the folder of a safetensors file.

    Raises FormatError if it is not GPTQ, or damaged.
    """
    path = Path(path)
    folder = GptqFolder(path if path.is_dir() else path.parent)
    rows = [TensorRow(t.name, t.shape, t.dtype, t.nbytes) for t in folder.tensors.values()]
    names = [f"{module}.{part}" for module in folder.linears for part in PARTS]
    parts = [folder.tensors[name] for name in names if name in folder.tensors]
    weights = sum(t.numel * 32 // folder.bits for t in parts if t.name.endswith(".qweight"))
    metadata = {key: _text(value) for key, value in folder.quantization.items()} | {
        "architecture": _text(folder.config.get("architectures")).strip('[]"'),
        "model_type": folder.family.model_type,
        "quantized linears": str(len(folder.linears)),
        "files": ", ".join(sorted({t.file for t in folder.tensors.values()})),
    }
    bits = 8 * sum(t.nbytes for t in parts) / weights if weights else 0.0
    return Inspection(f"GPTQ {folder.version} safetensors", metadata, rows, bits)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
