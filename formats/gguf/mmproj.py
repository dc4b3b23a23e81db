"""The vision tower and the projector as llama.cpp's mmproj file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.complete import require_complete
from vlmq_export.formats.gguf.metadata import add_general, add_keys
from vlmq_export.formats.gguf.names import Place, vision_places, vision_to_hub
from vlmq_export.formats.gguf.params import image_params, vision_params
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.formats.gguf.writer import Entry, float_bytes, write_container
from vlmq_export.quantizer.artifact import Artifact

if TYPE_CHECKING:
    import gguf

ARCH = "clip"
CLASS_ROW = "vlmq.class_row"  # key: where the class token's position row is, last or first


def write_mmproj(
    artifact: Artifact, path: Path, dtype: str = "f16", name: str | None = None, class_row: str = "last"
) -> None:
    """`dtype` f16, f32 or q8_0 is that of the linears; patches, positions, norms and biases are F32 in all. `class_row`
    is for towers with a class token, see `names.vision_places`.

    Raises FormatError naming what cannot be written, or what the written file lacks.
    """
    p, image = vision_params(artifact.source_config), image_params(artifact.source)
    places = vision_places(p, class_row)
    total = sum(int(np.prod(place.shape)) for place in places.values())

    def metadata(writer: gguf.GGUFWriter) -> None:
        label = name or artifact.manifest.name
        add_general(writer, artifact, kind="mmproj", name=label, parameters=total, dominant=dtype.upper())
        add_keys(writer, p.keys() | image.keys() | ({CLASS_ROW: class_row} if p.graph.class_token else {}))

    write_container(path, ARCH, metadata, _entries(artifact, places, dtype))
    require_complete(path, artifact.source_config, artifact.source)


def stored_type(place: Place, dtype: str) -> str:
    """The GGML type of a tensor of the mmproj: rows that do not fill the blocks of `q8_0` stay in float16."""
    if not place.linear or dtype == "f32":
        return "F32"
    return "F16" if place.shape[-1] % TYPES[dtype.upper()].block else dtype.upper()


def _entries(artifact: Artifact, places: dict[str, Place], dtype: str) -> list[Entry]:
    hub_names, present = vision_to_hub(artifact.source_config), set(artifact.float_names())
    entries = []
    for name, place in places.items():
        if hub_names[name] not in present:
            raise FormatError(
                f"{artifact.path}: {hub_names[name]} is missing from the artifact; the mmproj would lack {name}"
            )
        kind = stored_type(place, dtype)
        entries.append(Entry(name, place.shape, kind, _data(artifact, hub_names[name], place, kind)))
    return entries


def _data(artifact: Artifact, hub: str, place: Place, kind: str):
    def read() -> np.ndarray:
        part = place.of(artifact.float_tensor(hub))
        if tuple(part.shape) != place.shape:
            raise FormatError(f"{hub}: shape {tuple(part.shape)} where config.json says {place.shape}")
        if kind == "Q8_0":
            import gguf

            return gguf.quantize(float_bytes(part, "F32"), gguf.GGMLQuantizationType.Q8_0)
        array = float_bytes(part, kind)
        if not np.isfinite(array).all():
            raise FormatError(f"{hub}: a value is beyond float16; use --mmproj f32")
        return array

    return read
