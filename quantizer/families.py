"""Where each VLM family keeps its decoder layers, projections and vision tokens. Nothing else knows a family by name."""

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


@dataclass(frozen=True)
class Family:
    """One entry a family. `prefixes` maps the hub's tensor names to the module tree of transformers 5."""

    model_type: str
    layers: str  # hub prefix of the decoder layers
    prefixes: tuple[tuple[str, str], ...]  # (hub, module), first match wins
    groups: tuple[tuple[str, ...], ...] = DECODER_GROUPS
    seq_len: int = 512  # the paper's truncation for this family

    def linear_names(self, layers: int) -> list[str]:
        """Hub names of the modules to quantize, in layer order, then in the order of `groups`."""
        return [f"{self.layers}{i}.{p}" for i in range(layers) for group in self.groups for p in group]

    def module_name(self, hub: str) -> str:
        """Name in the module tree of a hub tensor or module name."""
        for old, new in self.prefixes:
            if hub.startswith(old):
                return new + hub.removeprefix(old)
        return hub


_QWEN = (("visual.", "model.visual."), ("model.", "model.language_model."))

FAMILIES = {
    f.model_type: f
    for f in (
        Family("qwen2_vl", layers="model.layers.", prefixes=_QWEN),
        Family("qwen2_5_vl", layers="model.layers.", prefixes=_QWEN),
    )
}


def family_of(config: dict) -> Family:
    """The family of a source config. Raises CheckpointError listing what is supported."""
    model_type = str(config.get("model_type", "missing"))
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"model_type {model_type} in config.json is not supported; supported: {known}")
    return FAMILIES[model_type]


def text_config(config: dict) -> dict:
    """The language model's own settings, nested (transformers 5) or flat (published Qwen2-VL configs)."""
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise CheckpointError("text_config in config.json is not an object; copy the file again")
    return text


def layer_count(config: dict) -> int:
    """Decoder layers of a source config. Raises CheckpointError for a number that no model has."""
    layers = text_config(config).get("num_hidden_layers")
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise CheckpointError(f"num_hidden_layers in config.json is {layers!r}; a number from 1 to {MAX_LAYERS} is expected")
    return layers
