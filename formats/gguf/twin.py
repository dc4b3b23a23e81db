"""The float32 twin of a shipped GGUF: same metadata, same names, every tensor as the float32 numbers that it decodes to.

llama.cpp rounds the inputs of block types to 8 bits, so the shipped file's logits cannot show a small fault. Its twin is
computed in float32 throughout and must match the reference to 5e-6. It is made from the shipped file and nothing else:
a missing bias or a wrong rope base there is missing or wrong here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.writer import Entry, write_container

_OWN_KEYS = ("general.architecture", "general.alignment", "general.file_type")  # the container's, or no longer true


def write_twin(shipped: Path, path: Path) -> None:
    """Write the twin of a text model. Raises FormatError when `shipped` is damaged."""
    import gguf

    file = GGUFFile(shipped)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for key, value in file.metadata.items():
            kind = gguf.GGUFValueType(file.types[key])
            if key in _OWN_KEYS:
                continue
            if isinstance(value, list):
                if value:
                    writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(key, value, kind)

    def entry(name: str) -> Entry:
        return Entry(name, file.tensors[name].shape, "F32", lambda: np.ascontiguousarray(file.array(name), np.float32))

    write_container(
        path, file.metadata.get("general.architecture", ""), metadata, [entry(name) for name in file.tensors]
    )
