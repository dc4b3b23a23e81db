"""The float32 twin of a GGUF file: each tensor as the float32 numbers that it decodes to.

llama.cpp rounds the inputs of block types to 8 bits, so that the logits of a shipped file cannot
show a small fault. Its twin has the same metadata and the same names, and is computed in float32
throughout. It is made from the shipped file and nothing else. A bias that is missing there, or a
rope base that is wrong there, is missing or wrong in the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vlmq_export.formats.gguf.files.container import Entry, write_container
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.proof.reference import Reference

# Keys that the writer of the container adds itself, and one that is no longer true.
_OWN_KEYS = ("general.architecture", "general.alignment", "general.file_type")


def write_twin(shipped: Path, path: Path) -> None:
    """Write the twin of a text model. Raises FormatError when `shipped` is damaged."""
    copy_container(shipped, path, change=lambda _, array: array)


def copy_container(
    shipped: Path, path: Path, *, change: Callable[[str, np.ndarray], np.ndarray]
) -> None:
    """A copy of a file in float32.

    change: makes of a tensor's name and values other values of the same shape.
    """
    import gguf

    file = GGUFFile(shipped)

    def data(name: str) -> np.ndarray:
        return np.ascontiguousarray(change(name, file.array(name)), np.float32)

    entries = [
        Entry(name, t.shape, "F32", lambda name=name: data(name))
        for name, t in file.tensors.items()
    ]
    _rewrite(file, path, entries, int(gguf.LlamaFileType.ALL_F32))


def copy_types(shipped: Path, path: Path, blocks: Callable[[str, str], np.ndarray | None]) -> None:
    """A copy of a file with another quantization of its tensors.

    blocks: makes of a tensor's name and type the bytes of its blocks, or None to keep those of the
        file.
    """
    file = GGUFFile(shipped)

    def data(name: str) -> np.ndarray:
        own = blocks(name, file.tensors[name].type)
        return file.raw(name) if own is None else own

    entries = [
        Entry(name, t.shape, t.type, lambda name=name: data(name))
        for name, t in file.tensors.items()
    ]
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
def decoded_tower(reference: Reference, layout: Layout, mmproj: Path) -> Iterator[None]:
    """The reference with the matrices of an mmproj in its vision tower.

    Their rows go back to where they are in the source: a fused matrix has three parts in the file,
    and rotary pairs stand side by side there. Zeros behind the MLP are left out.
    """
    file, linears = GGUFFile(mmproj), {n: x for n, x in layout.vision.items() if x.linear}
    modules = {place.module for place in linears.values()}
    before = {module: reference.model.get_parameter(module).data for module in modules}
    after = {module: data.clone() for module, data in before.items()}
    for name, place in linears.items():
        data, array = after[place.module], torch.from_numpy(file.array(name).copy())
        rows = torch.arange(len(data))
        rows = place.part(rows) if place.part else rows  # of the source, in the file's order
        data[rows] = array[: len(rows), : data.shape[1]]
    try:
        for module, data in after.items():
            reference.model.get_parameter(module).data = data
        yield
    finally:
        for module, data in before.items():
            reference.model.get_parameter(module).data = data
