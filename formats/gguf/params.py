"""The hyperparameters that llama.cpp needs, from a Hugging Face config: nested (transformers 5) or flat (published).

Settings that llama.cpp's graphs of these families cannot express are refused here: it would load the file and compute
something else without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vlmq_export.errors import FormatError
from vlmq_export.quantizer.families import text_config


@dataclass(frozen=True)
class TextParams:
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int  # rows of the embedding, padding included
    context: int
    rms_eps: float
    rope_theta: float
    sections: tuple[int, int, int]  # rotary pairs for time, height, width
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class VisionParams:
    projector: str  # llama.cpp's name of the tower
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    patch: int
    projection: int  # width of the language model
    gated: bool  # Qwen2.5-VL: SwiGLU, RMS norms, windows
    window_pattern: int | None  # every n-th block attends over the whole image
    eps: float = 1e-6  # fixed in transformers' code for both towers


def text_params(config: dict) -> TextParams:
    """Raises FormatError for a setting that is missing or that llama.cpp cannot express."""
    text = text_config(config)
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise FormatError(f"config.json: rope type {kind} is not written to GGUF; only plain M-RoPE is")
    if text.get("use_sliding_window"):
        raise FormatError("config.json: use_sliding_window is on, which llama.cpp's qwen2vl graph ignores")
    if text.get("hidden_act", "silu") != "silu":
        raise FormatError(f"config.json: hidden_act {text['hidden_act']}; llama.cpp's qwen2vl graph knows only silu")
    try:
        sections = tuple(int(n) for n in rope["mrope_section"])
        params = TextParams(
            layers=int(text["num_hidden_layers"]), hidden=int(text["hidden_size"]),
            feed_forward=int(text["intermediate_size"]), heads=int(text["num_attention_heads"]),
            kv_heads=int(text.get("num_key_value_heads") or text["num_attention_heads"]),
            vocabulary=int(text["vocab_size"]), context=int(text["max_position_embeddings"]),
            rms_eps=float(text["rms_norm_eps"]), rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
            sections=sections,
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )  # fmt: skip
    except KeyError as e:
        raise FormatError(f"config.json: {e.args[0]} is missing; GGUF cannot be written without it") from None
    if len(sections) != 3 or 2 * sum(sections) != params.head_dim:
        raise FormatError(
            f"config.json: mrope_section {list(sections)} does not add up to half of head_dim {params.head_dim}"
        )
    return params


def vision_params(config: dict) -> VisionParams:
    """Raises FormatError for a setting that is missing or that llama.cpp cannot express."""
    vision = config.get("vision_config") or {}
    gated = config.get("model_type") == "qwen2_5_vl"
    try:
        hidden = int(vision["hidden_size"] if gated else vision["embed_dim"])
        params = VisionParams(
            projector="qwen2.5vl_merger" if gated else "qwen2vl_merger", layers=int(vision["depth"]), hidden=hidden,
            feed_forward=int(vision["intermediate_size"] if gated else hidden * vision["mlp_ratio"]),
            heads=int(vision["num_heads"]), patch=int(vision["patch_size"]),
            projection=int(vision["out_hidden_size"] if gated else vision["hidden_size"]), gated=gated,
            window_pattern=_window_pattern(vision) if gated else None,
        )  # fmt: skip
    except KeyError as e:
        raise FormatError(
            f"config.json: vision_config.{e.args[0]} is missing; the mmproj cannot be written without it"
        ) from None
    fixed = {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
    fixed |= {"hidden_act": "silu", "window_size": 112} if gated else {"hidden_act": "quick_gelu"}
    for key, only in fixed.items():
        if vision.get(key, only) != only:
            raise FormatError(
                f"config.json: vision_config.{key} is {vision[key]}; llama.cpp's {params.projector} knows only {only}"
            )
    if params.feed_forward == hidden:  # llama.cpp takes a square ffn_down for a legacy file and swaps it with ffn_up
        raise FormatError(f"config.json: a vision MLP as wide as the tower ({hidden}) is misread by llama.cpp")
    return params


def _window_pattern(vision: dict) -> int:
    full = [int(i) for i in vision["fullatt_block_indexes"]]
    pattern = full[0] + 1 if full else 0
    if full != [i for i in range(int(vision["depth"])) if (i + 1) % max(pattern, 1) == 0]:
        raise FormatError(
            f"config.json: fullatt_block_indexes {full} are not every n-th block, which is all that llama.cpp knows"
        )
    return pattern


@dataclass(frozen=True)
class ImageParams:
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int | None  # None: llama.cpp's own limits
    max_pixels: int | None


def image_params(folder: Path) -> ImageParams:
    """From preprocessor_config.json. Raises FormatError if it is missing or lacks the normalization."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise FormatError(
            f"{file.name} is missing from the source model; the mmproj needs its image_mean and image_std"
        )
    raw = json.loads(file.read_text("utf-8"))
    size = raw.get("size") or {}
    try:
        return ImageParams(
            tuple(float(x) for x in raw["image_mean"]), tuple(float(x) for x in raw["image_std"]),
            raw.get("min_pixels") or size.get("shortest_edge"), raw.get("max_pixels") or size.get("longest_edge"),
        )  # fmt: skip
    except KeyError as e:
        raise FormatError(f"{file.name}: {e.args[0]} is missing; the mmproj cannot be written without it") from None
