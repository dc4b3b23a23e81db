"""Writes the vision tower and the projector as llama.cpp's mmproj file."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.completeness import require_complete
from vlmq_export.formats.gguf.files.container import Entry, float_bytes, write_container
from vlmq_export.formats.gguf.files.metadata import add_general, add_keys
from vlmq_export.formats.gguf.files.text import bias_of, decoded, packed
from vlmq_export.formats.gguf.tables.layout import Layout, Place
from vlmq_export.formats.gguf.tables.params import image_params
from vlmq_export.formats.gguf.types.exact import home_of, planned_home
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import VISION_GROUP

if TYPE_CHECKING:
    import gguf

ARCH = "clip"
CLASS_ROW = "vlmq.class_row"  # key that says where the class token's position row is: last or first


def write_mmproj(
    artifact: Artifact,
    layout: Layout,
    path: Path,
    dtype: str = "f16",  # of the linears that are not quantized: f16, f32 or q8_0
    name: str | None = None,  # general.name; None: that of the source model
) -> None:
    """Write the file. Patch and position embeddings, norms and biases are F32 whatever `dtype` is.

    A linear that is quantized in the artifact has the block type that holds its integers.

    Raises FormatError for what cannot be written, and for what the written file lacks.
    """
    p, image = layout.vision_params, image_params(artifact.source)
    row = {CLASS_ROW: layout.class_row} if p.graph.class_token else {}
    total = sum(prod(place.shape) for place in layout.vision.values())

    def metadata(writer: gguf.GGUFWriter) -> None:
        add_general(
            writer,
            artifact,
            kind="mmproj",
            name=name or artifact.manifest.name,
            parameters=total,
            dominant=dominant_type(artifact, dtype),
        )
        add_keys(writer, p.keys() | image.keys() | row)

    write_container(path, ARCH, metadata, _entries(artifact, layout.vision, dtype))
    require_complete(path, layout, artifact.source)


def dominant_type(artifact: Artifact, dtype: str) -> str:
    """The type that the file is named after: that of the tower's integers, where it has some."""
    config = artifact.config
    if not config.vision_bits:
        return dtype.upper()
    return config.vision_type or planned_home(config.vision, VISION_GROUP) or dtype.upper()


def stored_type(place: Place, dtype: str) -> str:
    """The GGML type of a tensor of the mmproj that is not quantized in the artifact.

    Linears whose rows do not fill the blocks of `q8_0` stay in float16. No published tower has any.
    """
    if not place.linear or dtype == "f32":
        return "F32"
    return "F16" if place.shape[-1] % TYPES[dtype.upper()].block else dtype.upper()


def _entries(artifact: Artifact, places: dict[str, Place], dtype: str) -> list[Entry]:
    """The tensors of the file. Raises FormatError where the artifact lacks one."""
    present, entries = set(artifact.float_names()), []
    for name, place in places.items():
        linear = place.hub.rpartition(".")[0]
        if linear in artifact.records:
            entries.append(_quantized(artifact, name, place, linear))
            continue
        if place.hub not in present:
            raise FormatError(
                f"{artifact.path}: {place.hub} is missing from the artifact; the mmproj would lack"
                f" {name}"
            )
        kind = stored_type(place, dtype)
        entries.append(Entry(name, place.shape, kind, _data(artifact, place, kind)))
    return entries


def _quantized(artifact: Artifact, name: str, place: Place, linear: str) -> Entry:
    """The blocks of a linear that was solved, its bias, or numbers that it decodes to."""
    if not place.linear:
        whole = place.hub.endswith(".weight")
        data = decoded(artifact, place) if whole else bias_of(artifact, linear, place)
        return Entry(name, place.shape, "F32", data)
    kind = home_of(artifact.linear(linear))
    return Entry(name, place.shape, kind, packed(artifact, place, kind))


def _data(artifact: Artifact, place: Place, kind: str) -> Callable[[], np.ndarray]:
    """Reads the source tensor and makes the bytes of type `kind` when it is called.

    Raises FormatError for another shape than config.json says, and for values beyond float16.
    """
    hub = place.hub

    def read() -> np.ndarray:
        part = place.of(artifact.float_tensor(hub))
        if tuple(part.shape) != place.shape:
            raise FormatError(
                f"{hub}: shape {place.inner(part.shape)} where config.json says"
                f" {place.inner(place.shape)}"
            )
        if kind == "Q8_0":
            import gguf

            return gguf.quantize(float_bytes(part, "F32"), gguf.GGMLQuantizationType.Q8_0)
        array = float_bytes(part, kind)
        if not np.isfinite(array).all():
            raise FormatError(f"{hub}: a value is beyond float16; use --mmproj f32")
        return array

    return read
