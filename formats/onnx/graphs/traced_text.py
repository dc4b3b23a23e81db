"""The decoder with its KV cache, and the embedding, as modules that torch.onnx can trace.

RMSNormalization, RotaryEmbedding and Attention are written as the standard operators of opset 23,
as in mobius' graphs. So what a runtime fuses, or what another pass replaces, looks the same
whichever library made the graph. The linears are the model's own modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.onnx.ops import symbolic, symbolic_multi_out

from vlmq_export.errors import FormatError

OPSET = 23


@dataclass(frozen=True)
class Example:
    """What a module is traced with."""

    arguments: tuple  # of `forward`: tensors, and lists of tensors
    # Name of each input tensor in the graph → {axis: name of its dynamic length}. The tensors of
    # a list are counted one by one.
    inputs: dict[str, dict[int, str]]
    outputs: tuple[str, ...]  # names in the graph


class Text(nn.Module):
    """The decoder: embeddings, mask, positions and cache → logits and the new cache.

    Some vision towers feed layers of the decoder too (deepstack). There inputs_embeds is
    (1 + deepstack)·hidden wide: first the embedding, then what is added after layer 0, 1 and so
    on. The latter is zero at every token that is not an image's.

    Raises FormatError for a model with sliding windows.
    """

    def __init__(self, model: Any, deepstack: int = 0):
        super().__init__()
        language: Any = model.get_decoder()
        self.config: Any = language.config
        self.deepstack = deepstack  # how many layers the vision tower feeds
        self.layers: Any = language.layers
        self.norm: Any = language.norm
        self.lm_head: Any = model.lm_head
        layer_types = getattr(self.config, "layer_types", None) or []
        sliding = {"sliding_attention", "chunked_attention"} & set(layer_types)
        if sliding:
            raise FormatError(
                f"ONNX graphs have no {min(sliding)}, which config.json asks for;"
                " leave out --format onnx"
            )
        self.rotary = Rotary(language)

    def example(self) -> Example:
        """Two rows of five tokens after a cache of three."""
        config, dtype, layers = self.config, self.lm_head.weight.dtype, len(self.layers)
        batch, length, past = 2, 5, 3
        heads, size = config.num_key_value_heads, self.layers[0].self_attn.head_dim
        caches = [torch.zeros(batch, heads, past, size, dtype=dtype) for _ in range(2 * layers)]
        axes = [3] if self.rotary.sections else []  # temporal, height, width
        arguments = (
            torch.zeros(batch, length, (1 + self.deepstack) * config.hidden_size, dtype=dtype),
            torch.ones(batch, past + length, dtype=torch.long),
            torch.zeros(*axes, batch, length, dtype=torch.long),
            caches,
        )
        names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
        inputs = {
            "inputs_embeds": {0: "batch", 1: "sequence"},
            "attention_mask": {0: "batch", 1: "total_sequence"},
            "position_ids": {len(axes): "batch", len(axes) + 1: "sequence"},
            **{f"past_key_values.{n}": {0: "batch", 2: "past_sequence"} for n in names},
        }
        return Example(arguments, inputs, ("logits", *(f"present.{n}" for n in names)))

    def forward(
        self,
        inputs_embeds: torch.Tensor,  # [B, S, (1 + deepstack)·hidden]
        attention_mask: torch.Tensor,  # int64 [B, past + S]
        position_ids: torch.Tensor,  # int64 [B, S] or [3, B, S]
        past: list[torch.Tensor],  # key and value of each layer, [B, kv heads, past, head size]
    ) -> tuple[torch.Tensor, ...]:
        """Logits [B, S, vocabulary], then the keys and values of each layer with the new tokens."""
        batch, length, total = *inputs_embeds.shape[:2], attention_mask.shape[1]
        size = self.config.hidden_size
        hidden, *added = (
            inputs_embeds[..., i * size : (i + 1) * size] for i in range(1 + self.deepstack)
        )
        mask = attention_mask.bool()[:, None, None, :].expand(batch, 1, length, total)
        cosines, sines = self.rotary(position_ids)
        rotary = cosines.to(inputs_embeds.dtype), sines.to(inputs_embeds.dtype)
        present = []
        for i, layer in enumerate(self.layers):
            x, cache = rms_norm(layer.input_layernorm, hidden), past[2 * i : 2 * i + 2]
            attended, key, value = self._attend(layer.self_attn, x, rotary, mask, cache)
            present += [key, value]
            hidden = hidden + attended
            hidden = hidden + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden))
            if i < self.deepstack:
                hidden = hidden + added[i]
        return self.lm_head(rms_norm(self.norm, hidden)), *present

    def _attend(
        self,
        attention: Any,
        x: torch.Tensor,  # [B, S, hidden]
        rotary: tuple[torch.Tensor, torch.Tensor],  # cosines and sines
        mask: torch.Tensor,  # bool [B, 1, S, past + S]
        past: list[torch.Tensor],  # key and value
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output [B, S, hidden], then key and value [B, kv heads, past + S, head size]."""
        size, (past_key, past_value) = attention.head_dim, past
        batch, length = x.shape[:2]
        query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        heads, kv_heads = query.shape[-1] // size, key.shape[-1] // size
        if hasattr(attention, "q_norm"):  # over each head
            query = rms_norm(attention.q_norm, query.unflatten(-1, (heads, size))).flatten(2)
            key = rms_norm(attention.k_norm, key.unflatten(-1, (kv_heads, size))).flatten(2)
        query, key = rotate(query, rotary, heads), rotate(key, rotary, kv_heads)
        cache = (batch, kv_heads, past_key.shape[2] + length, size)
        attended, key, value = symbolic_multi_out(
            "::Attention",
            (query, key, value, mask, past_key, past_value),
            {
                "is_causal": 1,
                "q_num_heads": heads,
                "kv_num_heads": kv_heads,
                "scale": float(attention.scaling),
            },
            dtypes=(x.dtype,) * 3,
            shapes=((batch, length, heads * size), cache, cache),
            version=OPSET,
        )
        return attention.o_proj(attended), key, value


class Rotary(nn.Module):
    """Cosines and sines of the positions, from the model's own frequencies.

    The frequencies of type `dynamic` depend on the length of the prompt only beyond
    max_position_embeddings. The graph has the unscaled ones at every position.

    Raises FormatError for frequencies that depend on the length of every prompt.
    """

    inv_freq: torch.Tensor  # [head size / 2]

    def __init__(self, language: Any):
        super().__init__()
        # A new one is made, because that of the model has no values.
        rope: Any = type(language.rotary_emb)(config=language.config)
        if rope.rope_type not in ("default", "linear", "dynamic", "yarn", "llama3"):
            raise FormatError(
                f"ONNX graphs have no rotary positions of type {rope.rope_type};"
                " leave out --format onnx"
            )
        self.register_buffer("inv_freq", rope.inv_freq.clone())
        self.scaling: float = rope.attention_scaling
        # How many frequencies turn with the temporal, height and width position. None: positions
        # have one axis.
        self.sections: list[int] | None = getattr(rope, "mrope_section", None)

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B, S] or [3, B, S] → float32 [B, S, head size / 2] each."""
        angles = position_ids[..., None].float() * self.inv_freq  # [(3,) B, S, head size / 2]
        if self.sections:
            # The axes are interleaved: frequency 3j + 1 turns with the height and 3j + 2 with the
            # width, as far as their sections reach. All others turn with the temporal position.
            _, height, width = self.sections
            index = torch.arange(self.inv_freq.numel())
            by_height = (index % 3 == 1) & (index < 3 * height)
            by_width = (index % 3 == 2) & (index < 3 * width)
            angles = torch.where(by_height, angles[1], torch.where(by_width, angles[2], angles[0]))
        return angles.cos() * self.scaling, angles.sin() * self.scaling


class Embedding(nn.Module):
    """Token ids and image features → inputs_embeds, the features in order at the image tokens.

    Without any feature an image token has its own embedding, as in the models themselves: it is one
    that was generated. If there are features, but fewer than image tokens, the run fails.
    """

    def __init__(self, model: Any, image_token: int, deepstack: int = 0):
        super().__init__()
        self.embed_tokens: Any = model.get_input_embeddings()
        self.image_token = image_token
        self.deepstack = deepstack  # how many decoder layers the vision tower feeds

    def example(self) -> Example:
        """Two rows of six image tokens, and seven features."""
        table = self.embed_tokens.weight
        width = (1 + self.deepstack) * table.shape[1]
        arguments = (
            torch.full((2, 6), self.image_token),
            torch.zeros(7, width, dtype=table.dtype),
        )
        inputs = {"input_ids": {0: "batch", 1: "sequence"}, "image_features": {0: "image_tokens"}}
        return Example(arguments, inputs, ("inputs_embeds",))

    def forward(self, input_ids: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
        """int64 [B, S] and [image tokens, width] → [B, S, width]."""
        words = self.embed_tokens(input_ids)
        words = torch.cat([words, *[torch.zeros_like(words)] * self.deepstack], dim=-1)
        any_feature = torch.ones_like(image_features[:, 0], dtype=torch.long).sum() > 0
        image = (input_ids == self.image_token) & any_feature
        # Features are numbered from 1, so that a missing one is out of bounds.
        number = image.flatten().long().cumsum(0).view_as(input_ids)
        rows = torch.cat([torch.zeros_like(words[0, :1]), image_features])
        return torch.where(image[..., None], rows[number], words)


def rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """`norm` of x [..., width], as one operator of the graph."""
    return symbolic(
        "::RMSNormalization",
        (x, norm.weight),
        {"axis": -1, "epsilon": float(norm.variance_epsilon)},
        dtype=x.dtype,
        shape=x.shape,
        version=OPSET,
    )


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], heads: int) -> torch.Tensor:
    """The two halves of each head rotated against each other, as one operator of the graph.

    x is [B, S, heads·head size]. `rotary` is the cosines and sines.
    """
    return symbolic(
        "::RotaryEmbedding",
        (x, *rotary),
        {"num_heads": heads, "interleaved": 0},
        dtype=x.dtype,
        shape=x.shape,
        version=OPSET,
    )
