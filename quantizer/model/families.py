"""Where each VLM family keeps its decoder layers, linears and vision tokens (docs/families.md).

A tensor has up to three names: in the file, on the hub, and in the module tree of transformers 5.
The hub's name, under which the family was published, is the one used everywhere else. `hub_name`
and `module_name` take any of the three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Linears that share one input, in the order in which they are quantized (docs/methods.md §1.3).
DECODER_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# Each norm with the linears that read its output. Nothing else reads it, so that a scale can be
# moved between the norm and these linears.
DECODER_NORMS = (
    ("input_layernorm", DECODER_GROUPS[0]),
    ("post_attention_layernorm", DECODER_GROUPS[2]),
)
# Ends of the names of buffers that the models compute themselves. Some versions of transformers
# saved them, and none reads them.
COMPUTED = ("inv_freq", "position_ids")


@dataclass(frozen=True)
class Family:
    """What the program must know of one family. Docs and errors call it by `model_type`."""

    model_type: str  # as in config.json
    layers: str  # hub prefix of the decoder layers, with its dot
    vision: tuple[str, ...]  # hub prefixes of everything that makes vision tokens
    # Pairs of a name's prefix and the prefix of its module in transformers 5. Where several lead to
    # one module, the first is the published one, and some version of transformers saved the others.
    prefixes: tuple[tuple[str, str], ...]
    groups: tuple[tuple[str, ...], ...] = DECODER_GROUPS
    norms: tuple[tuple[str, tuple[str, ...]], ...] = DECODER_NORMS
    # Hub modules and tensors outside the decoder whose output enters its residual stream. Their
    # shapes are [hidden, ...], and `*` stands for a number.
    writers: tuple[str, ...] = ()
    seq_len: int = 512  # tokens to which the VLMQ paper cuts samples for this family
    # `grid`: an image takes as many tokens as its size asks for; `tile`: each image is one square
    # tile; `tiles`: it can be several, with words before each (samples/image_rules.py).
    images: str = "grid"
    # What to write before and after an image's tokens where the chat template does not.
    around: tuple[str, str] = ("", "")
    newline: int = 0  # tokens that the model appends to each image
    # Packages that transformers' processor of the family asks for, beside torchvision.
    processor_needs: tuple[str, ...] = ()
    # Whether positions have three axes, for which the model must be told its image tokens.
    mrope: bool = True
    # Keyword arguments of the language model: the mask of the image tokens, and the features to add
    # to these tokens after layers 0, 1, ... (DeepStack).
    added: tuple[str, str] | None = None

    def linear_names(self, layers: int) -> list[str]:
        """Hub names of the modules to quantize, in layer order, then in the order of `groups`."""
        return [
            f"{self.layers}{i}.{p}" for i in range(layers) for group in self.groups for p in group
        ]

    @property
    def head(self) -> str:
        """Hub name of the output matrix. Where it is tied, no tensor has that name."""
        return self.hub_name("lm_head.weight").removesuffix(".weight")

    @property
    def embedding(self) -> str:
        """Hub name of the embedding of the tokens."""
        return f"{self.layers.removesuffix('layers.')}embed_tokens"

    def module_name(self, name: str) -> str:
        """Name in the module tree of a tensor or module, whichever of its names is given."""
        table = {module: module for _, module in self.prefixes} | dict(self.prefixes)
        longest = max((prefix for prefix in table if name.startswith(prefix)), key=len, default="")
        return table.get(longest, "") + name.removeprefix(longest)

    def hub_name(self, name: str) -> str:
        """The published name of a tensor or module, whichever of its names is given."""
        module = self.module_name(name)
        for hub, prefix in self.prefixes:
            if module.startswith(prefix):
                return hub + module.removeprefix(prefix)
        return name

    def is_vision(self, name: str) -> bool:
        """Whether a hub tensor or module makes vision tokens. The projector counts as well."""
        return name.startswith(self.vision)


_QWEN2_MERGER = ("visual.merger.mlp.2",)
_QWEN2_PREFIXES = (("visual.", "model.visual."), ("model.", "model.language_model."))
# LLaVA-OneVision and InternVL3 were published with the names of transformers 4.
_TOWER_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)

_QWEN2_VL = Family(
    "qwen2_vl",
    layers="model.layers.",
    vision=("visual.",),
    prefixes=_QWEN2_PREFIXES,
    writers=_QWEN2_MERGER,
)
_QWEN3_VL = Family(
    "qwen3_vl",
    layers="model.language_model.layers.",
    vision=("model.visual.",),
    prefixes=(),
    writers=(
        "model.visual.merger.linear_fc2",
        "model.visual.deepstack_merger_list.*.linear_fc2",
    ),
    added=("visual_pos_masks", "deepstack_visual_embeds"),
)
_LLAVA_ONEVISION = Family(
    "llava_onevision",
    layers="language_model.model.layers.",
    vision=("vision_tower.", "multi_modal_projector.", "image_newline"),
    # transformers 4.52 to 4.57 kept `vision_model` in its modules; transformers 5 saves without it.
    prefixes=(
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("model.vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
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
    layers="model.text_model.layers.",
    vision=("model.vision_model.", "model.connector."),
    prefixes=(),
    writers=("model.connector.modality_projection.proj",),
    images="tiles",
    around=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    mrope=False,
)

FAMILIES = {
    f.model_type: f
    for f in (
        _QWEN2_VL,
        replace(_QWEN2_VL, model_type="qwen2_5_vl"),
        _QWEN3_VL,
        _LLAVA_ONEVISION,
        _INTERNVL,
        _IDEFICS3,
        replace(_IDEFICS3, model_type="smolvlm", processor_needs=("num2words",)),
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
