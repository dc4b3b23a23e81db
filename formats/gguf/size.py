"""What the two GGUF files weigh, from config.json, tokenizer and the headers of tensors alone.

The bytes of tensors, their descriptions, tokens and the keys of the architectures are exact, if the
block types are. For the keys that a file is known by, a bound stands in. So the files are never
larger than is said here, and smaller by a few thousand bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.files.container import source_type
from vlmq_export.formats.gguf.files.mmproj import stored_type
from vlmq_export.formats.gguf.files.tokenizer import Tokenizer
from vlmq_export.formats.gguf.tables.layout import Layout, Place
from vlmq_export.formats.gguf.tables.params import ImageParams
from vlmq_export.formats.gguf.types.exact import tower_home
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.formats.model_plan import PARTS, ModelPlan

_ALIGNMENT = 32  # bytes; each tensor begins at a multiple
# Bytes that a file's keys general.* and vlmq.* take at most, with its magic number and counts, and
# half the Modelfile. Names are at most 255 bytes long, and the title of a licence 120 characters.
_GENERAL_BYTES = 4096
_SHARD_BYTES = 256  # the same of each further file of a split text model
# Parts of the files that are tensors of their own → the name of the part.
_OWN_PARTS = {"token_embd.weight": "embedding", "output.weight": "head"}


def part_bytes(
    model: ModelPlan,
    layout: Layout,
    options: FormatOptions,
    kinds: Mapping[
        str, str | None
    ],  # hub module of the language model → its type, where it has one
    tokenizer: Tokenizer | None,  # None: it cannot be read, and does not count
    image: ImageParams | None,  # likewise
) -> dict[str, int]:
    """Part of both files → bytes: text, embedding, head, vision and metadata."""
    found: dict[str, int] = dict.fromkeys(PARTS, 0)
    dtypes = {t.name: t.dtype for t in model.floats}
    tower = vision_types(model, layout, options)
    for name, place in layout.text.items():
        kind = kinds.get(place.hub.removesuffix(".weight")) or (
            "F32"
            if place.wide or len(place.shape) == 1
            else source_type(dtypes.get(place.hub, "F32"))
        )
        found[_OWN_PARTS.get(name, "text")] += tensor_bytes(place.shape, kind)
    for name, place in layout.vision.items():
        found["vision"] += tensor_bytes(place.shape, tower[name])
    places = (layout.text, layout.vision)
    found["metadata"] += sum(_described(each) + _GENERAL_BYTES for each in places)
    found["metadata"] += _key_bytes(layout.text_params.keys() | layout.vision_params.keys())
    found["metadata"] += _key_bytes(image.keys()) if image else 0
    found["metadata"] += _key_bytes(tokenizer.keys()) if tokenizer else 0
    if limit := options.gguf_split_bytes:
        # Two files in a row hold more than the limit together.
        tensors = found["text"] + found["embedding"] + found["head"]
        shards = min(len(layout.text), 2 * (tensors // limit) + 1)
        found["metadata"] += _SHARD_BYTES * shards
    return found


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor in the file, with what fills up to the next."""
    size = prod(shape[:-1]) * TYPES[kind].row_bytes(shape[-1])
    return size + -size % _ALIGNMENT


def vision_types(model: ModelPlan, layout: Layout, options: FormatOptions) -> dict[str, str]:
    """GGUF name → type, of every tensor of the mmproj."""
    solved = {f"{x.name}.weight": tower_home(model.config, x.in_features) for x in model.tower}
    return {
        name: solved.get(place.hub) or stored_type(place, options.mmproj_dtype)
        for name, place in layout.vision.items()
    }


def _described(places: Mapping[str, Place]) -> int:
    """Bytes of the tensors' descriptions: name, number of dimensions, dimensions, type, offset."""
    sizes = [_value_bytes(name) + 4 + 8 * len(x.shape) + 4 + 8 for name, x in places.items()]
    return sum(sizes) + _ALIGNMENT


def _key_bytes(keys: Mapping[str, object]) -> int:
    """Bytes of keys with their values. A value stands behind the number of its type."""
    return sum(_value_bytes(key) + 4 + _value_bytes(value) for key, value in keys.items())


def _value_bytes(value: object) -> int:
    """Bytes of a value: a list has the type of its items and their number, a string its length."""
    if isinstance(value, list):
        return 12 + sum(map(_value_bytes, value))
    if isinstance(value, str):
        return 8 + len(value.encode("utf-8", "surrogatepass"))
    return 1 if isinstance(value, bool) else 4
