"""The metadata of a GGUF file beyond the keys of its architecture and of its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlmq_export._version import __version__
from vlmq_export.formats.gguf.types.mix import FILE_TYPES
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig

if TYPE_CHECKING:
    import gguf


def add_general(
    writer: gguf.GGUFWriter,
    artifact: Artifact,
    *,
    kind: str,  # model or mmproj
    name: str,
    parameters: int,  # number of weights of this file
    dominant: str,  # a mix, or the type that most weights have
) -> None:
    """Add the keys general.* and, as vlmq.*, where the integers came from."""
    import gguf

    writer.add_type(kind)
    writer.add_name(name)
    _add_name_parts(writer, name, parameters)
    file_type = FILE_TYPES[dominant] if dominant in FILE_TYPES else TYPES[dominant].file_type
    assert file_type is not None, f"{dominant} is no type that a file is mostly of"
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_quantized_by(f"vlmq-export {__version__}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, artifact.manifest.name)
    if artifact.manifest.repository:
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{artifact.manifest.repository}")
    licenses = (artifact.source / file for file in ("LICENSE", "LICENSE.txt"))
    if text := next((file for file in licenses if file.is_file()), None):
        _add_license(writer, text.read_text("utf-8", errors="replace"))
    _add_recipe(writer, artifact.config)


def _add_name_parts(writer: gguf.GGUFWriter, name: str, parameters: int) -> None:
    """Add the parts of a model's name as gguf-py tells them apart, and its size."""
    import gguf

    parts = gguf.Metadata.get_model_id_components(name, parameters)
    _, _, basename, finetune, version, label = parts
    if basename:
        writer.add_basename(basename)
    if finetune:
        writer.add_finetune(finetune)
    if version:
        writer.add_version(version)
    writer.add_size_label(label or gguf.size_label(parameters, 0, 0, 0))


def _add_license(writer: gguf.GGUFWriter, text: str) -> None:
    """Add the SPDX id of the two licenses that are recognized by their titles, else the title."""
    title = next((line.strip() for line in text.splitlines() if line.strip()), "")
    spdx = {"Apache License": "apache-2.0", "MIT License": "mit"}.get(title)
    if spdx:
        writer.add_license(spdx)
    elif title:
        writer.add_license("other")
        writer.add_license_name(title[:120])


def _add_recipe(writer: gguf.GGUFWriter, config: QuantConfig) -> None:
    """Add the recipe. With block types, the method alone says something of all linears."""
    if config.types:
        writer.add_string("vlmq.method", config.method)
        return
    own = () if config.widths else ("bits", "symmetric")  # else each linear has its own
    for key in ("method", *own, "group_size", "act_order"):
        writer.add_string(f"vlmq.{key}", str(getattr(config, key)))


def add_keys(writer: gguf.GGUFWriter, keys: Mapping[str, object]) -> None:
    """Add keys with the GGUF types that llama.cpp reads them as.

    Whole numbers are uint32, and int32 in arrays. Floats are float32.
    """
    import gguf

    kinds = gguf.GGUFValueType
    single = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    for key, value in keys.items():
        if isinstance(value, list):
            kind = type(value[0])
            inner = kinds.INT32 if kind is int else single[kind]
            writer.add_key_value(key, value, kinds.ARRAY, sub_type=inner)
        else:
            writer.add_key_value(key, value, single[type(value)])


def file_stem(name: str, parameters: int, encoding: str) -> str:
    """`<Name>-<SizeLabel>-<Encoding>` by the GGUF naming convention.

    A size that is in the name already stays there. Characters that cannot stand in a file name
    become dashes. A leading `mmproj-` is removed, because it marks the other file.
    """
    import gguf

    clean = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII)[:100].strip("-.")
    clean = clean.removeprefix("mmproj-") or "model"
    parts = gguf.Metadata.get_model_id_components(clean, parameters)
    _, _, basename, finetune, version, label = parts
    if not basename or not label:
        basename, finetune, version, label = clean, None, None, gguf.size_label(parameters, 0, 0, 0)
    return gguf.naming_convention(None, basename, finetune, version, label, encoding)
