"""Where each VLM family keeps its decoder layers, linears and vision tokens (docs/families.md).

A tensor has up to three names: in the file, on the hub, and in the module tree of transformers 5.
The hub's name, under which the family was published, is the one used everywhere else. `hub_name`
and `module_name` take any of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal

from packaging.version import Version


@dataclass(frozen=True)
class SubBlock:
    """One residual step of a decoder layer: x ← x + post(out(mix(ins(norm(x))))).

    A layer is a chain of these. All names are those of modules in the layer.
    """

    # An attention is given positions and a mask as well, and a linear attention (`recurrent`) a
    # mask alone. What they mix is dear and narrow, and is kept until `out` is solved. An MLP's is
    # cheap and by far the widest, and is made again. Of experts each token takes some, as a router
    # says.
    kind: Literal["attention", "recurrent", "mlp", "experts"]
    norm: str  # read by `ins` and `kept` alone, so that a scale can be moved between them
    module: str  # what computes out(mix(ins(·)))
    ins: tuple[str, ...]  # linears that share the norm's output, in the order of quantization
    out: str  # the linear that closes the step
    carrier: str = ""  # the one of `ins` in which the mix is linear, row for column of `out`
    post: str = ""  # a norm between `out` and the residual stream
    # How many MLPs there are, where it is experts; `*` in the names of linears is their number.
    experts: int = 0
    kept: tuple[str, ...] = ()  # linears that read the norm as well, and stay floats
    # Whether what enters `out` may be rotated within each head, by a rotation of the carrier.
    turns: bool = False

    @property
    def steps(self) -> tuple[tuple[str, ...], ...]:
        """Linears that share one input, in the order of quantization (docs/methods.md §1.3)."""
        if self.kind == "experts":
            return tuple(names for number in range(self.experts) for names in self.expert(number))
        return self.ins, (self.out,)

    @property
    def linears(self) -> list[str]:
        """All linears of the step, in this order."""
        return [name for names in self.steps for name in names]

    @property
    def attends(self) -> bool:
        """Whether it mixes tokens with each other."""
        return self.kind in ("attention", "recurrent")

    @property
    def holder(self) -> str:
        """The module that holds the experts, and is given the tokens with their choices."""
        return self.out.partition(".*")[0]

    def expert(self, number: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The two steps of one expert."""
        ins, out = (
            tuple(name.replace("*", str(number)) for name in names)
            for names in (self.ins, (self.out,))
        )
        return ins, out

    @property
    def readers(self) -> tuple[str, ...]:
        """All linears that read the norm."""
        return *self.ins, *self.kept


ATTENTION = SubBlock(
    "attention",
    norm="input_layernorm",
    module="self_attn",
    ins=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    carrier="self_attn.v_proj",
    turns=True,
)
MLP = SubBlock(
    "mlp",
    norm="post_attention_layernorm",
    module="mlp",
    ins=("mlp.gate_proj", "mlp.up_proj"),
    out="mlp.down_proj",
    carrier="mlp.up_proj",
)
DECODER = (ATTENTION, MLP)  # the layer of a Llama-like decoder
EXPERTS = replace(
    MLP,
    kind="experts",
    ins=("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    out="mlp.experts.*.down_proj",
    carrier="mlp.experts.*.up_proj",
)
# Gemma 2 and 3 have a norm on both sides of each sub-block.
GEMMA = (
    replace(ATTENTION, post="post_attention_layernorm"),
    replace(MLP, norm="pre_feedforward_layernorm", post="post_feedforward_layernorm"),
)
# The full attention of Qwen3.5 multiplies what it mixes by a gate, channel by channel.
GATED = replace(ATTENTION, turns=False)
# A gated delta net has a norm of each head and a gate between its mix and `out`. A value's scale
# would be lost in that norm, whose own weight all heads share. Decay and step size of each head are
# one row of a matrix each.
DELTA_NET = SubBlock(
    "recurrent",
    norm="input_layernorm",
    module="linear_attn",
    ins=("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    out="linear_attn.out_proj",
    kept=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
)
# Ends of the names of buffers that the models compute themselves. Some versions of transformers
# saved them, and none reads them.
COMPUTED = ("inv_freq", "position_ids", "embed_scale")


@dataclass(frozen=True)
class Family:
    """What the program must know of one family. Docs and errors call it by `model_type`."""

    model_type: str  # as in config.json
    layers: str  # hub prefix of the decoder layers, with its dot
    vision: tuple[str, ...]  # hub prefixes of everything that makes vision tokens
    # Pairs of a name's prefix and the prefix of its module in transformers 5. Where several lead to
    # one module, the first is the published one, and some version of transformers saved the others.
    prefixes: tuple[tuple[str, str], ...]
    # For docs/families.md: repositories on the hub, tokens of an image, and, where the class takes
    # any decoder, those that it was published with.
    published: str = ""
    tokens: str = ""
    decoders: str = ""
    blocks: tuple[SubBlock, ...] = DECODER  # the chain that a decoder layer is
    # Pairs of a name in `layer_types` of config.json and the chain that such layers are.
    special: tuple[tuple[str, tuple[SubBlock, ...]], ...] = ()
    # Prefixes of tensors in the published files that transformers' model does not have.
    left_out: tuple[str, ...] = ()
    gain: float = 0.0  # what the norms add to their weights
    # Hub modules and tensors outside the decoder whose output enters its residual stream. Their
    # shapes are [hidden, ...], and `*` stands for a number.
    writers: tuple[str, ...] = ()
    seq_len: int = 512  # tokens to which the VLMQ paper cuts samples for this family
    # `grid`: an image takes as many tokens as its size asks for; `lines`: so it does, with a token
    # behind each row of them; `tile`: each image is one square tile; `tiles`: it can be several,
    # with words before each (samples/image_rules.py).
    images: str = "grid"
    # What to write before and after an image's tokens where the chat template does not.
    around: tuple[str, str] = ("", "")
    newline: int = 0  # tokens that the model appends to each image
    # Key of config.json with the token that stands for an image in a prompt, where that is not the
    # one which is repeated for all of its features.
    placeholder: str = ""
    # Packages that transformers' processor of the family asks for, beside torchvision.
    processor_needs: tuple[str, ...] = ()
    # Whether positions have three axes, for which the model must be told its image tokens.
    mrope: bool = True
    # Whether the tower takes all images of a pass as one sequence, so that the model is given one
    # sample at a time.
    packed: bool = False
    # Keyword argument of the model that marks its image tokens, which see both ways.
    marks: str = ""
    # Keyword arguments of the language model: the mask of the image tokens, and the features to add
    # to these tokens after layers 0, 1, ... (DeepStack).
    added: tuple[str, str] | None = None

    def blocks_of(self, layer_type: str) -> tuple[SubBlock, ...]:
        """The chain that a layer of a type is, which is one of `layer_types` in config.json."""
        return dict(self.special).get(layer_type, self.blocks)

    @property
    def chains(self) -> list[tuple[SubBlock, ...]]:
        """The chain of every kind of layer."""
        return [self.blocks, *dict(self.special).values()]

    @property
    def every_block(self) -> list[SubBlock]:
        """The sub-blocks of all kinds of layers. One name has one meaning in all of them."""
        return [*dict.fromkeys(block for chain in self.chains for block in chain)]

    @property
    def sparse(self) -> bool:
        """Whether decoder layers have experts, of which each token takes some."""
        return any(block.kind == "experts" for block in self.blocks)

    @property
    def row(self) -> str:
        """Its row in the table of docs/families.md."""
        name = f"`{self.model_type}`" + (f" ({self.decoders})" if self.decoders else "")
        has = {
            "DeepStack features after the first layers": bool(self.added),
            "a norm behind each sub-block": any(block.post for block in self.every_block),
            "experts": self.sparse,
            "gated delta nets in three of four layers": bool(self.special),
            "image tokens see both ways": bool(self.marks),
        }
        particular = "; ".join(words for words, there in has.items() if there)
        return f"| {name} | {self.published} | {self.tokens} | {self.seq_len} | {particular} |"

    @property
    def head(self) -> str:
        """Hub name of the output matrix. Where it is tied, no tensor has that name."""
        return self.hub_name("lm_head")

    @property
    def embedding(self) -> str:
        """Hub name of the embedding of the tokens."""
        return f"{self.layers.removesuffix('layers.')}embed_tokens"

    def module_name(self, name: str) -> str:
        """Name in the module tree of a tensor or module, whichever of its names is given."""
        table = {module: module for _, module in self.prefixes} | dict(self.prefixes)
        dotted = f"{name}."  # a prefix may be all of a module's name
        longest = max((p for p in table if dotted.startswith(p)), key=len, default="")
        return (table.get(longest, "") + dotted.removeprefix(longest)).removesuffix(".")

    def hub_name(self, name: str) -> str:
        """The published name of a tensor or module, whichever of its names is given."""
        dotted = f"{self.module_name(name)}."
        for hub, prefix in self.prefixes:
            if dotted.startswith(prefix):
                return (hub + dotted.removeprefix(prefix)).removesuffix(".")
        return name

    def is_vision(self, name: str) -> bool:
        """Whether a hub tensor or module makes vision tokens. The projector counts as well."""
        return name.startswith(self.vision)


def groups_of(blocks: Sequence[SubBlock]) -> list[tuple[str, ...]]:
    """Linears that share one input, in the order in which they are quantized."""
    return [names for block in blocks for names in block.steps]


_QWEN2_MERGER = ("visual.merger.mlp.2",)
_QWEN2_PREFIXES = (("visual.", "model.visual."), ("model.", "model.language_model."))
# SigLIP's modules lay in one of this name until transformers 5.6, and files may still have it.
_SIGLIP = "" if Version(version("transformers")) >= Version("5.6") else "vision_model."
# LLaVA-OneVision and InternVL3 were published with the names of transformers 4.
_TOWER_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)

_QWEN2_VL = Family(
    "qwen2_vl",
    published="Qwen/Qwen2-VL-*",
    tokens="one for 28 × 28 pixels",
    layers="model.layers.",
    vision=("visual.",),
    prefixes=_QWEN2_PREFIXES,
    writers=_QWEN2_MERGER,
)
_QWEN3_VL = Family(
    "qwen3_vl",
    published="Qwen/Qwen3-VL-*",
    tokens="one for 32 × 32 pixels",
    decoders="dense",
    layers="model.language_model.layers.",
    vision=("model.visual.",),
    prefixes=(),
    writers=(
        "model.visual.merger.linear_fc2",
        "model.visual.deepstack_merger_list.*.linear_fc2",
    ),
    added=("visual_pos_masks", "deepstack_visual_embeds"),
)
_QWEN3_VL_MOE = replace(
    _QWEN3_VL,
    model_type="qwen3_vl_moe",
    published="Qwen/Qwen3-VL-30B-A3B-*, -235B-A22B-*",
    decoders="",
    blocks=(ATTENTION, EXPERTS),
    writers=(),  # rotations of a stream that a router reads are not proven
)
_QWEN3_5 = Family(
    "qwen3_5",
    published="Qwen/Qwen3.5-0.8B, -2B, -4B, -9B, -27B, Qwen3.6-27B",
    tokens="one for 32 × 32 pixels",
    decoders="dense",
    layers="model.language_model.layers.",
    vision=("model.visual.",),
    prefixes=(),
    blocks=(GATED, MLP),
    special=(("linear_attention", (DELTA_NET, MLP)),),
    left_out=("mtp.",),
    gain=1.0,
    writers=("model.visual.merger.linear_fc2",),
)
_LLAVA_ONEVISION = Family(
    "llava_onevision",
    published="llava-hf/llava-onevision-qwen2-*",
    tokens="27 · 27 and one newline",
    decoders="Qwen2 decoder",
    layers="language_model.model.layers.",
    vision=("vision_tower.", "multi_modal_projector.", "image_newline"),
    prefixes=(
        ("vision_tower.vision_model.", f"model.vision_tower.{_SIGLIP}"),
        ("model.vision_tower.vision_model.", f"model.vision_tower.{_SIGLIP}"),
        ("vision_tower.", f"model.vision_tower.{_SIGLIP}"),
        ("model.vision_tower.", f"model.vision_tower.{_SIGLIP}"),
        ("image_newline", "model.image_newline"),
        *_TOWER_PREFIXES,
    ),
    writers=("multi_modal_projector.linear_2", "image_newline"),
    seq_len=986,
    images="tile",
    newline=1,
    mrope=False,
)
_INTERNVL = Family(
    "internvl",
    published="OpenGVLab/InternVL3-*-hf, InternVL3_5-*-HF",
    tokens="256, between `<img>` and `</img>`",
    decoders="Qwen2 or Qwen3 decoder",
    layers="language_model.model.layers.",
    vision=("vision_tower.", "multi_modal_projector."),
    prefixes=(("vision_tower.", "model.vision_tower."), *_TOWER_PREFIXES),
    writers=("multi_modal_projector.linear_2",),
    images="tile",
    around=("<img>", "</img>"),
    mrope=False,
)
# The tower and the connector of SmolVLM have the names of transformers 5 on the hub as well.
_IDEFICS3 = Family(
    "idefics3",
    published="HuggingFaceTB/SmolVLM-*-Instruct",
    tokens="64 for a tile of 512 × 512 pixels, with words around them",
    decoders="Llama decoder",
    layers="model.text_model.layers.",
    vision=("model.vision_model.", "model.connector."),
    prefixes=(),
    writers=("model.connector.modality_projection.proj",),
    images="tiles",
    around=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    mrope=False,
)
_GEMMA3 = Family(
    "gemma3",
    published="google/gemma-3-4b-it, -12b-it, -27b-it",
    tokens="256, between `<start_of_image>` and `<end_of_image>`",
    layers="language_model.model.layers.",
    vision=("vision_tower.", "multi_modal_projector."),
    prefixes=_LLAVA_ONEVISION.prefixes,
    blocks=GEMMA,
    gain=1.0,
    images="tile",
    around=("\n\n<start_of_image>", "<end_of_image>\n\n"),
    placeholder="boi_token_index",
    mrope=False,
    marks="token_type_ids",
)
_MISTRAL3 = Family(
    "mistral3",
    published="mistralai/Mistral-Small-3.1-24B-*, Ministral-3-*-BF16",
    tokens="one for 28 × 28 pixels, and one behind each row",
    decoders="Mistral or Ministral 3 decoder",
    layers="language_model.model.layers.",
    vision=("vision_tower.", "multi_modal_projector."),
    prefixes=_INTERNVL.prefixes,
    writers=("multi_modal_projector.linear_2",),
    # Where a row has no system message, the published chat templates write one of some 500 tokens.
    seq_len=1024,
    images="lines",
    around=("", "[IMG_END]"),
    mrope=False,
    packed=True,
)

FAMILIES = {
    f.model_type: f
    for f in (
        _QWEN2_VL,
        replace(_QWEN2_VL, model_type="qwen2_5_vl", published="Qwen/Qwen2.5-VL-*"),
        _QWEN3_VL,
        _QWEN3_VL_MOE,
        _QWEN3_5,
        _LLAVA_ONEVISION,
        _INTERNVL,
        _IDEFICS3,
        replace(
            _IDEFICS3,
            model_type="smolvlm",
            published="HuggingFaceTB/SmolVLM2-*-Instruct",
            tokens="the same; 81 for a tile of 384 pixels (2.2B)",
            processor_needs=("num2words",),
        ),
        _GEMMA3,
        _MISTRAL3,
    )
}

# model_type of files that have one of these models in its authors' own layout, which transformers
# has no class for → what they are, and what to give in their place.
OTHER_LAYOUTS = {
    "internvl_chat": "InternVL in its authors' own layout; give the repository of the same model"
    " whose name ends in -hf, such as OpenGVLab/InternVL3-1B-hf",
    "llava_qwen": "LLaVA-OneVision in its authors' own layout; give the repository of the same"
    " model under llava-hf, such as llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
}
