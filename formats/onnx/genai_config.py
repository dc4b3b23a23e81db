"""Writes genai_config.json and processor_config.json, which onnxruntime-genai reads.

They are written for the families that onnxruntime-genai 0.18 knows.
"""

from __future__ import annotations

import json
from pathlib import Path

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.onnx.plan import is_fused
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.storage.whole_files import write_json

PROCESSOR = "processor_config.json"
# Tokens of a cache whose past and present share one buffer, unless the caller asks for another
# length. The buffer is allocated at once.
SHARED_LENGTH = 8192
# Those of our families that have a runtime type in onnxruntime-genai 0.18.
KNOWN = ("qwen2_5_vl", "qwen3_vl")


def write_genai(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write both files. Returns a note instead if onnxruntime-genai does not know the family.

    Raises FormatError if the artifact has no preprocessor_config.json.
    """
    if artifact.manifest.model_type not in KNOWN:
        return [
            f"onnxruntime-genai does not know {artifact.manifest.model_type}:"
            " run these graphs in plain ONNX Runtime"
        ]
    preprocessor = artifact.source / "preprocessor_config.json"
    if not preprocessor.is_file():
        raise FormatError(f"{preprocessor}: missing; copy it from the original model")
    steps = processor_config(json.loads(preprocessor.read_text("utf-8")))
    # transformers has a file of the same name and other content. A model that has it keeps it.
    name = "genai_processor_config.json" if (artifact.source / PROCESSOR).exists() else PROCESSOR
    generation = _generation(artifact.source)
    config = genai_config(artifact.architecture, generation, options, name)
    write_json(folder / "genai_config.json", config)
    write_json(folder / name, steps)
    return []


def _generation(source: Path) -> dict:
    """What generation_config.json holds, if it is there."""
    file = source / "generation_config.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def genai_config(
    architecture: Architecture,
    generation: dict,  # what generation_config.json holds
    options: FormatOptions,
    processor: str = PROCESSOR,  # name of the file with the image steps
) -> dict:
    """The content of genai_config.json.

    Past and present of the cache share one buffer where the decoder's attention can write into it.
    Its length is the `max_length` of `search`.
    """
    source, text = architecture.config, architecture.text
    eos = generation.get("eos_token_id", text.get("eos_token_id"))
    pad = generation.get("pad_token_id", text.get("pad_token_id"))
    first_eos = eos[0] if isinstance(eos, list) else eos
    shared, length = is_fused(options), text["max_position_embeddings"]
    provider_options = [{"cuda": {}}] if options.onnx_provider == "cuda" else []
    session = {"session_options": {"provider_options": provider_options}}
    return {
        "model": {
            "type": source["model_type"],
            "bos_token_id": text.get("bos_token_id", first_eos),
            "eos_token_id": eos,
            "pad_token_id": first_eos if pad is None else pad,
            "image_token_id": source["image_token_id"],
            "video_token_id": source["video_token_id"],
            "vision_start_token_id": source["vision_start_token_id"],
            "context_length": length,
            "vocab_size": text["vocab_size"],
            "decoder": session | _decoder(architecture),
            "embedding": session | _EMBEDDING,
            "vision": session | _vision(architecture, processor),
        },
        "search": _search(length, shared),
    }


def _search(length: int, shared: bool) -> dict:
    """Greedy decoding, and the length of the cache: at most `length`, which the model allows."""
    return {
        "do_sample": False,
        "max_length": min(length, SHARED_LENGTH) if shared else length,
        "num_beams": 1,
        "past_present_share_buffer": shared,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def _decoder(architecture: Architecture) -> dict:
    """What genai has to know of text.onnx.

    DeepStack's features come beside the embeddings, so that `inputs_embeds` is wider than a token.
    """
    text, vision = architecture.text, architecture.config["vision_config"]
    heads = text["num_attention_heads"]
    stacked = len(vision.get("deepstack_visual_indexes", []))
    return {
        "filename": "text.onnx",
        "head_size": text.get("head_dim") or text["hidden_size"] // heads,
        "hidden_size": text["hidden_size"] * (1 + stacked),  # of inputs_embeds
        "num_attention_heads": heads,
        "num_hidden_layers": text["num_hidden_layers"],
        "num_key_value_heads": text["num_key_value_heads"],
        "inputs": {
            "inputs_embeds": "inputs_embeds",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


_EMBEDDING = {
    "filename": "embedding.onnx",
    "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
    "outputs": {"inputs_embeds": "inputs_embeds"},
}


def _vision(architecture: Architecture, processor: str) -> dict:
    """What genai has to know of vision.onnx."""
    vision = architecture.config["vision_config"]
    return {
        "filename": "vision.onnx",
        "config_filename": processor,
        "spatial_merge_size": vision["spatial_merge_size"],
        "patch_size": vision["patch_size"],
        "tokens_per_second": float(vision.get("tokens_per_second", 2)),
        "inputs": {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"},
        "outputs": {"image_features": "image_features"},
    }


def processor_config(preprocessor: dict) -> dict:
    """The content of processor_config.json: image steps of onnxruntime-extensions.

    They give the patches of preprocessor_config.json's own processor, in the same order.
    """
    p, size = preprocessor, preprocessor.get("size") or {}
    unit = {"patch_size": p.get("patch_size", 14), "merge_size": p.get("merge_size", 2)}
    resize = {
        "width": 540,
        "height": 360,
        "smart_resize": 1,
        "min_pixels": p.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
        "max_pixels": p.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
        **unit,
    }
    rescale = {"rescale_factor": p.get("rescale_factor", 1 / 255)}
    normalize = {"mean": p["image_mean"], "std": p["image_std"], "qwen2_5_vl": 1}
    patches = {"temporal_patch_size": p.get("temporal_patch_size", 2), **unit}
    steps = [
        _step("decode_image", "DecodeImage", {"color_space": "RGB"}),
        _step("convert_to_rgb", "ConvertRGB"),
        _step("resize", "Resize", resize),
        _step("rescale", "Rescale", rescale),
        _step("normalize", "Normalize", normalize),
        _step("patch_image", "PatchImage", patches),
    ]
    return {"processor": {"name": "qwen2_5_image_processor", "transforms": steps}}


def _step(name: str, kind: str, attributes: dict | None = None) -> dict:
    return {
        "operation": {"name": name, "type": kind} | ({"attrs": attributes} if attributes else {})
    }
