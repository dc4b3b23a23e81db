"""What `vlmq-export inspect` shows of a GPTQ folder."""

from __future__ import annotations

from pathlib import Path

from vlmq_export.formats.contract import Inspection
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.in_transformers.inspect import inspection


def inspect(path: str | Path) -> Inspection:
    """What is in a folder, or in the folder of a safetensors file.

    Raises FormatError if it is not GPTQ, or damaged.
    """
    path = Path(path)
    folder = GptqFolder(path if path.is_dir() else path.parent)
    codes = (folder.tensors[f"{module}.qweight"] for module in folder.linears)
    weights = sum(t.numel * 32 // folder.bits for t in codes)
    kind = f"GPTQ {folder.version} safetensors"
    return inspection(folder, kind, weights, folder.quantization)
