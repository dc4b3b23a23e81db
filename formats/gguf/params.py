"""The hyperparameters that llama.cpp needs, from a Hugging Face config: nested (transformers 5) or flat (published).

Settings that llama.cpp's graphs of these families cannot express are refused here: it would load the file and compute
something else without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.families import TextGraph, VisionGraph, graphs_of
from vlmq_export.quantizer.families import text_config


@dataclass(frozen=True)
class TextParams:
    graph: TextGraph
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # rows of the embedding, padding included
    context: int
    rms_eps: float
    rope_theta: float
    sections: tuple[int, ...]  # rotary pairs for time, height, width; empty for plain rotary positions
    stacked: int  # layers that take features of their own from the tower, behind the first one
    tied: bool

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {
            "vocabulary": self.vocabulary, "hidden": self.hidden, "feed_forward": self.feed_forward, "head": self.head_dim,
            "query": self.heads * self.head_dim, "key": self.kv_heads * self.head_dim,
        }  # fmt: skip

    def keys(self) -> dict[str, object]:
        """The architecture's own metadata."""
        own: dict[str, object] = {
            "context_length": self.context, "block_count": self.layers, "embedding_length": self.hidden,
            "feed_forward_length": self.feed_forward, "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads, "attention.layer_norm_rms_epsilon": self.rms_eps,
            "rope.freq_base": self.rope_theta,
        }  # fmt: skip
        if self.graph.sections:
            own["rope.dimension_sections"] = [*self.sections, 0]
        if self.graph.head_keys:
            own |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        if self.stacked:
            own["n_deepstack_layers"] = self.stacked
        return {f"{self.graph.arch}.{key}": value for key, value in own.items()}


@dataclass(frozen=True)
class VisionParams:
    graph: VisionGraph
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    patch: int
    out: int  # width of the language model
    image: int  # side of the square that the tower was trained on; a dummy where it takes any size
    positions: int  # rows of the learned position embedding, 0 where there is none
    window_pattern: int | None  # every n-th block attends over the whole image
    stacked: tuple[int, ...]  # blocks whose features join the language model's first layers
    eps: float

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {
            "hidden": self.hidden, "feed_forward": self.feed_forward, "patch": self.patch, "positions": self.positions,
            "fused": 3 * self.hidden, "merged": self.graph.merge**2 * self.hidden, "out": self.out,
        }  # fmt: skip

    def keys(self) -> dict[str, object]:
        """The tower's own metadata, the processor's aside."""
        own: dict[str, object] = {
            "projection_dim": self.out, "image_size": self.image, "patch_size": self.patch, "embedding_length": self.hidden,
            "feed_forward_length": self.feed_forward, "block_count": self.layers, "attention.head_count": self.heads,
            "attention.layer_norm_epsilon": self.eps, **self.graph.keys(self),
        }  # fmt: skip
        clip = {"has_vision_encoder": True, "projector_type": self.graph.projector}
        if self.graph.activation:
            clip[f"use_{self.graph.activation}"] = True
        return {f"clip.{key}": v for key, v in clip.items()} | {f"clip.vision.{key}": v for key, v in own.items()}


def text_params(config: dict) -> TextParams:
    """Raises FormatError for a setting that is missing or that llama.cpp cannot express."""
    graph, vision = graphs_of(config)
    text = text_config(config)
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in graph.rope_types:
        known = " or ".join(graph.rope_types)
        raise FormatError(f"config.json: rope type {kind} is not written to GGUF; for this family only {known} is")
    _require(text, graph.fixed, graph.arch, "")
    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        head_dim = int((graph.head_keys and text.get("head_dim")) or hidden // heads)
        sections = tuple(int(n) for n in rope["mrope_section"]) if graph.sections else ()
        params = TextParams(
            graph, layers=int(text["num_hidden_layers"]), hidden=hidden, feed_forward=int(text["intermediate_size"]),
            heads=heads, kv_heads=int(text.get("num_key_value_heads") or heads), head_dim=head_dim,
            vocabulary=int(text["vocab_size"]), context=int(text["max_position_embeddings"]),
            rms_eps=float(text["rms_norm_eps"]), rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
            sections=sections, stacked=len((config.get("vision_config") or {}).get(vision.stacked) or ()),
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )  # fmt: skip
    except KeyError as e:
        raise FormatError(f"config.json: {e.args[0]} is missing; GGUF cannot be written without it") from None
    if text.get("head_dim") not in (None, head_dim):
        raise FormatError(
            f"config.json: head_dim {text['head_dim']}; llama.cpp's {graph.arch} takes hidden_size / heads"
        )
    if sections and (len(sections) != 3 or 2 * sum(sections) != head_dim):
        raise FormatError(f"config.json: mrope_section {list(sections)} does not add up to half of head_dim {head_dim}")
    if params.stacked >= params.layers:  # its graph has dropped the image's rows by the last layer, and aborts there
        raise FormatError(
            f"config.json: {params.stacked} layers take features of their own from the vision tower; llama.cpp's "
            f"{graph.arch} fails at the last of {params.layers}"
        )
    return params


def vision_params(config: dict) -> VisionParams:
    """Raises FormatError for a setting that is missing or that llama.cpp cannot express."""
    graph = graphs_of(config)[1]
    vision = config.get("vision_config") or {}
    try:
        sizes = {size: _whole(vision[key]) for size, key in graph.sizes.items()}
        hidden = sizes["hidden"]
        sizes.setdefault("feed_forward", int(hidden * vision["mlp_ratio"]) if "feed_forward" not in sizes else 0)
        out = int(vision[graph.out]) if graph.out else int(text_config(config)["hidden_size"])
        window = _every_nth(vision, graph.every_nth, sizes["layers"]) if graph.every_nth else None
    except KeyError as e:
        raise FormatError(
            f"config.json: vision_config.{e.args[0]} is missing; the mmproj cannot be written without it"
        ) from None
    _require(vision, graph.fixed, graph.projector, "vision_config.")
    _require(config, graph.top_fixed, graph.projector, "")
    image = sizes.pop("image", None)
    positions = sizes.pop("positions", 0)
    if image:
        positions = (image // sizes["patch"]) ** 2 + graph.class_token
    image = image or graph.image_size or isqrt(positions) * sizes["patch"]
    eps = graph.eps if isinstance(graph.eps, float) else float(vision.get(graph.eps, 1e-6))  # transformers' default
    stacked = tuple(int(i) for i in vision.get(graph.stacked) or ())
    params = VisionParams(
        graph, **sizes, out=out, image=image, positions=positions, window_pattern=window, stacked=stacked, eps=eps
    )
    if params.feed_forward == hidden and not graph.square_mlp:
        raise FormatError(f"config.json: a vision MLP as wide as the tower ({hidden}) is misread by llama.cpp")
    return params


def _require(settings: dict, fixed: dict[str, object], who: str, where: str) -> None:
    for key, only in fixed.items():
        if (settings[key] if settings.get(key) is not None else only) != only:
            raise FormatError(f"config.json: {where}{key} is {settings[key]}; llama.cpp's {who} knows only {only}")


def _whole(value: object) -> int:
    """A size, or a square given by both of its sides."""
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1:
        raise FormatError(f"config.json: vision_config has sides {value}; llama.cpp knows only squares")
    return int(sides.pop())


def _every_nth(vision: dict, key: str, layers: int) -> int:
    full = [int(i) for i in vision[key]]
    pattern = full[0] + 1 if full else 0
    if full != [i for i in range(layers) if (i + 1) % max(pattern, 1) == 0]:
        raise FormatError(f"config.json: {key} {full} are not every n-th block, which is all that llama.cpp knows")
    return pattern


@dataclass(frozen=True)
class ImageParams:
    """What the image processor does, as far as an mmproj can say it; None leaves llama.cpp's own."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int | None = None
    max_pixels: int | None = None
    min_tiles: int | None = None
    max_tiles: int | None = None

    def keys(self) -> dict[str, object]:
        own = {"image_mean": list(self.mean), "image_std": list(self.std), "image_min_pixels": self.min_pixels,
               "image_max_pixels": self.max_pixels, "preproc_min_tiles": self.min_tiles,
               "preproc_max_tiles": self.max_tiles}  # fmt: skip
        return {f"clip.vision.{key}": value for key, value in own.items() if value is not None}


def image_params(folder: Path) -> ImageParams:
    """From preprocessor_config.json. Raises FormatError if it is missing or lacks the normalization."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise FormatError(
            f"{file.name} is missing from the source model; the mmproj needs its image_mean and image_std"
        )
    raw = json.loads(file.read_text("utf-8"))
    size = raw.get("size") or {}
    low, high = (
        raw.get("min_pixels") or size.get("shortest_edge"),
        raw.get("max_pixels") or size.get("longest_edge"),
    )
    pixels = (low, high) if low and high else (None, None)
    try:
        return ImageParams(
            tuple(float(x) for x in raw["image_mean"]), tuple(float(x) for x in raw["image_std"]), *pixels,
            raw.get("min_patches"), raw.get("max_patches"),
        )  # fmt: skip
    except KeyError as e:
        raise FormatError(f"{file.name}: {e.args[0]} is missing; the mmproj cannot be written without it") from None
