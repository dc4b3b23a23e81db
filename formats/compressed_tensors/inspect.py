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
    heads = [name for name in folder.linears if name.endswith("lm_head")]
    tower = [n for n in folder.linears if folder.family.is_vision(folder.hub_name(n))]
    used = [folder.grid_of(name) for name in folder.linears if name not in (*heads, *tower)]
    widths = sorted({grid.bits for grid in used})
    stated = {
        "bits": ", ".join(str(bits) for bits in widths),
        "group_size": used[0].group_size if used else None,
        "sym": used[0].symmetric if used else None,
        **({"head bits": folder.grid_of(heads[0]).bits} if heads else {}),
        **({"vision bits": folder.grid_of(tower[0]).bits} if tower else {}),
        **{key: q.get(key) for key in ("format", "ignore", "version", "quantizer")},
    }
    return inspection(folder, "compressed-tensors pack-quantized", weights, stated)
