"""Where each VLM family keeps its decoder layers, projections and vision tokens: one entry a family (docs/families.md).

A tensor has up to three names: in the file, of the hub, in the module tree of transformers 5. The hub's names are ours
throughout; `hub_name` and `module_name` take any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmq_export.errors import CheckpointError

# Linears that share one input, in the order in which they are quantized (true-sequential, methods.md §1.3).
DECODER_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
MAX_LAYERS = 1000  # the deepest published models have under 130
MAX_SIZE = 2**24  # of any other dimension: the longest contexts have 10 million positions
_SIZES = frozenset(
    [
        "depth",
        "embed_dim",
        "head_dim",
        "hidden_size",
        "image_size",
        "in_channels",
        "in_chans",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "out_hidden_size",
        "patch_size",
        "spatial_merge_size",
        "spatial_patch_size",
        "temporal_patch_size",
        "vocab_size",
        "window_size",
    ]
)
# A norm and the linears that read its output, and nothing else does: what a scale can be moved between.
DECODER_NORMS = (
    ("input_layernorm", DECODER_GROUPS[0]),
    ("post_attention_layernorm", DECODER_GROUPS[2]),
)


@dataclass(frozen=True)
class Family:
    """One entry a family.

    `prefixes` maps the hub's tensor names to the module tree of transformers 5. Where several lead to one module, the
    first is the published one and the others are what some version of transformers saved.
    """

    model_type: str
    layers: str  # hub prefix of the decoder layers
    vision: tuple[str, ...]  # hub prefixes of everything that makes vision tokens
    prefixes: tuple[tuple[str, str], ...]
    groups: tuple[tuple[str, ...], ...] = DECODER_GROUPS
    norms: tuple[tuple[str, tuple[str, ...]], ...] = DECODER_NORMS
    # Hub modules and tensors outside the decoder that write into its residual stream, `*` for a number; all [hidden, …].
    writers: tuple[str, ...] = ()
    seq_len: int = 512  # the paper's truncation for this family
    images: str = "grid"  # `grid`: as many tokens as its size asks for; `tile`: one square tile an image (images.py)
    around: tuple[str, str] = ("", "")  # written before and after an image's tokens where the template does not
    newline: int = 0  # tokens that the model appends to each image
    mrope: bool = True  # positions of three axes, for which the model wants to be told its image tokens
    # Keyword arguments of the language model with the image tokens' mask, and what to add to them after layers 0, 1, …
    added: tuple[str, str] | None = None

    def linear_names(self, layers: int) -> list[str]:
        """Hub names of the modules to quantize, in layer order, then in the order of `groups`."""
        return [f"{self.layers}{i}.{p}" for i in range(layers) for group in self.groups for p in group]

    @property
    def head(self) -> str:
        """Hub name of the output matrix; where it is tied to the embedding no tensor has that name."""
        return self.hub_name("lm_head.weight").removesuffix(".weight")

    def module_name(self, name: str) -> str:
        """Name in the module tree of a tensor or module, named in any way."""
        table = {module: module for _, module in self.prefixes} | dict(self.prefixes)
        longest = max((prefix for prefix in table if name.startswith(prefix)), key=len, default="")
        return table.get(longest, "") + name.removeprefix(longest)

    def hub_name(self, name: str) -> str:
        """The published name of a tensor or module, named in any way."""
        module = self.module_name(name)
        for hub, prefix in self.prefixes:
            if module.startswith(prefix):
                return hub + module.removeprefix(prefix)
        return name

    def is_vision(self, name: str) -> bool:
        """Whether a hub tensor or module makes vision tokens (the projector included)."""
        return name.startswith(self.vision)


_MERGER = ("visual.merger.mlp.2",)
_QWEN = (("visual.", "model.visual."), ("model.", "model.language_model."))
# transformers 4 published these two; 4.52 to 4.57 kept `vision_model` in memory; 5 saves without it.
_TOWER = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)

FAMILIES = {
    f.model_type: f
    for f in (
        Family("qwen2_vl", layers="model.layers.", vision=("visual.",), prefixes=_QWEN, writers=_MERGER),
        Family("qwen2_5_vl", layers="model.layers.", vision=("visual.",), prefixes=_QWEN, writers=_MERGER),
        Family(
            "qwen3_vl",
            layers="model.language_model.layers.",
            vision=("model.visual.",),
            prefixes=(),
            writers=("model.visual.merger.linear_fc2", "model.visual.deepstack_merger_list.*.linear_fc2"),
            added=("visual_pos_masks", "deepstack_visual_embeds"),
        ),
        Family(
            "llava_onevision",
            layers="language_model.model.layers.",
            vision=("vision_tower.", "multi_modal_projector.", "image_newline"),
            prefixes=(
                ("vision_tower.vision_model.", "model.vision_tower."),
                ("model.vision_tower.vision_model.", "model.vision_tower."),
                ("vision_tower.", "model.vision_tower."),
                ("image_newline", "model.image_newline"),
                *_TOWER,
            ),
            writers=("multi_modal_projector.linear_2", "image_newline"),
            seq_len=986,
            images="tile",
            newline=1,
            mrope=False,
        ),
        Family(
            "internvl",
            layers="language_model.model.layers.",
            vision=("vision_tower.", "multi_modal_projector."),
            prefixes=(("vision_tower.", "model.vision_tower."), *_TOWER),
            writers=("multi_modal_projector.linear_2",),
            images="tile",
            around=("<img>", "</img>"),
            mrope=False,
        ),
    )
}


def family_of(config: dict) -> Family:
    """The family of a source config. Raises CheckpointError listing what is supported."""
    model_type = str(config.get("model_type", "missing"))
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"model_type {model_type} in config.json is not supported; supported: {known}")
    for part in (config, text_config(config), config.get("vision_config") or {}):
        _check_sizes(part)
    return FAMILIES[model_type]


def text_config(config: dict) -> dict:
    """The language model's own settings, nested (transformers 5) or flat (published Qwen2-VL configs)."""
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise CheckpointError("text_config in config.json is not an object; copy the file again")
    return text


def is_tied(config: dict) -> bool:
    """Whether the output matrix is the embedding."""
    return bool(config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False)))


def untied(config: dict) -> dict:
    """The same config of a model whose output matrix is its own: what a tied model becomes once its head is quantized."""
    config = config | {"tie_word_embeddings": False}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = text | {"tie_word_embeddings": False}
    return config


def layer_count(config: dict) -> int:
    """Decoder layers of a source config. Raises CheckpointError for a number that no model has."""
    layers = text_config(config).get("num_hidden_layers")
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers in config.json is {layers!r}; a number from 1 to {MAX_LAYERS} is expected"
        )
    return layers


def _check_sizes(settings: object) -> None:
    """Raises CheckpointError for a size that no model has: loops and tables are as long as these numbers say."""
    if not isinstance(settings, dict):
        raise CheckpointError("vision_config in config.json is not an object; copy the file again")
    for key in _SIZES & settings.keys():
        most = MAX_LAYERS if key in ("depth", "num_hidden_layers") else MAX_SIZE
        for value in settings[key] if isinstance(settings[key], list) else [settings[key]]:
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise CheckpointError(f"{key} in config.json is {value!r}; a number from 1 to {most} is expected")
