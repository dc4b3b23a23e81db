"""The vision tower and the projector as llama.cpp's mmproj file, for Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.complete import require_complete
from vlmq_export.formats.gguf.metadata import add_general
from vlmq_export.formats.gguf.names import halved, vision_shapes, vision_to_hub
from vlmq_export.formats.gguf.params import ImageParams, VisionParams, image_params, vision_params
from vlmq_export.formats.gguf.writer import Entry, float_bytes, write_container
from vlmq_export.quantizer.artifact import Artifact

if TYPE_CHECKING:
    import gguf

ARCH = "clip"
_DUMMY_IMAGE_SIZE = 560  # required key; the Qwen towers take any size


def write_mmproj(artifact: Artifact, path: Path, dtype: str = "f16", name: str | None = None) -> None:
    """`dtype` f16 or f32 is that of the linears; patches, norms and biases are F32 in both.

    Raises FormatError naming what cannot be written, or what the written file lacks.
    """
    config = artifact.source_config
    p, image = vision_params(config), image_params(artifact.source)
    total = sum(int(np.prod(s)) for s in vision_shapes(p).values())

    def metadata(writer: gguf.GGUFWriter) -> None:
        label = name or artifact.manifest.name
        add_general(writer, artifact, kind="mmproj", name=label, parameters=total, dominant=dtype.upper())
        _add_architecture(writer, p, image)

    write_container(path, ARCH, metadata, _entries(artifact, p, dtype))
    require_complete(path, artifact.source_config, artifact.source)


def _add_architecture(writer: gguf.GGUFWriter, p: VisionParams, image: ImageParams) -> None:
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(p.projector)
    writer.add_vision_projection_dim(p.projection)
    writer.add_vision_image_size(_DUMMY_IMAGE_SIZE)
    writer.add_vision_patch_size(p.patch)
    writer.add_vision_embedding_length(p.hidden)
    writer.add_vision_feed_forward_length(p.feed_forward)
    writer.add_vision_block_count(p.layers)
    writer.add_vision_head_count(p.heads)
    writer.add_vision_attention_layernorm_eps(p.eps)
    writer.add_vision_image_mean(list(image.mean))
    writer.add_vision_image_std(list(image.std))
    if image.min_pixels and image.max_pixels:  # the processor's own limits instead of llama.cpp's 8 to 4096 tokens
        writer.add_uint32("clip.vision.image_min_pixels", image.min_pixels)
        writer.add_uint32("clip.vision.image_max_pixels", image.max_pixels)
    if p.gated:  # neither use_gelu nor use_silu means quick-GELU, which is Qwen2-VL's
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(p.window_pattern)


def _entries(artifact: Artifact, p: VisionParams, dtype: str) -> list[Entry]:
    hub_names, present = vision_to_hub(artifact.source_config), set(artifact.float_names())
    entries = []
    for name, shape in vision_shapes(p).items():
        if hub_names[name] not in present:
            raise FormatError(
                f"{artifact.path}: {hub_names[name]} is missing from the artifact; the mmproj would lack {name}"
            )
        kind = "F16" if dtype == "f16" and halved(name, shape) else "F32"
        entries.append(Entry(name, shape, kind, _data(artifact, hub_names[name], name, shape, kind)))
    return entries


def _data(artifact: Artifact, hub: str, name: str, shape: tuple[int, ...], kind: str):
    def read() -> np.ndarray:
        part = _part(artifact.float_tensor(hub), name)
        if tuple(part.shape) != shape:
            raise FormatError(f"{hub}: shape {tuple(part.shape)} where config.json says {shape}")
        array = float_bytes(part, kind)
        if not np.isfinite(array).all():
            raise FormatError(f"{hub}: a value is beyond float16; use --mmproj-dtype f32")
        return array

    return read


def _part(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The share of a hub tensor that one GGUF tensor holds: a third of a fused qkv, one time slice of the patches."""
    if name.startswith("v.patch_embd."):
        return tensor[:, :, int(name.endswith(".1"))]  # [out, 3, 2, patch, patch]
    for i, letter in enumerate("qkv"):
        if f".attn_{letter}." in name:
            return tensor.chunk(3)[i]
    return tensor
