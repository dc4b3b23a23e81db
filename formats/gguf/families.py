"""What llama.cpp calls each family: its text graph, its vision graph, and the tensors of both. One entry a family.

Nothing else in this package knows a family by name. A row of a table is (GGUF name, module of transformers 5, shape,
part): the shape in names of `params.py`'s sizes, the part a function where a GGUF tensor is not the whole module tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vlmq_export.errors import FormatError

if TYPE_CHECKING:
    from vlmq_export.formats.gguf.params import VisionParams

# --- tables of tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    gguf: str  # {i}: the block
    module: str
    shape: tuple[str, ...]  # sizes by name, or digits; torch's order
    part: Callable[[torch.Tensor], torch.Tensor] | None = None
    linear: bool = False  # a matrix that multiplies activations; everything else stays F32 in an mmproj


def _one(gguf: str, module: str, shape: str, part=None) -> tuple[Row, ...]:
    return (Row(gguf, module, tuple(shape.split()), part),)


def _linear(gguf: str, module: str, shape: str, *, bias: bool = True, part=None) -> tuple[Row, ...]:
    """`shape`: out and in."""
    sizes = tuple(shape.split())
    weight = Row(f"{gguf}.weight", f"{module}.weight", sizes, part, linear=True)
    return (weight, Row(f"{gguf}.bias", f"{module}.bias", sizes[:1], part)) if bias else (weight,)


def _norm(gguf: str, module: str, size: str = "hidden", *, bias: bool = True) -> tuple[Row, ...]:
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(Row(f"{gguf}.{p}", f"{module}.{p}", (size,)) for p in parts)


def _third(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda qkv: qkv.chunk(3)[i]


def _frame(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda patches: patches[:, :, i]  # [out, 3, 2, patch, patch] → one time slice


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(0, -2).squeeze(0)  # [1, 1, n] → [n], [1, k, n] → [k, n]


def class_row_first(rows: torch.Tensor) -> torch.Tensor:
    """InternVL's position rows as on the hub: the class token's is row 0. [1, patches + 1, hidden] → [patches + 1, hidden]"""
    return rows[0]


def class_row_last(rows: torch.Tensor) -> torch.Tensor:
    """The same for llama.cpp b11549, whose graph appends the class token behind the patches and adds the rows in file
    order: patch i takes row i, and row 0 of the hub belongs at the end."""
    return rows[0].roll(-1, 0)


_EMBEDDING = _one("token_embd.weight", "model.language_model.embed_tokens.weight", "vocabulary hidden")
_HEAD = (
    *_norm("output_norm", "model.language_model.norm", bias=False),
    *_linear("output", "lm_head", "vocabulary hidden", bias=False),  # not there where it is tied
)


def _decoder(*, bias: bool, head_norms: bool) -> tuple[Row, ...]:
    """The Qwen2 and Qwen3 backbones."""
    at, layer = "blk.{i}.", "model.language_model.layers.{i}."
    attention = layer + "self_attn."
    rows = _EMBEDDING + _norm(at + "attn_norm", layer + "input_layernorm", bias=False)
    for letter, size in (("q", "query"), ("k", "key"), ("v", "key")):
        rows += _linear(f"{at}attn_{letter}", f"{attention}{letter}_proj", f"{size} hidden", bias=bias)
        if head_norms and letter != "v":
            rows += _norm(f"{at}attn_{letter}_norm", f"{attention}{letter}_norm", "head", bias=False)
    rows += _linear(at + "attn_output", attention + "o_proj", "hidden query", bias=False)
    rows += _norm(at + "ffn_norm", layer + "post_attention_layernorm", bias=False)
    for name in ("gate", "up"):
        rows += _linear(f"{at}ffn_{name}", f"{layer}mlp.{name}_proj", "feed_forward hidden", bias=False)
    return rows + _linear(at + "ffn_down", layer + "mlp.down_proj", "hidden feed_forward", bias=False) + _HEAD


_BLOCK, _QWEN = "v.blk.{i}.", "model.visual."
_WIDE, _NARROW, _SQUARE = "feed_forward hidden", "hidden feed_forward", "hidden hidden"
_FRAMES = (
    *_one("v.patch_embd.weight", _QWEN + "patch_embed.proj.weight", "hidden 3 patch patch", _frame(0)),
    *_one("v.patch_embd.weight.1", _QWEN + "patch_embed.proj.weight", "hidden 3 patch patch", _frame(1)),
)


def _qwen2_tower(*, gated: bool) -> tuple[Row, ...]:
    """Qwen2-VL, and Qwen2.5-VL with a gated MLP and RMS norms, which have no bias."""
    block = _QWEN + "blocks.{i}."
    rows = _FRAMES
    for n in "12":
        rows += _norm(f"{_BLOCK}ln{n}", f"{block}norm{n}", bias=not gated)
    for i, letter in enumerate("qkv"):
        rows += _linear(f"{_BLOCK}attn_{letter}", block + "attn.qkv", _SQUARE, part=_third(i))
    rows += _linear(_BLOCK + "attn_out", block + "attn.proj", _SQUARE)
    up = (("gate", "mlp.gate_proj"), ("up", "mlp.up_proj")) if gated else (("up", "mlp.fc1"),)
    for name, module in up:
        rows += _linear(f"{_BLOCK}ffn_{name}", block + module, _WIDE)
    rows += _linear(_BLOCK + "ffn_down", block + ("mlp.down_proj" if gated else "mlp.fc2"), _NARROW)
    rows += _norm("v.post_ln", _QWEN + "merger.ln_q", bias=not gated)
    return (
        rows
        + _linear("mm.0", _QWEN + "merger.mlp.0", "merged merged")
        + _linear("mm.2", _QWEN + "merger.mlp.2", "out merged")
    )


def _qwen3_tower() -> tuple[Row, ...]:
    block, stack = _QWEN + "blocks.{i}.", _QWEN + "deepstack_merger_list.{d}."
    rows = _FRAMES + _one("v.patch_embd.bias", _QWEN + "patch_embed.proj.bias", "hidden")
    rows += _one("v.position_embd.weight", _QWEN + "pos_embed.weight", "positions hidden")
    for n in "12":
        rows += _norm(f"{_BLOCK}ln{n}", f"{block}norm{n}")
    rows += _linear(_BLOCK + "attn_qkv", block + "attn.qkv", "fused hidden")
    rows += _linear(_BLOCK + "attn_out", block + "attn.proj", _SQUARE)
    rows += _linear(_BLOCK + "ffn_up", block + "mlp.linear_fc1", _WIDE)
    rows += _linear(_BLOCK + "ffn_down", block + "mlp.linear_fc2", _NARROW)
    rows += _norm("v.post_ln", _QWEN + "merger.norm")
    for index, module in (("0", "linear_fc1"), ("2", "linear_fc2")):
        rows += _linear(f"mm.{index}", f"{_QWEN}merger.{module}", "merged merged" if index == "0" else "out merged")
    rows += _norm("v.deepstack.{d}.norm", stack + "norm", "merged")
    rows += _linear("v.deepstack.{d}.fc1", stack + "linear_fc1", "merged merged")
    return rows + _linear("v.deepstack.{d}.fc2", stack + "linear_fc2", "out merged")


def _internvl_tower() -> tuple[Row, ...]:
    tower, projector = "model.vision_tower.", "model.multi_modal_projector."
    block, embed = tower + "encoder.layer.{i}.", tower + "embeddings."
    rows = _one("v.class_embd", embed + "cls_token", "hidden", _single)
    rows += _one("v.patch_embd.weight", embed + "patch_embeddings.projection.weight", "hidden 3 patch patch")
    rows += _one("v.patch_embd.bias", embed + "patch_embeddings.projection.bias", "hidden")
    rows += _one("v.position_embd.weight", embed + "position_embeddings", "positions hidden", class_row_last)
    rows += _norm(_BLOCK + "ln1", block + "layernorm_before") + _norm(_BLOCK + "ln2", block + "layernorm_after")
    for letter in "qkv":
        rows += _linear(f"{_BLOCK}attn_{letter}", f"{block}attention.{letter}_proj", _SQUARE)
    rows += _linear(_BLOCK + "attn_out", block + "attention.projection_layer", _SQUARE)
    rows += _linear(_BLOCK + "ffn_up", block + "mlp.fc1", _WIDE)
    rows += _linear(_BLOCK + "ffn_down", block + "mlp.fc2", _NARROW)
    for n in "12":
        rows += _one(f"{_BLOCK}ls{n}.weight", f"{block}lambda_{n}", "hidden")
    rows += _norm("mm.model.mlp.0", projector + "layer_norm", "merged")
    return (
        rows
        + _linear("mm.model.mlp.1", projector + "linear_1", "out merged")
        + _linear("mm.model.mlp.3", projector + "linear_2", "out out")
    )


def _siglip_tower() -> tuple[Row, ...]:
    tower, projector = "model.vision_tower.", "model.multi_modal_projector."
    block, embed = tower + "encoder.layers.{i}.", tower + "embeddings."
    rows = _one("v.patch_embd.weight", embed + "patch_embedding.weight", "hidden 3 patch patch")
    rows += _one("v.patch_embd.bias", embed + "patch_embedding.bias", "hidden")
    rows += _one("v.position_embd.weight", embed + "position_embedding.weight", "positions hidden")
    for n in "12":
        rows += _norm(f"{_BLOCK}ln{n}", f"{block}layer_norm{n}")
    for letter in "qkv":
        rows += _linear(f"{_BLOCK}attn_{letter}", f"{block}self_attn.{letter}_proj", _SQUARE)
    rows += _linear(_BLOCK + "attn_out", block + "self_attn.out_proj", _SQUARE)
    rows += _linear(_BLOCK + "ffn_up", block + "mlp.fc1", _WIDE)
    rows += _linear(_BLOCK + "ffn_down", block + "mlp.fc2", _NARROW)
    rows += _linear("mm.0", projector + "linear_1", "out hidden") + _linear("mm.2", projector + "linear_2", "out out")
    return rows + _one(
        "v.image_newline", "model.image_newline", "out"
    )  # kept for readers; mtmd's graph has no use for it


# --- families ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextGraph:
    """A language model in llama.cpp. `fixed`: what its graph computes whatever config.json says."""

    arch: str
    rows: tuple[Row, ...]
    rope_types: tuple[str, ...]
    sections: bool = False  # rotary pairs shared out over time, height and width
    head_keys: bool = False  # head_dim is written, and need not be hidden / heads
    fixed: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class VisionGraph:
    """A vision tower with its projector in mtmd. Sizes and settings by their keys in vision_config."""

    projector: str
    rows: tuple[Row, ...]
    sizes: dict[str, str]  # size → key; `mlp_ratio` is not a size but a factor of hidden
    fixed: dict[str, object]  # key → the only value that the graph computes, and transformers' default
    activation: str | None  # clip.use_…; None is quick-GELU
    out: str | None = None  # key of the projector's output; None: the language model's width
    eps: str | float = 1e-6  # key, or the constant of transformers' code
    merge: int = 2  # patches a side that become one token
    image_size: int | None = None  # a key that must be there and means nothing; None: the tower has its own
    any_size: bool = True  # images of any shape, within pixel limits
    class_token: bool = False
    square_mlp: bool = False  # a square MLP is not taken for a legacy file with up and down swapped
    keys: Callable[[VisionParams], dict[str, object]] = lambda p: {}  # more of clip.vision.*
    every_nth: str | None = None  # key of the blocks that attend over the whole image
    stacked: str | None = None  # key of the blocks whose features join the language model's first layers
    top_fixed: dict[str, object] = field(default_factory=dict)  # as `fixed`, in config.json itself
    image: str = r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>"  # of a prompt: what mtmd writes for an image
    unused: tuple[str, ...] = ()  # modules that transformers loads and never runs
    newline: str | None = None  # tensor that transformers appends to an image's tokens and mtmd does not


_QWEN2_GRAPH = TextGraph(
    "qwen2", _decoder(bias=True, head_norms=False), rope_types=("default", "dynamic"),
    fixed={"use_sliding_window": False, "hidden_act": "silu", "model_type": "qwen2"},
)  # fmt: skip
_QWEN2VL_GRAPH = TextGraph(
    "qwen2vl", _decoder(bias=True, head_norms=False), rope_types=("default", "mrope"), sections=True,
    fixed={"use_sliding_window": False, "hidden_act": "silu"},
)  # fmt: skip
_QWEN3VL_GRAPH = TextGraph(
    "qwen3vl", _decoder(bias=False, head_norms=True), rope_types=("default",), sections=True, head_keys=True,
    fixed={"use_sliding_window": False, "hidden_act": "silu", "attention_bias": False},
)  # fmt: skip
_QWEN_SIZES = {"layers": "depth", "heads": "num_heads", "patch": "patch_size"}
_QWEN_FIXED = {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
_VIT_SIZES = {
    "hidden": "hidden_size", "feed_forward": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "patch": "patch_size", "image": "image_size",
}  # fmt: skip

GRAPHS: dict[str, tuple[TextGraph, VisionGraph]] = {
    "qwen2_vl": (
        _QWEN2VL_GRAPH,
        VisionGraph(
            "qwen2vl_merger", _qwen2_tower(gated=False), sizes={**_QWEN_SIZES, "hidden": "embed_dim"}, out="hidden_size",
            fixed={**_QWEN_FIXED, "hidden_act": "quick_gelu"}, activation=None, image_size=560,
        ),
    ),
    "qwen2_5_vl": (
        _QWEN2VL_GRAPH,
        VisionGraph(
            "qwen2.5vl_merger", _qwen2_tower(gated=True), out="out_hidden_size", image_size=560, activation="silu",
            sizes={**_QWEN_SIZES, "hidden": "hidden_size", "feed_forward": "intermediate_size"},
            fixed={**_QWEN_FIXED, "hidden_act": "silu", "window_size": 112},
            every_nth="fullatt_block_indexes", keys=lambda p: {"n_wa_pattern": p.window_pattern},
        ),
    ),
    "qwen3_vl": (
        _QWEN3VL_GRAPH,
        VisionGraph(
            "qwen3vl_merger", _qwen3_tower(), out="out_hidden_size", activation="gelu", square_mlp=True,
            sizes={**_QWEN_SIZES, "hidden": "hidden_size", "feed_forward": "intermediate_size", "positions": "num_position_embeddings"},
            fixed={**_QWEN_FIXED, "hidden_act": "gelu_pytorch_tanh"}, stacked="deepstack_visual_indexes",
            keys=lambda p: {"spatial_merge_size": 2, "is_deepstack_layers": [i in p.stacked for i in range(p.layers)]},
        ),
    ),
    "internvl": (
        _QWEN2_GRAPH,
        VisionGraph(
            "internvl", _internvl_tower(), sizes=_VIT_SIZES, activation="gelu", eps="layer_norm_eps", any_size=False,
            class_token=True, square_mlp=True, keys=lambda p: {"projector.scale_factor": 2},
            image="<IMG_CONTEXT>",
            fixed={"hidden_act": "gelu", "norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True,
                   "use_absolute_position_embeddings": True, "use_mean_pooling": True, "num_channels": 3},
            top_fixed={"downsample_ratio": 0.5, "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
                       "projector_hidden_act": "gelu"},
        ),
    ),
    "llava_onevision": (
        _QWEN2_GRAPH,
        VisionGraph(
            "mlp", _siglip_tower(), sizes=_VIT_SIZES, activation="gelu", eps="layer_norm_eps", any_size=False, merge=1,
            fixed={"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "model_type": "siglip_vision_model"},
            top_fixed={"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "projector_hidden_act": "gelu",
                       "multimodal_projector_bias": True},
            image="<image>", newline="v.image_newline", keys=lambda p: {"feature_layer": [p.layers]},  # the default is one less
            unused=tuple(f"model.vision_tower.post_layernorm.{p}" for p in ("weight", "bias")),
        ),
    ),
}  # fmt: skip


def graphs_of(config: dict) -> tuple[TextGraph, VisionGraph]:
    """Raises FormatError for a family that llama.cpp has not, or that is not written here."""
    kind = str(config.get("model_type", "missing"))
    if kind not in GRAPHS:
        raise FormatError(f"config.json: model_type {kind} is not written to GGUF; known are {', '.join(GRAPHS)}")
    return GRAPHS[kind]
