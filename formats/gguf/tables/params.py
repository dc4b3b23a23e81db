"""The hyperparameters that llama.cpp needs, from the config.json of a Hugging Face model.

Settings that llama.cpp's graphs of these families cannot express are refused here. llama.cpp would
load the file, say nothing, and compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from types import MappingProxyType

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.tables.families import graphs_of
from vlmq_export.formats.gguf.tables.graphs import (
    DeltaNet,
    TextGraph,
    TextParams,
    VisionGraph,
    VisionParams,
)
from vlmq_export.formats.model_plan import decoder_attention, require_even_positions
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.samples.companions import image_settings

# Setting of YaRN → the only value that llama.cpp's graphs compute.
_YARN_FIXED = {
    "attention_factor": None,
    "mscale": 1.0,
    "partial_rotary_factor": 1.0,
    "truncate": True,
}


def text_params(architecture: Architecture) -> TextParams:
    """The sizes of the language model.

    Raises FormatError for a setting that is missing or that llama.cpp cannot express, and
    CheckpointError for settings that transformers refuses.
    """
    text = architecture.text
    graph, vision = graphs_of(architecture)
    _require(text, graph.fixed, graph.arch, "")
    kind, layers = decoder_attention(architecture)
    if kind not in graph.rope_types:
        known = " or ".join(graph.rope_types)
        raise FormatError(
            f"config.json: rope type {kind} is not written to GGUF; for this family only {known} is"
        )
    known = {"full_attention"}
    known |= {"sliding_attention"} if graph.windows else set()
    known |= {"linear_attention"} if graph.recurrent else set()
    if other := layers - known:
        raise FormatError(
            f"config.json: {min(other)} in layer_types; llama.cpp's {graph.arch} has only"
            f" {' and '.join(sorted(known))}"
        )
    try:
        params = _text_params(architecture, graph, vision)
    except KeyError as e:
        raise FormatError(
            f"config.json: {e.args[0]} is missing; GGUF cannot be written without it"
        ) from None
    _require_expressible(params, text)
    return params


def _text_params(architecture: Architecture, graph: TextGraph, vision: VisionGraph) -> TextParams:
    """The sizes as config.json has them. Raises KeyError for one that is missing."""
    text = architecture.text
    rope = text["rope_parameters"]
    local = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    windows = tuple(kind == "sliding_attention" for kind in text.get("layer_types") or ())
    heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
    head_dim = architecture.head_dim if graph.head_keys else hidden // heads
    return TextParams(
        graph,
        head_dim=head_dim,
        sections=tuple(int(n) for n in rope["mrope_section"]) if graph.sections else (),
        layers=int(text["num_hidden_layers"]),
        hidden=hidden,
        feed_forward=int(text["intermediate_size"]),
        heads=heads,
        kv_heads=int(text["num_key_value_heads"]),
        vocabulary=int(text["vocab_size"]),
        context=int(text["max_position_embeddings"]),
        rms_eps=float(text["rms_norm_eps"]),
        rope_theta=float(rope["rope_theta"]),
        scaling=_scaling(rope, int(text["max_position_embeddings"])),
        windows=windows if any(windows) else (),
        window=int(text["sliding_window"]) if any(windows) else 0,
        window_theta=float(local["rope_theta"]) if any(windows) else 0.0,
        stacked=len(architecture.vision.get(vision.stacked) or ()),
        tied=architecture.tied,
        experts=architecture.experts,
        taken=architecture.taken,
        expert_width=int(text["moe_intermediate_size"]) if graph.sparse else 0,
        rotary=int(head_dim * rope["partial_rotary_factor"]) if graph.recurrent else 0,
        delta=_delta_net(text) if graph.recurrent else None,
    )


def _scaling(rope: Mapping, context: int) -> dict[str, object]:
    """The keys of scaled rotary positions, and of queries that grow with them.

    Raises FormatError for what llama.cpp has no key for, and KeyError for a setting that is
    missing.
    """
    kind = rope.get("rope_type")
    if kind == "linear":
        factor = float(rope["factor"])
        return {"rope.scaling.type": kind, "rope.scaling.factor": factor} if factor != 1 else {}
    if kind != "yarn":
        return {}
    _require(rope, _YARN_FIXED, "YaRN", "rope_parameters.")
    trained = int(rope["original_max_position_embeddings"])
    keys: dict[str, object] = {
        "rope.scaling.type": kind,
        "rope.scaling.factor": float(rope.get("factor") or context / trained),
        "rope.scaling.original_context_length": trained,
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
    }
    # transformers divides by the second of these two where both are there, and so does llama.cpp.
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = float(rope["mscale_all_dim"])
    # Queries grow with each `trained` positions by this much, times a logarithm.
    if beta := rope.get("llama_4_scaling_beta"):
        keys["attention.temperature_scale"] = float(beta)
    return keys


def _delta_net(text: Mapping) -> DeltaNet:
    """The sizes of the linear attention. Raises FormatError for what llama.cpp cannot express."""
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    every = full[0] + 1 if full else len(text["layer_types"]) + 1
    if full != list(range(every - 1, len(text["layer_types"]), every)):
        raise FormatError(
            f"config.json: the layers {full} attend in layer_types; llama.cpp knows only every n-th"
        )
    keys, values = (int(text[f"linear_num_{kind}_heads"]) for kind in ("key", "value"))
    head, other = (int(text[f"linear_{kind}_head_dim"]) for kind in ("value", "key"))
    if head != other or values % keys:
        raise FormatError(
            f"config.json: a linear attention of {keys} key heads of {other} columns and {values}"
            f" value heads of {head}; llama.cpp knows only heads of one width, and as many value"
            " heads for each key head"
        )
    return DeltaNet(every, keys, values, head, int(text["linear_conv_kernel_dim"]))


def _require_expressible(params: TextParams, text: Mapping) -> None:
    """Raises FormatError for sizes that do not fit together in llama.cpp's graph."""
    arch, head_dim, sections = params.graph.arch, params.head_dim, params.sections
    if text.get("head_dim") not in (None, head_dim):
        raise FormatError(
            f"config.json: head_dim {text['head_dim']}; llama.cpp's {arch} takes"
            " hidden_size / heads"
        )
    scalar, own = params.graph.scalar, text.get("query_pre_attn_scalar")
    if scalar and own != (only := scalar(params.layers, params.hidden, params.heads, head_dim)):
        raise FormatError(
            f"config.json: query_pre_attn_scalar is {own}; llama.cpp's {arch} knows only {only} at"
            f" {params.layers} layers"
        )
    scaled = (text["rope_parameters"].get("sliding_attention") or {}).get("rope_type", "default")
    if params.windows and scaled != "default":
        raise FormatError(
            f"config.json: rope type {scaled} of sliding_attention; llama.cpp's {arch} knows only"
            " default there"
        )
    turned = params.rotary or head_dim
    if sections and (len(sections) != 3 or 2 * sum(sections) != turned):
        part = f"the {turned} rotary columns" if params.rotary else f"head_dim {head_dim}"
        raise FormatError(
            f"config.json: mrope_section {list(sections)} does not add up to half of {part}"
        )
    # By the last layer, llama.cpp's graph has dropped the rows of the image, and aborts there.
    if params.stacked >= params.layers:
        raise FormatError(
            f"config.json: {params.stacked} layers take features of their own from the vision"
            f" tower; llama.cpp's {arch} fails at the last of {params.layers}"
        )


def vision_params(architecture: Architecture) -> VisionParams:
    """The sizes of the vision tower.

    Raises FormatError for a setting that is missing or that llama.cpp cannot express.
    """
    _, graph = graphs_of(architecture)
    config, vision = architecture.config, architecture.vision
    try:
        sizes = _vision_sizes(vision, graph)
        out = int(vision[graph.out]) if graph.out else int(architecture.text["hidden_size"])
        window = _every_nth(vision, graph.every_nth, sizes["layers"]) if graph.every_nth else None
        merge = config[graph.merge] if isinstance(graph.merge, str) else graph.merge
        if graph.pooled:
            merge = _pooled(sizes["image"] // sizes["patch"], int(config[graph.pooled]))
    except KeyError as e:
        raise FormatError(
            f"config.json: vision_config.{e.args[0]} is missing; the mmproj cannot be written"
            " without it"
        ) from None
    _require(vision, graph.fixed, graph.projector, "vision_config.", graph.reasons)
    _require(config, graph.top_fixed, graph.projector, "")
    _require_norms_and_positions(architecture, graph)
    image = sizes.pop("image", None)
    positions = sizes.pop("positions", 0)
    if image:
        positions = (image // sizes["patch"]) ** 2 + graph.class_token
    params = VisionParams(
        graph,
        **sizes,
        out=out,
        merge=int(merge),
        image=image or graph.image_size or isqrt(positions) * sizes["patch"],
        positions=positions,
        window_pattern=window,
        stacked=tuple(int(i) for i in vision.get(graph.stacked) or ()),
        eps=graph.eps if isinstance(graph.eps, float) else float(vision[graph.eps]),
    )
    if graph.words:
        require_even_positions(params.image // params.patch)
    if params.filled == params.hidden and not graph.square_mlp:
        raise FormatError(
            f"config.json: a vision MLP as wide as the tower ({params.hidden}) is misread by"
            " llama.cpp"
        )
    return params


def _require_norms_and_positions(architecture: Architecture, graph: VisionGraph) -> None:
    """Raises FormatError for an epsilon or positions that the tower's graph does not compute."""
    vision, eps = architecture.vision, architecture.text.get("rms_norm_eps")
    if graph.text_eps and eps != graph.eps:
        raise FormatError(
            f"config.json: rms_norm_eps is {eps}; llama.cpp's {graph.projector} knows only"
            f" {graph.eps} in the projector's norm"
        )
    if not graph.rotary_base:
        return
    head = vision["hidden_size"] // vision["num_attention_heads"]
    base = (vision.get("rope_parameters") or {}).get("rope_theta")
    _require(
        {"head_dim": vision.get("head_dim"), "rope_theta": base},
        {"head_dim": head, "rope_theta": graph.rotary_base},
        graph.projector,
        "vision_config.",
    )


def _vision_sizes(vision: Mapping, graph: VisionGraph) -> dict[str, int]:
    """The sizes of `graph.sizes`, and the width of the MLP. Raises KeyError for one missing."""
    sizes = {size: _whole(vision[key]) for size, key in graph.sizes.items()}
    if "feed_forward" not in sizes:
        sizes["feed_forward"] = int(sizes["hidden"] * vision["mlp_ratio"])
    return sizes


def _pooled(side: int, tokens: int) -> int:
    """How many patches along each side become one token.

    side: the patches along a side of an image, of which `tokens` are made.

    Raises FormatError for numbers that do not go into each other.
    """
    each = isqrt(tokens)
    if each**2 != tokens or not each or side % each:
        raise FormatError(
            f"config.json: {tokens} tokens of an image of {side} × {side} patches; llama.cpp pools"
            " squares of patches alone"
        )
    return side // each


def _require(
    settings: Mapping,
    fixed: Mapping[str, object],  # key → the only value that llama.cpp's graph knows
    who: str,  # the graph
    where: str,  # what stands before the keys in config.json
    reasons: Mapping[str, str] = MappingProxyType({}),  # key → why, where it is another reason
) -> None:
    """Raises FormatError for a setting that has another value than llama.cpp's graph knows."""
    for key, only in fixed.items():
        if (settings[key] if settings.get(key) is not None else only) != only:
            why = reasons.get(key, f"llama.cpp's {who} knows only {only}")
            raise FormatError(f"config.json: {where}{key} is {settings[key]}; {why}")


def _whole(value: int | list[int]) -> int:
    """A size, or the side of a square that is given by both of its sides.

    Raises FormatError for sides that differ.
    """
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1:
        raise FormatError(
            f"config.json: vision_config has sides {value}; llama.cpp knows only squares"
        )
    return int(sides.pop())


def _every_nth(vision: Mapping, key: str, layers: int) -> int:
    """n, where the blocks listed under `key` are every n-th of `layers`.

    Raises FormatError for any other list.
    """
    full = [int(i) for i in vision[key]]
    pattern = full[0] + 1 if full else 0
    if full != [i for i in range(layers) if (i + 1) % max(pattern, 1) == 0]:
        raise FormatError(
            f"config.json: {key} {full} are not every n-th block, which is all that llama.cpp knows"
        )
    return pattern


@dataclass(frozen=True)
class ImageParams:
    """What the image processor does, as far as an mmproj can say it.

    None leaves the value to llama.cpp.
    """

    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    min_pixels: int | None = None  # of an image after resizing
    max_pixels: int | None = None
    min_tiles: int | None = None
    max_tiles: int | None = None
    longest: int | None = None  # side of an image that is cut into tiles

    def keys(self) -> dict[str, object]:
        """The metadata of the mmproj."""
        own = {
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_min_pixels": self.min_pixels,
            "image_max_pixels": self.max_pixels,
            "preproc_min_tiles": self.min_tiles,
            "preproc_max_tiles": self.max_tiles,
            "preproc_image_size": self.longest,
        }
        return {f"clip.vision.{key}": value for key, value in own.items() if value is not None}


def image_params(folder: Path) -> ImageParams:
    """What the image processor of the source model does, as transformers loads it.

    llama.cpp divides every channel by 255 before it is normalized. Another factor of the processor
    is therefore taken into mean and deviation. Raises CheckpointError for settings that are
    missing or damaged.
    """
    s = image_settings(folder)
    # Exactly 1 where the processor divides by 255 too.
    factor = 1.0 if s.rescale == 1 / 255 else 255 * s.rescale
    return ImageParams(
        tuple(m / factor for m in s.mean),
        tuple(d / factor for d in s.std),
        s.min_pixels,
        s.max_pixels,
        s.min_tiles,
        s.max_tiles,
        s.longest,
    )
