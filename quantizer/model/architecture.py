"""What config.json says of a model: its family, and the sizes that everything needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.model.families import FAMILIES, Family

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


@dataclass(frozen=True)
class Architecture:
    """A model without its weights."""

    config: dict  # the content of config.json
    family: Family

    @classmethod
    def of(cls, config: dict) -> Architecture:
        """The architecture that a config.json states.

        Raises CheckpointError for a family that is not supported, and for absurd sizes.
        """
        model_type = str(config.get("model_type", "missing"))
        if model_type not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise CheckpointError(
                f"model_type {model_type} in config.json is not supported; supported: {known}"
            )
        found = cls(config, FAMILIES[model_type])
        for part in (config, found.text, config.get("vision_config") or {}):
            _check_sizes(part)
        return found

    @property
    def model_type(self) -> str:
        """The name of the family in config.json."""
        return self.family.model_type

    @cached_property
    def text(self) -> dict:
        """The settings of the language model.

        They are nested, as transformers 5 saves them, or flat, as Qwen2-VL was published. Raises
        CheckpointError where they are no object.
        """
        text = self.config.get("text_config") or self.config
        if not isinstance(text, dict):
            raise CheckpointError(
                "text_config in config.json is not an object; copy the file again"
            )
        return text

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

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        inner = self.text.get("tie_word_embeddings", False)
        return bool(self.config.get("tie_word_embeddings", inner))

    @property
    def linears(self) -> list[str]:
        """Hub names of the decoder's linears, in the order in which they are solved."""
        return self.family.linear_names(self.layers)

    def untied(self) -> Architecture:
        """The same with an output matrix of its own.

        A tied model becomes this once it is rotated, or once that matrix is quantized.
        """
        config = self.config | {"tie_word_embeddings": False}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = text | {"tie_word_embeddings": False}
        return Architecture(config, self.family)


def _check_sizes(settings: object) -> None:
    """Raises CheckpointError for a size that no model has.

    Loops and tables are as long as these numbers say.
    """
    if not isinstance(settings, dict):
        raise CheckpointError("vision_config in config.json is not an object; copy the file again")
    for key in _SIZES & settings.keys():
        most = MAX_LAYERS if key in ("depth", "num_hidden_layers") else MAX_SIZE
        for value in settings[key] if isinstance(settings[key], list) else [settings[key]]:
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise CheckpointError(
                    f"{key} in config.json is {value!r}; a number from 1 to {most} is expected"
                )
