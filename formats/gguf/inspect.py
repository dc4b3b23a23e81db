"""What `vlmq-export inspect` prints of a GGUF file, or of an exported folder with its two files."""

from __future__ import annotations

from math import prod
from pathlib import Path

from vlmq_export.formats.contract import Inspection, TensorRow
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.types.table import TYPES

_LONG = 80  # the most characters of a value that are shown


def inspect(path: str | Path) -> Inspection:
    """Metadata and tensors of a file, or of both files of a folder.

    The bits per weight are those of the tensors that have a block type. Raises FormatError for a
    damaged file.
    """
    path = Path(path)
    files = [GGUFFile(f) for f in (find_files(path) if path.is_dir() else [path])]
    metadata: dict[str, str] = {}
    rows: list[TensorRow] = []
    bits = weights = 0
    for file in files:
        prefix = "" if len(files) == 1 else f"{file.path.name}: "
        metadata |= {prefix + _shown(key): _shown(value) for key, value in file.metadata.items()}
        for t in file.tensors.values():
            rows.append(TensorRow(_shown(t.name), t.shape, t.type, t.nbytes))
            if TYPES[t.type].block > 1:
                bits, weights = bits + 8 * t.nbytes, weights + prod(t.shape)
    kind = "GGUF v3" if len(files) == 1 else "GGUF v3, text model and mmproj"
    return Inspection(kind, metadata, rows, bits / weights if weights else 0.0)


def _shown(value: object) -> str:
    """A value as one line that every terminal can print, whatever the file holds."""
    if isinstance(value, list):
        head = ", ".join(_shown(v) for v in value[:4])
        return f"[{head}{', …' if len(value) > 4 else ''}] ({len(value)})"
    text = str(value)
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_LONG]
    )
    return shown if len(text) <= _LONG else f"{shown}… ({len(text)} characters)"
