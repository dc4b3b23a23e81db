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
    weights = sum(
        folder.tensors[f"{module}.qweight"].numel * 32 // folder.grid_of(module)[0]
        for module in folder.linears
    )
    kind = f"GPTQ {folder.version} safetensors"
    return inspection(folder, kind, weights, folder.quantization)
