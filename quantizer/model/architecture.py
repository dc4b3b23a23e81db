"""What config.json says of a model, as transformers resolves it, and the sizes everything needs.

A config.json may leave out whatever its author left at the default of the class, and keys have
moved between versions. Which value a key has is asked of transformers, and never decided here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.model.families import (
    FAMILIES,
    OTHER_LAYOUTS,
    Family,
    SubBlock,
    groups_of,
)
from vlmq_export.quantizer.storage.untrusted import third_party

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
        "moe_intermediate_size",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
        "max_position_embeddings",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "num_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_local_experts",
        "out_hidden_size",
        "patch_size",
        "scale_factor",
        "spatial_merge_size",
        "spatial_patch_size",
        "temporal_patch_size",
        "vocab_size",
        "window_size",
    ]
)


@dataclass(frozen=True)
class Architecture:
    """A model without its weights."""

    config: dict  # every setting that the class has, with its default where config.json has none
    family: Family
    tied: bool  # whether the output matrix is the embedding

    @classmethod
    def of(cls, config: dict) -> Architecture:
        """The architecture that the content of a config.json states.

        Raises CheckpointError for a family that is not supported, for experts, for absurd sizes,
        and for settings that transformers refuses.
        """
        resolved = pretrained_config(config).to_dict()
        tied = bool(resolved.get("tie_word_embeddings"))
        found = cls(resolved, family_of(config), tied)
        for part in (found.text, found.vision):
            _check_sizes(part)
        decoder = str(found.text.get("model_type"))
        if found.family.sparse:
            found._refuse_experts()
        # Mistral Small 4 has the second key.
        elif "_moe" in decoder or found.text.get("n_routed_experts"):
            raise CheckpointError(
                f"the language model in config.json is {decoder}, a mixture of experts, which is"
                " not supported; choose a dense model of the family"
            )
        return found

    def _refuse_experts(self) -> None:
        """Raises CheckpointError for experts that cannot be read, and for layers without any."""
        text = self.text
        if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
            raise CheckpointError(
                f"mlp_only_layers or decoder_sparse_step in config.json give some layers of this"
                f" {self.model_type} no experts, which is not supported; as published all have them"
            )
        hidden, inner = text["hidden_size"], text["moe_intermediate_size"]
        if hidden in (inner, 2 * inner):  # where transformers goes by the shape, and takes either
            raise CheckpointError(
                f"hidden_size {hidden} and moe_intermediate_size {inner} in config.json leave open"
                " which way fused experts lie in the file; no published model has such sizes"
            )
        if self.taken > self.experts:
            raise CheckpointError(
                f"num_experts_per_tok in config.json is {self.taken}, of {self.experts} experts;"
                " copy the file again"
            )

    @property
    def model_type(self) -> str:
        """The name of the family in config.json."""
        return self.family.model_type

    @property
    def experts(self) -> int:
        """How many experts a decoder layer has; 0 in a dense decoder."""
        return int(self.text["num_local_experts"]) if self.family.sparse else 0

    @property
    def taken(self) -> int:
        """How many experts each token takes; 0 in a dense decoder."""
        return int(self.text["num_experts_per_tok"]) if self.family.sparse else 0

    @cached_property
    def text(self) -> dict:
        """The settings of the language model, whether config.json has them nested or flat."""
        return self.config["text_config"]

    @cached_property
    def vision(self) -> dict:
        """The settings of the vision tower."""
        return self.config["vision_config"]

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the language model.

        Not every class has a setting for it. The others divide the hidden size.
        """
        text = self.text
        return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])

    @cached_property
    def layers(self) -> int:
        """Number of decoder layers. Raises CheckpointError for a number that no model has."""
        layers = self.text.get("num_hidden_layers")
        if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
            raise CheckpointError(
                f"num_hidden_layers in config.json is {layers!r};"
                f" a number from 1 to {MAX_LAYERS} is expected"
            )
        return layers

    def blocks(self, layer: int) -> tuple[SubBlock, ...]:
        """The chain of sub-blocks that a decoder layer is."""
        experts, special = self.experts, self.family.special
        chain = self.family.blocks_of(self.text["layer_types"][layer] if special else "")
        return tuple(
            replace(block, experts=experts) if block.kind == "experts" else block for block in chain
        )

    def groups(self, layer: int) -> list[tuple[str, ...]]:
        """Linears of a layer that share one input, in the order in which they are quantized."""
        return groups_of(self.blocks(layer))

    @property
    def linears(self) -> list[str]:
        """Hub names of the decoder's linears, in the order in which they are solved."""
        return [
            f"{self.family.layers}{i}.{name}"
            for i in range(self.layers)
            for group in self.groups(i)
            for name in group
        ]

    def untied(self) -> Architecture:
        """The same with an output matrix of its own.

        A tied model becomes this once it is rotated, or once that matrix is quantized.
        """
        config = self.config | {"tie_word_embeddings": False}
        if "tie_word_embeddings" in self.text:
            config["text_config"] = self.text | {"tie_word_embeddings": False}
        return replace(self, config=config, tied=False)


def family_of(config: dict) -> Family:
    """The family that a config.json names. Raises CheckpointError for one not supported."""
    model_type = str(config.get("model_type", "missing"))
    if model_type not in FAMILIES:
        if other := OTHER_LAYOUTS.get(model_type):
            raise CheckpointError(f"model_type {model_type} in config.json is {other}")
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(
            f"model_type {model_type} in config.json is not supported; supported: {known}"
        )
    return FAMILIES[model_type]


def pretrained_config(config: dict) -> PretrainedConfig:
    """transformers' own configuration of the content of a config.json.

    Raises CheckpointError as `Architecture.of` does.
    """
    model_type = family_of(config).model_type
    # Before transformers sees them: it makes lists that are as long as these numbers say.
    for part in (config, config.get("text_config"), config.get("vision_config")):
        _check_sizes({} if part is None else part)
    with third_party("transformers cannot read config.json; copy it from the original model"):
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(config))


def untied_config(config: dict) -> dict:
    """The content of a config.json with an output matrix that is not the embedding."""
    config = config | {"tie_word_embeddings": False}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = text | {"tie_word_embeddings": False}
    return config


def _check_sizes(settings: object) -> None:
    """Raises CheckpointError for a size that no model has.

    Loops and tables are as long as these numbers say.
    """
    if not isinstance(settings, dict):
        raise CheckpointError(
            "text_config or vision_config in config.json is not an object; copy the file again"
        )
    for key in _SIZES & settings.keys():
        most = MAX_LAYERS if key in ("depth", "num_hidden_layers") else MAX_SIZE
        for value in settings[key] if isinstance(settings[key], list) else [settings[key]]:
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise CheckpointError(
                    f"{key} in config.json is {value!r}; a number from 1 to {most} is expected"
                )
