"""Writes genai_config.json and processor_config.json, which onnxruntime-genai reads.

They are written for the families that onnxruntime-genai 0.18 knows, but for Mistral 3: its type was
not tried.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.onnx.genai_images import patch_steps, tile_steps
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.samples.companions import image_settings, load_tokenizer
from vlmq_export.quantizer.storage.untrusted import read_json
from vlmq_export.quantizer.storage.whole_files import write_json

PROCESSOR, GENERATION = "processor_config.json", "generation_config.json"
# Tokens of a cache whose past and present share one buffer, unless the caller asks for another
# length. The buffer is allocated at once.
SHARED_LENGTH = 8192
# Those of our families whose runtime type in onnxruntime-genai 0.18 runs our graphs, each with the
# ids of tokens that it is told: its own key → the key of config.json.
_QWEN_TOKENS = {k: k for k in ("image_token_id", "video_token_id", "vision_start_token_id")}
KNOWN = {
    "qwen2_5_vl": _QWEN_TOKENS,
    "qwen3_vl": _QWEN_TOKENS,
    "qwen3_vl_moe": _QWEN_TOKENS,
    "qwen3_5": _QWEN_TOKENS,
    "gemma3": {"image_token_id": "image_token_index"},
}
# Family → a runtime type of another name, whose graphs take and give the same.
TYPES = {"qwen3_vl_moe": "qwen3_vl"}
UNTRIED = ("mistral3",)  # it has a runtime type too
GEMMA_TOKENS = 256  # of an image of Gemma 3, for onnxruntime-genai
# Family → images of a prompt for which onnxruntime-genai makes room. It stops at more.
MOST_IMAGES = {"gemma3": 1}


@dataclass(frozen=True)
class GenaiFiles:
    """The content of the files that onnxruntime-genai reads beside the graphs."""

    config: dict  # of genai_config.json
    steps: dict  # of processor_config.json
    # tokenizer.json, where the source has none or another than transformers loads; empty: the
    # source's own is right.
    tokenizer: str


def genai_files(
    architecture: Architecture,
    source: Path,  # folder with tokenizer, image processor and generation_config.json
    options: FormatOptions,
) -> GenaiFiles | None:
    """What would be written, or None for a model that onnxruntime-genai does not run.

    Raises FormatError or CheckpointError for settings that are missing or that it cannot express.
    """
    if _why_not(architecture):
        return None
    images = image_settings(source)
    if architecture.family.images == "tile":
        steps = tile_steps(images, architecture.vision["image_size"])
    else:
        steps = patch_steps(images)
    tokenizer = load_tokenizer(source)
    generation = read_json(file) if (file := source / GENERATION).is_file() else {}
    # transformers has a file of the same name and other content. A model that has it keeps it.
    name = "genai_processor_config.json" if (source / PROCESSOR).exists() else PROCESSOR
    try:
        config = genai_config(architecture, generation, tokenizer.eos_token_id, options, name)
    except KeyError as e:
        raise FormatError(
            f"config.json: {e.args[0]} is missing; genai_config.json cannot be written without it"
        ) from None
    return GenaiFiles(config, steps, _tokenizer_file(source, tokenizer))


def _why_not(architecture: Architecture) -> str:
    """Why onnxruntime-genai does not run a model; empty if it does."""
    if architecture.model_type in UNTRIED:
        return f"onnxruntime-genai's {architecture.model_type} was not tried with these graphs"
    if architecture.model_type not in KNOWN:
        return f"onnxruntime-genai does not know {architecture.model_type}"
    tokens = architecture.config.get("mm_tokens_per_image", GEMMA_TOKENS)
    if tokens != GEMMA_TOKENS:
        return (
            f"onnxruntime-genai writes {GEMMA_TOKENS} tokens for an image,"
            f" of which this model has {tokens}"
        )
    return ""


def write_genai(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write the files. Returns notes of what onnxruntime-genai does not run.

    Nothing is written if that is the whole model. Raises as `genai_files` does.
    """
    files = genai_files(artifact.architecture, artifact.source, options)
    if files is None:
        why = _why_not(artifact.architecture)
        return [f"{why}: run these graphs in plain ONNX Runtime"]
    write_json(folder / "genai_config.json", files.config)
    write_json(folder / files.config["model"]["vision"]["config_filename"], files.steps)
    if files.tokenizer:
        (folder / "tokenizer.json").write_text(files.tokenizer, "utf-8")
    if most := MOST_IMAGES.get(artifact.manifest.model_type):
        return [f"onnxruntime-genai takes {most} image a prompt; plain ONNX Runtime takes more"]
    return []


def _tokenizer_file(source: Path, tokenizer: Any) -> str:
    """tokenizer.json as transformers would save it, where the source's own says something else.

    onnxruntime-genai reads that file alone, and transformers several. Empty if the file has the
    tokens that transformers has, and splits text as it does. Raises FormatError for a tokenizer
    that has no such file.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise FormatError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which onnxruntime-genai reads"
        )
    saved, file = tokenizer.backend_tokenizer.to_str(), source / "tokenizer.json"
    own = read_json(file) if file.is_file() else {}
    return "" if _tokens(own) == _tokens(json.loads(saved)) else saved


def _tokens(saved: dict) -> tuple:
    """What of a tokenizer.json decides the tokens of a text: added ones, and the splitting.

    `trim_offsets` does not: it is about the places of tokens in the text.
    """
    added = {t["id"]: t["content"] for t in saved.get("added_tokens") or []}
    split = json.dumps([saved.get("normalizer"), saved.get("pre_tokenizer")], sort_keys=True)
    return added, re.sub(r'"trim_offsets": (true|false)', "", split)


def genai_config(
    architecture: Architecture,  # with the settings as transformers resolves them
    generation: dict,  # what generation_config.json holds
    tokenizer_eos: int | None,  # where neither of them has a token that ends an answer
    options: FormatOptions,
    processor: str = PROCESSOR,  # name of the file with the image steps
) -> dict:
    """The content of genai_config.json.

    Past and present of the cache share one buffer where the decoder's attention can write into it.
    Its length is the `max_length` of `search`. Raises FormatError without a token that ends an
    answer, and KeyError for another setting that is missing.
    """
    source, text = architecture.config, architecture.text

    def token(key: str) -> Any:
        found = (settings.get(key) for settings in (generation, text, source))
        return next((value for value in found if value is not None), None)

    eos = tokenizer_eos if token("eos_token_id") is None else token("eos_token_id")
    if eos is None or eos == []:
        raise FormatError(
            "neither generation_config.json nor config.json has an eos_token_id, and the tokenizer"
            " has no eos_token; onnxruntime-genai would not stop"
        )
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad, bos = token("pad_token_id"), text.get("bos_token_id")
    shared, length = options.onnx_fused, text["max_position_embeddings"]
    provider_options = [{"cuda": {}}] if options.onnx_provider == "cuda" else []
    session = {"session_options": {"provider_options": provider_options}}
    return {
        "model": {
            "type": TYPES.get(source["model_type"], source["model_type"]),
            "bos_token_id": first_eos if bos is None else bos,
            "eos_token_id": eos,
            "pad_token_id": first_eos if pad is None else pad,
            **{ours: source[key] for ours, key in KNOWN[source["model_type"]].items()},
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

    DeepStack's features come beside the embeddings, or a mark of the image tokens does, so that
    `inputs_embeds` is wider than a token.
    """
    text, vision = architecture.text, architecture.vision
    stacked = len(vision.get("deepstack_visual_indexes", [])) if architecture.family.added else 0
    width = text["hidden_size"] * (1 + stacked) + bool(architecture.family.marks)
    return {
        "filename": "text.onnx",
        "head_size": architecture.head_dim,
        "hidden_size": width,  # of inputs_embeds
        "num_attention_heads": text["num_attention_heads"],
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
    files = {"filename": "vision.onnx", "config_filename": processor}
    inputs, outputs = {"pixel_values": "pixel_values"}, {"image_features": "image_features"}
    if architecture.family.images == "tile":
        return files | {"inputs": inputs, "outputs": outputs}
    vision = architecture.vision
    return files | {
        "spatial_merge_size": vision["spatial_merge_size"],
        "patch_size": vision["patch_size"],
        # Qwen3-VL and Qwen3.5 have no such setting, and genai wants a number.
        "tokens_per_second": float(vision.get("tokens_per_second", 2)),
        "inputs": inputs | {"image_grid_thw": "image_grid_thw"},
        "outputs": outputs,
    }
