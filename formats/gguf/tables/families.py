"""What llama.cpp calls each family: its text graph, its vision graph, and the tensors of both.

Nothing else in this package knows a family by name. A new family is an entry in `GRAPHS`. The
tables of tensors are made by functions, because the families share most of their rows. In a row,
the shape is given in names of the sizes of `graphs.TextParams` or `graphs.VisionParams`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.tables.graphs import Part, Row, TextGraph, VisionGraph
from vlmq_export.quantizer.model.architecture import Architecture

# Functions that make rows


def _one(gguf: str, module: str, shape: str, part: Part | None = None) -> tuple[Row, ...]:
    """A single tensor."""
    return (Row(gguf, module, tuple(shape.split()), part),)


def _linear(
    gguf: str, module: str, shape: str, *, bias: bool = True, part: Part | None = None
) -> tuple[Row, ...]:
    """A matrix and its bias. `shape` names the outputs and the inputs."""
    sizes = tuple(shape.split())
    weight = Row(f"{gguf}.weight", f"{module}.weight", sizes, part, linear=True)
    return (weight, Row(f"{gguf}.bias", f"{module}.bias", sizes[:1], part)) if bias else (weight,)


def _norm(
    gguf: str, module: str, size: str = "hidden", *, bias: bool = True, part: Part | None = None
) -> tuple[Row, ...]:
    """The weight of a norm and its bias."""
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(Row(f"{gguf}.{p}", f"{module}.{p}", (size,), part) for p in parts)


# Parts of a source tensor


def _third(i: int) -> Part:
    """One of q, k and v from a fused weight or bias: [3·hidden, …] → [hidden, …]."""
    return lambda qkv: qkv.chunk(3)[i]


def _frame(i: int) -> Part:
    """A time slice of the patch convolution: [out, 3, 2, patch, patch] → [out, 3, patch, patch]."""
    return lambda patches: patches[:, :, i]


def _one_added(weight: torch.Tensor) -> torch.Tensor:
    """What a norm of Gemma multiplies by, in float32 as transformers computes it. [n] → [n]"""
    return 1 + weight.float()


def _single(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the dimensions of one before it: [1, 1, n] → [n]."""
    return tensor.flatten(0, -2).squeeze(0)


def a_row(rows: torch.Tensor) -> torch.Tensor:
    """One row of the embedding. The tokenizer says which, and `Layout` is told its number."""
    raise LookupError("the layout was not told which row of the embedding is that of the token")


def class_row_first(rows: torch.Tensor) -> torch.Tensor:
    """InternVL's position rows as on the hub, where row 0 is that of the class token.

    [1, patches + 1, hidden] → [patches + 1, hidden]
    """
    return rows[0]


def class_row_last(rows: torch.Tensor) -> torch.Tensor:
    """InternVL's position rows with that of the class token at the end.

    The graph of llama.cpp b11549 appends the class token behind the patches, and adds the rows in
    the order of the file. [1, patches + 1, hidden] → [patches + 1, hidden]
    """
    return rows[0].roll(-1, 0)


# Tensors of the language models


def _decoder(
    *,
    bias: bool,
    head_norms: bool,
    model: str = "model.language_model.",
    pairs: bool = False,
    gemma: bool = False,
    experts: bool = False,
) -> tuple[Row, ...]:
    """The backbones of Qwen2, Qwen3, Llama and Gemma.

    bias: whether q, k and v have one.
    head_norms: whether the queries and keys of each head are normalized.
    model: where the module is.
    pairs: whether the two rows of a rotary pair stand next to each other in the file.
    experts: whether a router and experts are in place of the MLP.
    gemma: whether a norm stands behind each sub-block too, and all norms multiply by 1 + weight.

    A model whose output matrix is the embedding has no `output.weight`: see `Layout.text`.
    """
    at, layer = "blk.{i}.", model + "layers.{i}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    norm = partial(_norm, bias=False, part=_one_added if gemma else None)
    rows = _one("token_embd.weight", model + "embed_tokens.weight", "vocabulary hidden")
    rows += norm(at + "attn_norm", layer + "input_layernorm")
    for letter, size in (("q", "query"), ("k", "key"), ("v", "key")):
        name, module = f"{at}attn_{letter}", f"{attention}{letter}"
        linear = _linear(name, module + "_proj", f"{size} hidden", bias=bias)
        rows += tuple(replace(row, pairs=pairs and letter != "v") for row in linear)
        if head_norms and letter != "v":
            rows += norm(name + "_norm", module + "_norm", "head")
    rows += _linear(at + "attn_output", attention + "o_proj", "hidden query", bias=False)
    if gemma:
        rows += norm(at + "post_attention_norm", layer + "post_attention_layernorm")
        rows += norm(at + "ffn_norm", layer + "pre_feedforward_layernorm")
        rows += norm(at + "post_ffw_norm", layer + "post_feedforward_layernorm")
    else:
        rows += norm(at + "ffn_norm", layer + "post_attention_layernorm")
    if experts:
        rows += _experts(at, mlp)
    else:
        for name in ("gate", "up"):
            wide = "feed_forward hidden"
            rows += _linear(f"{at}ffn_{name}", f"{mlp}{name}_proj", wide, bias=False)
        rows += _linear(at + "ffn_down", mlp + "down_proj", "hidden feed_forward", bias=False)
    rows += norm("output_norm", model + "norm")
    return rows + _linear("output", "lm_head", "vocabulary hidden", bias=False)


def _experts(at: str, mlp: str) -> tuple[Row, ...]:
    """A router, and the matrices of all experts in three tensors."""
    router = Row(
        at + "ffn_gate_inp.weight", mlp + "gate.weight", ("experts", "hidden"), None, wide=True
    )
    shapes = {"gate": ("expert_width", "hidden"), "up": ("expert_width", "hidden")}
    shapes["down"] = ("hidden", "expert_width")
    return router, *(
        Row(
            f"{at}ffn_{name}_exps.weight",
            f"{mlp}experts.0.{name}_proj.weight",
            ("experts", *shape),
            linear=True,
            stacked=True,
        )
        for name, shape in shapes.items()
    )


def _minus_exp(logarithm: torch.Tensor) -> torch.Tensor:
    """−exp of what a delta net holds of its decay, float32. [n] → [n]"""
    return -logarithm.float().exp()


def _taps(convolution: torch.Tensor) -> torch.Tensor:
    """A convolution of each channel by itself: [channels, 1, kernel] → [channels, kernel]."""
    return convolution.squeeze(1)


def _hybrid() -> tuple[Row, ...]:
    """The backbone of Qwen3.5: layers with an attention, and others with a gated delta net.

    The attention's queries stand beside the gates of their heads in one matrix, as in transformers.
    """
    model = "model.language_model."
    at, layer = "blk.{i}.", model + "layers.{i}."
    norm = partial(_norm, bias=False, part=_one_added)
    rows = _one("token_embd.weight", model + "embed_tokens.weight", "vocabulary hidden")
    rows += norm(at + "attn_norm", layer + "input_layernorm")
    rows += norm(at + "post_attention_norm", layer + "post_attention_layernorm")
    for name in ("gate", "up"):
        rows += _linear(
            f"{at}ffn_{name}", f"{layer}mlp.{name}_proj", "feed_forward hidden", bias=False
        )
    rows += _linear(at + "ffn_down", layer + "mlp.down_proj", "hidden feed_forward", bias=False)
    at, own = "blk.{a}.", model + "layers.{a}.self_attn."
    for letter, size in (("q", "gated_query"), ("k", "key"), ("v", "key")):
        rows += _linear(f"{at}attn_{letter}", f"{own}{letter}_proj", f"{size} hidden", bias=False)
        if letter != "v":
            rows += norm(f"{at}attn_{letter}_norm", f"{own}{letter}_norm", "head")
    rows += _linear(at + "attn_output", own + "o_proj", "hidden query", bias=False)
    rows += _delta_net("blk.{r}.", model + "layers.{r}.linear_attn.")
    rows += norm("output_norm", model + "norm")
    return rows + _linear("output", "lm_head", "vocabulary hidden", bias=False)


def _delta_net(at: str, own: str) -> tuple[Row, ...]:
    """A gated delta net. What is small is no linear, as it stays float."""
    rows = _linear(at + "attn_qkv", own + "in_proj_qkv", "mixed hidden", bias=False)
    rows += _linear(at + "attn_gate", own + "in_proj_z", "values hidden", bias=False)
    rows += _one(at + "ssm_conv1d.weight", own + "conv1d.weight", "mixed kernel", _taps)
    rows += _one(at + "ssm_dt.bias", own + "dt_bias", "value_heads")
    rows += _one(at + "ssm_a", own + "A_log", "value_heads", _minus_exp)
    for name, letter in (("beta", "b"), ("alpha", "a")):
        module = f"{own}in_proj_{letter}.weight"
        rows += _one(f"{at}ssm_{name}.weight", module, "value_heads hidden")
    rows = tuple(replace(row, value_rows=True, wide="conv1d" in row.gguf) for row in rows)
    rows += _norm(at + "ssm_norm", own + "norm", "value_head", bias=False)
    (out,) = _linear(at + "ssm_out", own + "out_proj", "hidden values", bias=False)
    return (*rows, replace(out, value_columns=True))


# Tensors of the vision towers

_BLOCK, _QWEN = "v.blk.{i}.", "model.visual."
# Shapes.
_PATCHES = "hidden 3 patch patch"
_WIDE, _NARROW, _SQUARE = "feed_forward hidden", "hidden feed_forward", "hidden hidden"
_FRAMES = (
    *_one("v.patch_embd.weight", _QWEN + "patch_embed.proj.weight", _PATCHES, _frame(0)),
    *_one("v.patch_embd.weight.1", _QWEN + "patch_embed.proj.weight", _PATCHES, _frame(1)),
)


def _qwen2_tower(*, gated: bool) -> tuple[Row, ...]:
    """Qwen2-VL, and Qwen2.5-VL, which has a gated MLP and RMS norms without bias."""
    block, merger = _QWEN + "blocks.{i}.", _QWEN + "merger."
    rows = _FRAMES
    for n in "12":
        rows += _norm(f"{_BLOCK}ln{n}", f"{block}norm{n}", bias=not gated)
    for i, letter in enumerate("qkv"):
        rows += _linear(f"{_BLOCK}attn_{letter}", block + "attn.qkv", _SQUARE, part=_third(i))
    rows += _linear(_BLOCK + "attn_out", block + "attn.proj", _SQUARE)
    if gated:
        rows += _linear(_BLOCK + "ffn_gate", block + "mlp.gate_proj", _WIDE)
        rows += _linear(_BLOCK + "ffn_up", block + "mlp.up_proj", _WIDE)
        rows += _linear(_BLOCK + "ffn_down", block + "mlp.down_proj", _NARROW)
    else:
        rows += _linear(_BLOCK + "ffn_up", block + "mlp.fc1", _WIDE)
        rows += _linear(_BLOCK + "ffn_down", block + "mlp.fc2", _NARROW)
    rows += _norm("v.post_ln", merger + "ln_q", bias=not gated)
    rows += _linear("mm.0", merger + "mlp.0", "merged merged")
    return rows + _linear("mm.2", merger + "mlp.2", "out merged")


def _qwen3_tower() -> tuple[Row, ...]:
    """Qwen3-VL, which stacks the features of some blocks (DeepStack)."""
    block, merger, stack = (
        _QWEN + part for part in ("blocks.{i}.", "merger.", "deepstack_merger_list.{d}.")
    )
    rows = _FRAMES + _one("v.patch_embd.bias", _QWEN + "patch_embed.proj.bias", "hidden")
    rows += _one("v.position_embd.weight", _QWEN + "pos_embed.weight", "positions hidden")
    for n in "12":
        rows += _norm(f"{_BLOCK}ln{n}", f"{block}norm{n}")
    rows += _linear(_BLOCK + "attn_qkv", block + "attn.qkv", "fused hidden")
    rows += _linear(_BLOCK + "attn_out", block + "attn.proj", _SQUARE)
    rows += _linear(_BLOCK + "ffn_up", block + "mlp.linear_fc1", _WIDE)
    rows += _linear(_BLOCK + "ffn_down", block + "mlp.linear_fc2", _NARROW)
    rows += _norm("v.post_ln", merger + "norm")
    rows += _linear("mm.0", merger + "linear_fc1", "merged merged")
    rows += _linear("mm.2", merger + "linear_fc2", "out merged")
    rows += _norm("v.deepstack.{d}.norm", stack + "norm", "merged")
    rows += _linear("v.deepstack.{d}.fc1", stack + "linear_fc1", "merged merged")
    return rows + _linear("v.deepstack.{d}.fc2", stack + "linear_fc2", "out merged")


def _internvl_tower() -> tuple[Row, ...]:
    """InternVL3: a vision transformer with a class token and layer scales."""
    tower, projector = "model.vision_tower.", "model.multi_modal_projector."
    block, embed = tower + "encoder.layer.{i}.", tower + "embeddings."
    patches, positions = embed + "patch_embeddings.projection.", embed + "position_embeddings"
    rows = _one("v.class_embd", embed + "cls_token", "hidden", _single)
    rows += _one("v.patch_embd.weight", patches + "weight", _PATCHES)
    rows += _one("v.patch_embd.bias", patches + "bias", "hidden")
    rows += _one("v.position_embd.weight", positions, "positions hidden", class_row_last)
    rows += _norm(_BLOCK + "ln1", block + "layernorm_before")
    rows += _norm(_BLOCK + "ln2", block + "layernorm_after")
    for letter in "qkv":
        rows += _linear(f"{_BLOCK}attn_{letter}", f"{block}attention.{letter}_proj", _SQUARE)
    rows += _linear(_BLOCK + "attn_out", block + "attention.projection_layer", _SQUARE)
    rows += _linear(_BLOCK + "ffn_up", block + "mlp.fc1", _WIDE)
    rows += _linear(_BLOCK + "ffn_down", block + "mlp.fc2", _NARROW)
    for n in "12":
        rows += _one(f"{_BLOCK}ls{n}.weight", f"{block}lambda_{n}", "hidden")
    rows += _norm("mm.model.mlp.0", projector + "layer_norm", "merged")
    rows += _linear("mm.model.mlp.1", projector + "linear_1", "out merged")
    return rows + _linear("mm.model.mlp.3", projector + "linear_2", "out out")


def _siglip_tower(tower: str) -> tuple[Row, ...]:
    """SigLIP, without its last norm and a projector. `tower` is where the module is."""
    block, embed = tower + "encoder.layers.{i}.", tower + "embeddings."
    rows = _one("v.patch_embd.weight", embed + "patch_embedding.weight", _PATCHES)
    rows += _one("v.patch_embd.bias", embed + "patch_embedding.bias", "hidden")
    rows += _one("v.position_embd.weight", embed + "position_embedding.weight", "positions hidden")
    for n in "12":
        rows += _norm(f"{_BLOCK}ln{n}", f"{block}layer_norm{n}")
    for letter in "qkv":
        rows += _linear(f"{_BLOCK}attn_{letter}", f"{block}self_attn.{letter}_proj", _SQUARE)
    rows += _linear(_BLOCK + "attn_out", block + "self_attn.out_proj", _SQUARE)
    rows += _linear(_BLOCK + "ffn_up", block + "mlp.fc1", _WIDE)
    return rows + _linear(_BLOCK + "ffn_down", block + "mlp.fc2", _NARROW)


def _onevision_tower() -> tuple[Row, ...]:
    """SigLIP with LLaVA-OneVision's projector."""
    projector = "model.multi_modal_projector."
    rows = _siglip_tower("model.vision_tower.")
    rows += _linear("mm.0", projector + "linear_1", "out hidden")
    rows += _linear("mm.2", projector + "linear_2", "out out")
    # mtmd's graph has no use for this row. It is written for other readers.
    return rows + _one("v.image_newline", "model.image_newline", "out")


def _smolvlm_tower() -> tuple[Row, ...]:
    """SigLIP with Idefics3's connector, which is one matrix."""
    tower, connector = "model.vision_model.", "model.connector.modality_projection.proj"
    rows = _siglip_tower(tower) + _norm("v.post_ln", tower + "post_layernorm")
    return rows + _linear("mm.model.fc", connector, "out merged", bias=False)


def _gemma3_tower() -> tuple[Row, ...]:
    """SigLIP with Gemma 3's projector: a norm, and a matrix that llama.cpp transposes by itself."""
    tower, projector = "model.vision_tower.", "model.multi_modal_projector.mm_"
    rows = _siglip_tower(tower) + _norm("v.post_ln", tower + "post_layernorm")
    norm = projector + "soft_emb_norm"
    rows += _norm("mm.soft_emb_norm", norm, bias=False, part=_one_added)
    matrix = projector + "input_projection_weight"
    return rows + _one("mm.input_projection.weight", matrix, "hidden out")


def _pixtral_tower() -> tuple[Row, ...]:
    """Pixtral with Mistral 3's projector, and the embedding of what stands behind a row."""
    tower, projector = "model.vision_tower.", "model.multi_modal_projector."
    block, merger = tower + "transformer.layers.{i}.", projector + "patch_merger.merging_layer"
    rows = _one("v.patch_embd.weight", tower + "patch_conv.weight", _PATCHES)
    rows += _norm("v.pre_ln", tower + "ln_pre", bias=False)
    rows += _norm(_BLOCK + "ln1", block + "attention_norm", bias=False)
    rows += _norm(_BLOCK + "ln2", block + "ffn_norm", bias=False)
    for letter in "qkv":
        module = f"{block}attention.{letter}_proj"
        linear = _linear(f"{_BLOCK}attn_{letter}", module, _SQUARE, bias=False)
        rows += tuple(replace(row, pairs=letter != "v") for row in linear)
    rows += _linear(_BLOCK + "attn_out", block + "attention.o_proj", _SQUARE, bias=False)
    for name, shape in (("gate", _WIDE), ("up", _WIDE), ("down", _NARROW)):
        module = f"{block}feed_forward.{name}_proj"
        rows += _linear(f"{_BLOCK}ffn_{name}", module, shape, bias=False)
    rows += _norm("mm.input_norm", projector + "norm", bias=False)
    rows += _linear("mm.patch_merger", merger, "hidden merged", bias=False)
    rows += _linear("mm.1", projector + "linear_1", "out hidden", bias=False)
    rows += _linear("mm.2", projector + "linear_2", "out out", bias=False)
    embedding = "model.language_model.embed_tokens.weight"
    return rows + _one("v.token_embd.img_break", embedding, "out", a_row)


# Families

_TEXT_FIXED = {"use_sliding_window": False, "hidden_act": "silu"}
_QWEN2_GRAPH = TextGraph(
    "qwen2",
    _decoder(bias=True, head_norms=False),
    rope_types=("default", "dynamic"),
    fixed={**_TEXT_FIXED, "model_type": "qwen2"},
)
_QWEN3_GRAPH = TextGraph(
    "qwen3",
    _decoder(bias=False, head_norms=True),
    rope_types=("default",),
    head_keys=True,
    fixed={**_TEXT_FIXED, "model_type": "qwen3", "attention_bias": False},
)
_QWEN2VL_GRAPH = TextGraph(
    "qwen2vl",
    _decoder(bias=True, head_norms=False),
    rope_types=("default",),
    sections=True,
    fixed=_TEXT_FIXED,
)
_QWEN3VL_GRAPH = TextGraph(
    "qwen3vl",
    _decoder(bias=False, head_norms=True),
    rope_types=("default",),
    sections=True,
    head_keys=True,
    fixed={**_TEXT_FIXED, "attention_bias": False},
)
_QWEN3VLMOE_GRAPH = replace(
    _QWEN3VL_GRAPH,
    arch="qwen3vlmoe",
    rows=_decoder(bias=False, head_norms=True, experts=True),
    sparse=True,
    fixed={**_QWEN3VL_GRAPH.fixed, "norm_topk_prob": True},
)
_QWEN35_GRAPH = TextGraph(
    "qwen35",
    _hybrid(),
    rope_types=("default",),
    sections=True,
    head_keys=True,
    recurrent=True,
    fixed={**_TEXT_FIXED, "attention_bias": False},
)
_LLAMA_GRAPH = TextGraph(
    "llama",
    _decoder(bias=False, head_norms=False, model="model.text_model.", pairs=True),
    rope_types=("default",),
    head_keys=True,
    fixed={
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
)


def _gemma3_scalar(layers: int, hidden: int, heads: int, head: int) -> int:
    """The number whose root llama.cpp divides queries by. It knows Gemma 3 27B by its layers."""
    return hidden // heads if layers == 62 else head


_GEMMA3_GRAPH = TextGraph(
    "gemma3",
    _decoder(bias=False, head_norms=True, gemma=True),
    rope_types=("default", "linear"),
    head_keys=True,
    windows=6,
    gelu=True,
    scalar=_gemma3_scalar,
    fixed={
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
)
_MISTRAL3_GRAPH = TextGraph(
    "mistral3",
    _decoder(bias=False, head_norms=False, pairs=True),
    rope_types=("default",),
    head_keys=True,
    fixed={"model_type": "mistral", "hidden_act": "silu", "sliding_window": None},
)
_MINISTRAL3_GRAPH = replace(
    _MISTRAL3_GRAPH,
    rope_types=("yarn",),
    fixed={**_MISTRAL3_GRAPH.fixed, "model_type": "ministral3"},
)
_QWEN_SIZES = {"layers": "depth", "heads": "num_heads", "patch": "patch_size"}
_NAMED_SIZES = {**_QWEN_SIZES, "hidden": "hidden_size", "feed_forward": "intermediate_size"}
_QWEN_FIXED = {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
_VIT_SIZES = {
    "hidden": "hidden_size",
    "feed_forward": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "patch": "patch_size",
    "image": "image_size",
}

_QWEN2_VL = VisionGraph(
    "qwen2vl_merger",
    _qwen2_tower(gated=False),
    sizes={**_QWEN_SIZES, "hidden": "embed_dim"},
    out="hidden_size",
    fixed={**_QWEN_FIXED, "hidden_act": "quick_gelu"},
    activation=None,
    image_size=560,
)
_QWEN2_5_VL = VisionGraph(
    "qwen2.5vl_merger",
    _qwen2_tower(gated=True),
    sizes=_NAMED_SIZES,
    out="out_hidden_size",
    fixed={**_QWEN_FIXED, "hidden_act": "silu", "window_size": 112},
    activation="silu",
    image_size=560,
    every_nth="fullatt_block_indexes",
    keys=lambda p: {"n_wa_pattern": p.window_pattern},
)
_QWEN3_VL = VisionGraph(
    "qwen3vl_merger",
    _qwen3_tower(),
    sizes={**_NAMED_SIZES, "positions": "num_position_embeddings"},
    out="out_hidden_size",
    fixed={**_QWEN_FIXED, "hidden_act": "gelu_pytorch_tanh"},
    activation="gelu",
    square_mlp=True,
    stacked="deepstack_visual_indexes",
    keys=lambda p: {
        "spatial_merge_size": 2,
        "is_deepstack_layers": [i in p.stacked for i in range(p.layers)],
    },
)
_QWEN3_5 = replace(
    _QWEN3_VL, fixed={**_QWEN3_VL.fixed, "deepstack_visual_indexes": []}, stacked=None
)
# b11549 asks for these two numbers, and for no key of the file.
_LARGE_TOWER = (
    "llama.cpp b11549 computes RMS norms and norms of queries and keys only in a tower of 3200"
    " columns and 45 layers (that of InternVL3-38B and -78B), which no test here has proven yet;"
    " leave out --format gguf"
)
_INTERNVL = VisionGraph(
    "internvl",
    _internvl_tower(),
    sizes=_VIT_SIZES,
    fixed={
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "use_qk_norm": False,
        "attention_bias": True,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
        "num_channels": 3,
    },
    reasons={"norm_type": _LARGE_TOWER, "use_qk_norm": _LARGE_TOWER},
    top_fixed={
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    },
    activation="gelu",
    eps="layer_norm_eps",
    any_size=False,
    class_token=True,
    square_mlp=True,
    image="<IMG_CONTEXT>",
    keys=lambda p: {"projector.scale_factor": 2},
)
_LLAVA_ONEVISION = VisionGraph(
    "mlp",
    _onevision_tower(),
    sizes=_VIT_SIZES,
    fixed={
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
    },
    top_fixed={
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    },
    activation="gelu",
    eps="layer_norm_eps",
    any_size=False,
    merge=1,
    image="<image>",
    newline="v.image_newline",
    # Without this key, llama.cpp leaves out the last block.
    keys=lambda p: {"feature_layer": [p.layers]},
    unused=tuple(f"model.vision_tower.post_layernorm.{p}" for p in ("weight", "bias")),
)
_IDEFICS3 = VisionGraph(
    "idefics3",
    _smolvlm_tower(),
    sizes=_VIT_SIZES,
    fixed={"hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
    activation="gelu",
    eps="layer_norm_eps",
    any_size=False,
    merge="scale_factor",
    image="<image>",
    words=True,
    keys=lambda p: {"projector.scale_factor": p.merge},
)
_GEMMA3 = VisionGraph(
    "gemma3",
    _gemma3_tower(),
    sizes=_VIT_SIZES,
    fixed={
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
    },
    activation="gelu",
    eps="layer_norm_eps",
    any_size=False,
    pooled="mm_tokens_per_image",
    image="<start_of_image>",
    around="\n\n",
    keys=lambda p: {"projector.scale_factor": p.merge},
)
_MISTRAL3 = VisionGraph(
    "pixtral",
    _pixtral_tower(),
    sizes=_VIT_SIZES,
    fixed={"model_type": "pixtral", "hidden_act": "silu", "num_channels": 3},
    top_fixed={
        "vision_feature_layer": -1,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": False,
    },
    activation="silu",
    eps=1e-5,
    text_eps=True,
    rotary_base=1e4,
    merge="spatial_merge_size",
    square_mlp=True,
    image=r"\[IMG\]",
    row_end="[IMG_BREAK]",
    most=1024,
    keys=lambda p: {"spatial_merge_size": p.merge},
)

# model_type in config.json → the graphs. Of several for the text, its own model_type says which.
GRAPHS: dict[str, tuple[tuple[TextGraph, ...], VisionGraph]] = {
    "qwen2_vl": ((_QWEN2VL_GRAPH,), _QWEN2_VL),
    "qwen2_5_vl": ((_QWEN2VL_GRAPH,), _QWEN2_5_VL),
    "qwen3_vl": ((_QWEN3VL_GRAPH,), _QWEN3_VL),
    "qwen3_vl_moe": ((_QWEN3VLMOE_GRAPH,), _QWEN3_VL),
    "qwen3_5": ((_QWEN35_GRAPH,), _QWEN3_5),
    "internvl": ((_QWEN2_GRAPH, _QWEN3_GRAPH), _INTERNVL),
    "llava_onevision": ((_QWEN2_GRAPH,), _LLAVA_ONEVISION),
    "idefics3": ((_LLAMA_GRAPH,), _IDEFICS3),
    "smolvlm": ((_LLAMA_GRAPH,), _IDEFICS3),
    "gemma3": ((_GEMMA3_GRAPH,), _GEMMA3),
    "mistral3": ((_MISTRAL3_GRAPH, _MINISTRAL3_GRAPH), _MISTRAL3),
}


def graphs_of(architecture: Architecture) -> tuple[TextGraph, VisionGraph]:
    """The graphs of a model's family. Raises FormatError for a family that is not in `GRAPHS`."""
    kind = architecture.model_type
    if kind not in GRAPHS:
        raise FormatError(
            f"config.json: model_type {kind} is not written to GGUF; known are {', '.join(GRAPHS)};"
            " leave out --format gguf"
        )
    texts, vision = GRAPHS[kind]
    own = architecture.text.get("model_type")
    return next((t for t in texts if t.fixed.get("model_type") == own), texts[0]), vision
