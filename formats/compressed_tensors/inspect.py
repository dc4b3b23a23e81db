"""What `vlmq-export inspect` shows of a compressed-tensors folder."""

from __future__ import annotations

from pathlib import Path

from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.contract import Inspection
from vlmq_export.formats.in_transformers.inspect import inspection


def inspect(path: str | Path) -> Inspection:
    """What is in a folder, or in the folder of a safetensors file.

    Raises FormatError if it is of another format, or damaged.
    """
    path = Path(path)
    folder = CompressedFolder(path if path.is_dir() else path.parent)
    weights = 0
    for module in folder.linears:
        n, words = folder.tensors[f"{module}.weight_packed"].shape
        weights += n * (words * 32 // folder.grid_of(module).bits)
    q = folder.quantization
    grid = folder.grid
    stated = {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "head bits": folder.head_grid.bits,
        **{key: q.get(key) for key in ("format", "ignore", "version", "quantizer")},
    }
    if not any(module.endswith("lm_head") for module in folder.linears):
        del stated["head bits"]
    return inspection(folder, "compressed-tensors pack-quantized", weights, stated)
