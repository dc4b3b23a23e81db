"""The float32 twin of a shipped GGUF: same metadata, same names, every tensor as the float32 numbers that it decodes to.

llama.cpp rounds the inputs of block types to 8 bits, so the shipped file's logits cannot show a small fault. Its twin is
computed in float32 throughout and must match the reference to 5e-6. It is made from the shipped file and nothing else:
a missing bias or a wrong rope base there is missing or wrong here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vlmq_export.formats.gguf.names import vision_places
from vlmq_export.formats.gguf.params import vision_params
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.writer import Entry, write_container
from vlmq_export.reference import Reference

_OWN_KEYS = ("general.architecture", "general.alignment", "general.file_type")  # the container's, or no longer true


def write_twin(shipped: Path, path: Path) -> None:
    """Write the twin of a text model. Raises FormatError when `shipped` is damaged."""
    copy_container(shipped, path, change=lambda _, array: array)


def copy_container(shipped: Path, path: Path, *, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """A file's metadata and tensors, in float32, each through `change(name, array)`, which keeps its shape."""
    import gguf

    file = GGUFFile(shipped)

    def data(name: str) -> np.ndarray:
        return np.ascontiguousarray(change(name, file.array(name)), np.float32)

    entries = [Entry(name, t.shape, "F32", lambda name=name: data(name)) for name, t in file.tensors.items()]
    _rewrite(file, path, entries, int(gguf.LlamaFileType.ALL_F32))


def copy_types(shipped: Path, path: Path, blocks: Callable[[str, str], np.ndarray | None]) -> None:
    """A file's metadata and types, with the bytes of `blocks(name, type)` where it gives some: another's quantization."""
    file = GGUFFile(shipped)

    def data(name: str) -> np.ndarray:
        own = blocks(name, file.tensors[name].type)
        return file.raw(name) if own is None else own

    entries = [Entry(name, t.shape, t.type, lambda name=name: data(name)) for name, t in file.tensors.items()]
    _rewrite(file, path, entries, file.metadata["general.file_type"])


def _rewrite(file: GGUFFile, path: Path, entries: list[Entry], file_type: int) -> None:
    import gguf

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_file_type(file_type)
        for key, value in file.metadata.items():
            kind = gguf.GGUFValueType(file.types[key])
            if key in _OWN_KEYS or key.startswith("split."):
                continue
            if isinstance(value, list):
                if value:
                    writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(key, value, kind)

    write_container(path, file.metadata.get("general.architecture", ""), metadata, entries)


@contextmanager
def decoded_tower(reference: Reference, mmproj: Path) -> Iterator[None]:
    """The reference with the matrices of an mmproj in its vision tower; the thirds of a fused one are put together."""
    file, parts = GGUFFile(mmproj), defaultdict(list)
    for name, place in vision_places(vision_params(reference.config)).items():
        if place.linear:
            parts[place.module].append(torch.from_numpy(file.array(name).copy()))
    before = {module: reference.model.get_parameter(module).data for module in parts}
    try:
        for module, found in parts.items():
            reference.model.get_parameter(module).data = torch.cat(found)
        yield
    finally:
        for module, data in before.items():
            reference.model.get_parameter(module).data = data
