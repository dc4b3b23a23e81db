"""genai_config.json and processor_config.json for onnxruntime-genai, for the families that it knows."""

from __future__ import annotations

import json
from pathlib import Path

from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.onnx.planning import is_fused
from vlmq_export.quantizer.artifact import Artifact, write_json
from vlmq_export.quantizer.families import text_config

PROCESSOR = "processor_config.json"
SHARED_LENGTH = 8192  # tokens of a shared cache unless the caller asks for others: it is allocated at once
KNOWN = ("qwen2_5_vl", "qwen3_vl")  # of our families, those with a runtime type in onnxruntime-genai 0.18


def write_genai(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Both files if onnxruntime-genai knows the family; else one note that it does not."""
    if artifact.manifest.model_type not in KNOWN:
        return [
            f"onnxruntime-genai does not know {artifact.manifest.model_type}: run these graphs in plain ONNX Runtime"
        ]
    preprocessor = artifact.source / "preprocessor_config.json"
    if not preprocessor.is_file():
        raise FormatError(f"{preprocessor}: missing; copy it from the original model")
    steps = processor_config(json.loads(preprocessor.read_text("utf-8")))
    # transformers has a file of the same name and another content: a model that brings it keeps it.
    name = "genai_processor_config.json" if (artifact.source / PROCESSOR).exists() else PROCESSOR
    write_json(
        folder / "genai_config.json", genai_config(artifact.source_config, _generation(artifact.source), options, name)
    )
    write_json(folder / name, steps)
    return []


def _generation(source: Path) -> dict:
    file = source / "generation_config.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def genai_config(source: dict, generation: dict, options: FormatOptions, processor: str = PROCESSOR) -> dict:
    """One buffer for past and present where the decoder's attention can share it; its length is that of `search`."""
    text, vision = text_config(source), source["vision_config"]
    heads = text["num_attention_heads"]
    eos = generation.get("eos_token_id", text.get("eos_token_id"))
    pad = generation.get("pad_token_id", text.get("pad_token_id"))
    first_eos = eos[0] if isinstance(eos, list) else eos
    shared, length = is_fused(options), text["max_position_embeddings"]
    session = {"session_options": {"provider_options": [{"cuda": {}}] if options.onnx_provider == "cuda" else []}}
    decoder = {
        **session,
        "filename": "text.onnx",
        "head_size": text.get("head_dim") or text["hidden_size"] // heads,
        "hidden_size": text["hidden_size"] * (1 + len(vision.get("deepstack_visual_indexes", []))),  # of inputs_embeds
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
            "decoder": decoder,
            "embedding": {
                **session,
                "filename": "embedding.onnx",
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "vision": {
                **session,
                "filename": "vision.onnx",
                "config_filename": processor,
                "spatial_merge_size": vision["spatial_merge_size"],
                "patch_size": vision["patch_size"],
                "tokens_per_second": float(vision.get("tokens_per_second", 2)),
                "inputs": {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"},
                "outputs": {"image_features": "image_features"},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(length, SHARED_LENGTH) if shared else length,
            "num_beams": 1,
            "past_present_share_buffer": shared,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def processor_config(p: dict) -> dict:
    """Image steps of onnxruntime-extensions, the ones that lead to the model's own patch order."""
    size = p.get("size") or {}
    low = p.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    high = p.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    unit = {"patch_size": p.get("patch_size", 14), "merge_size": p.get("merge_size", 2)}

    def step(name: str, kind: str, **attrs) -> dict:
        return {"operation": {"name": name, "type": kind, **({"attrs": attrs} if attrs else {})}}

    return {
        "processor": {
            "name": "qwen2_5_image_processor",
            "transforms": [
                step("decode_image", "DecodeImage", color_space="RGB"),
                step("convert_to_rgb", "ConvertRGB"),
                step(
                    "resize", "Resize", width=540, height=360, smart_resize=1, min_pixels=low, max_pixels=high, **unit
                ),
                step("rescale", "Rescale", rescale_factor=p.get("rescale_factor", 1 / 255)),
                step("normalize", "Normalize", mean=p["image_mean"], std=p["image_std"], qwen2_5_vl=1),
                step("patch_image", "PatchImage", temporal_patch_size=p.get("temporal_patch_size", 2), **unit),
            ],
        }
    }
