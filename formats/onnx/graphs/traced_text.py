"""The decoder with its cache, and the embedding, as modules that torch.onnx can trace.

Norms, rotations and attention are written as operators of the graph (traced_operators.py). The
linears are the model's own modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.onnx.ops import symbolic_multi_out

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.graphs import traced_delta_net
from vlmq_export.formats.onnx.graphs.experts import routed
from vlmq_export.formats.onnx.graphs.traced_delta_net import delta_net
from vlmq_export.formats.onnx.graphs.traced_operators import OPSET, rms_norm, rotate
from vlmq_export.formats.onnx.graphs.traced_positions import Rotary, seen_keys
from vlmq_export.quantizer.model.families import Family, SubBlock


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

    The cache of a layer with an attention are its keys and values, and of one with a linear
    attention the two states of traced_delta_net.py.

    Some vision towers feed layers of the decoder too (deepstack). There inputs_embeds is
    (1 + deepstack)·hidden wide: first the embedding, then what is added after layer 0, 1 and so
    on. The latter is zero at every token that is not an image's.

    In a family whose image tokens see both ways, inputs_embeds has one more column, which is 1 at
    image tokens and 0 at others.

    Raises FormatError for a model with other layers than these families were published with.
    """

    def __init__(self, model: Any, family: Family, deepstack: int = 0):
        super().__init__()
        language: Any = model.get_decoder()
        self.config: Any = language.config
        self.family = family
        self.deepstack = deepstack  # how many layers the vision tower feeds
        self.layers: Any = language.layers
        self.norm: Any = language.norm
        self.lm_head: Any = model.lm_head
        self.rotary = Rotary(language)
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * len(self.layers)
        known = {"full_attention", *dict(family.special)}
        known |= {"sliding_attention"} if family.marks else set()
        if other := set(kinds) - known:
            raise FormatError(
                f"ONNX graphs have no {min(other)}, which config.json asks for;"
                " leave out --format onnx"
            )
        if getattr(self.config, "sliding_window", None) and not hasattr(self.config, "layer_types"):
            raise FormatError(
                "ONNX graphs have no sliding_window, which config.json asks for;"
                " leave out --format onnx"
            )
        if getattr(self.config, "use_bidirectional_attention", False):
            raise FormatError(
                "ONNX graphs have no words that see both ways, which config.json asks for"
                " (use_bidirectional_attention); leave out --format onnx"
            )
        self.kinds: list[str] = kinds  # of each layer
        for net in self._delta_nets():
            traced_delta_net.require_silu(net)

    def functions(self) -> list[ir.Function]:
        """What takes the place of the graph's operators that are no standard ones."""
        return [f for net in self._delta_nets()[:1] for f in traced_delta_net.functions(net)]

    def _delta_nets(self) -> list[Any]:
        """The linear attention of each layer that has one."""
        return [
            getattr(layer, mixer.module)
            for layer, kind in zip(self.layers, self.kinds, strict=True)
            if (mixer := self.family.blocks_of(kind)[0]).kind == "recurrent"
        ]

    def example(self) -> Example:
        """Two rows of five tokens after a cache of three."""
        config, dtype = self.config, self.lm_head.weight.dtype
        batch, length, past = 2, 5, 3
        kept = self._kept(batch, past, dtype)
        axes = [3] if self.rotary.sections else []  # temporal, height, width
        width = (1 + self.deepstack) * config.hidden_size + bool(self.family.marks)
        arguments = (
            torch.zeros(batch, length, width, dtype=dtype),
            torch.ones(batch, past + length, dtype=torch.long),
            torch.zeros(*axes, batch, length, dtype=torch.long),
            [tensor for tensor, _ in kept.values()],
        )
        inputs = {
            "inputs_embeds": {0: "batch", 1: "sequence"},
            "attention_mask": {0: "batch", 1: "total_sequence"},
            "position_ids": {len(axes): "batch", len(axes) + 1: "sequence"},
            **{f"past_key_values.{name}": lengths for name, (_, lengths) in kept.items()},
        }
        return Example(arguments, inputs, ("logits", *(f"present.{name}" for name in kept)))

    def _kept(
        self, batch: int, past: int, dtype: torch.dtype
    ) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        """The cache of `past` tokens: number of the layer and name → zeros, and free lengths."""
        kept: dict[str, tuple[torch.Tensor, dict[int, str]]] = {}
        heads = self.config.num_key_value_heads
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            mixer = self.family.blocks_of(kind)[0]
            module: Any = getattr(layer, mixer.module)
            if mixer.kind == "recurrent":
                states = traced_delta_net.empty_states(module, batch)
                for name, state in zip(traced_delta_net.STATES, states, strict=True):
                    kept[f"{i}.{name}"] = state, {0: "batch"}
            else:
                for name in ("key", "value"):
                    cache = torch.zeros(batch, heads, past, module.head_dim, dtype=dtype)
                    kept[f"{i}.{name}"] = cache, {0: "batch", 2: "past_sequence"}
        return kept

    def forward(
        self,
        inputs_embeds: torch.Tensor,  # [B, S, (1 + deepstack)·hidden], or one column more
        attention_mask: torch.Tensor,  # int64 [B, past + S]
        position_ids: torch.Tensor,  # int64 [B, S] or [3, B, S]
        past: list[torch.Tensor],  # two of each layer: [B, kv heads, past, head size], or states
    ) -> tuple[torch.Tensor, ...]:
        """Logits [B, S, vocabulary], then the cache of each layer with the new tokens."""
        size = self.config.hidden_size
        hidden, *added = (
            inputs_embeds[..., i * size : (i + 1) * size] for i in range(1 + self.deepstack)
        )
        masks, grown = self._masks(inputs_embeds, attention_mask), self._grown(position_ids)
        turns = self.rotary(position_ids, inputs_embeds.dtype)
        present = []
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            mixer, mlp = self.family.blocks_of(kind)
            x, cache = self._norm(getattr(layer, mixer.norm), hidden), past[2 * i : 2 * i + 2]
            if mixer.kind == "recurrent":
                real = attention_mask[:, attention_mask.shape[1] - x.shape[1] :]
                x, *cache = delta_net(getattr(layer, mixer.module), x, real, cache)
            else:
                rotary = turns[kind if kind in turns else ""]
                x, *cache = self._attend(layer.self_attn, x, rotary, grown, masks[kind], cache)
            present += cache
            hidden = hidden + self._behind(layer, mixer, x)
            x = self._norm(getattr(layer, mlp.norm), hidden)
            x = self._mlp(layer, mlp, x, i)
            hidden = hidden + self._behind(layer, mlp, x)
            if i < self.deepstack:
                hidden = hidden + added[i]
        return self.lm_head(self._norm(self.norm, hidden)), *present

    def _masks(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Which keys are seen, by the kind of layer: bool [B, 1, S, past + S].

        In families without marks the attention itself leaves out the keys behind a query.
        """
        if self.family.marks:
            image = inputs_embeds[..., -1] > 0.5
            return seen_keys(attention_mask, image, self.config.sliding_window or 0)
        batch, length, total = *inputs_embeds.shape[:2], attention_mask.shape[1]
        real = attention_mask.bool()[:, None, None, :].expand(batch, 1, length, total)
        return {"full_attention": real}

    def _grown(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """By how much queries are larger, [B, S, 1], where they grow with the position."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if not (beta := rope.get("llama_4_scaling_beta")):
            return None
        times = torch.floor(position_ids / rope["original_max_position_embeddings"])
        return 1 + beta * torch.log(1 + times)[..., None]

    def _norm(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(norm, x, gain=self.family.gain)

    def _behind(self, layer: Any, block: SubBlock, x: torch.Tensor) -> torch.Tensor:
        """What a sub-block adds to the residual stream: x, or what its norm behind makes of it."""
        return self._norm(getattr(layer, block.post), x) if block.post else x

    def _mlp(self, layer: Any, block: SubBlock, x: torch.Tensor, number: int) -> torch.Tensor:
        """What the MLP of layer `number` makes of x [B, S, hidden], or each token's experts."""
        if block.kind == "experts":
            return routed(layer.mlp, block, x, f"{self.family.layers}{number}.")
        return layer.mlp(x)

    def _attend(
        self,
        attention: Any,
        x: torch.Tensor,  # [B, S, hidden]
        rotary: tuple[torch.Tensor, torch.Tensor],  # cosines and sines
        grown: torch.Tensor | None,  # what queries are multiplied by, [B, S, 1]
        mask: torch.Tensor,  # bool [B, 1, S, past + S]
        past: list[torch.Tensor],  # key and value
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output [B, S, hidden], then key and value [B, kv heads, past + S, head size]."""
        size, (past_key, past_value) = attention.head_dim, past
        batch, length = x.shape[:2]
        query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        heads, kv_heads = self.config.num_attention_heads, key.shape[-1] // size
        gate = None
        if query.shape[-1] == 2 * heads * size:  # behind each head's query, the gate of its output
            query, gate = query.unflatten(-1, (heads, 2 * size)).chunk(2, dim=-1)
            query, gate = query.flatten(2), gate.flatten(2)
        if grown is not None:  # before the rotation, which keeps lengths, as well as behind it
            query = query * grown.to(query.dtype)
        if hasattr(attention, "q_norm"):  # over each head
            query = self._norm(attention.q_norm, query.unflatten(-1, (heads, size))).flatten(2)
            key = self._norm(attention.k_norm, key.unflatten(-1, (kv_heads, size))).flatten(2)
        query, key = rotate(query, rotary, heads), rotate(key, rotary, kv_heads)
        cache = (batch, kv_heads, past_key.shape[2] + length, size)
        attended, key, value = symbolic_multi_out(
            "::Attention",
            (query, key, value, mask, past_key, past_value),
            {
                "is_causal": 0 if self.family.marks else 1,
                "q_num_heads": heads,
                "kv_num_heads": kv_heads,
                "scale": float(attention.scaling),
            },
            dtypes=(x.dtype,) * 3,
            shapes=((batch, length, heads * size), cache, cache),
            version=OPSET,
        )
        attended = attended if gate is None else attended * gate.sigmoid()
        return attention.o_proj(attended), key, value


class Embedding(nn.Module):
    """Token ids and image features → inputs_embeds, the features in order at the image tokens.

    Without any feature an image token has its own embedding, as in the models themselves: it is one
    that was generated. If there are features, but fewer than image tokens, the run fails.
    """

    def __init__(
        self,
        model: Any,
        image_token: int,
        deepstack: int = 0,  # how many decoder layers the vision tower feeds
        *,
        marked: bool = False,  # whether a last column is 1 at the tokens that have a feature
    ):
        super().__init__()
        self.embed_tokens: Any = model.get_input_embeddings()
        self.image_token = image_token
        self.deepstack, self.marked = deepstack, marked
        # What the embeddings of words are multiplied by: √hidden in Gemma.
        scaled = hasattr(self.embed_tokens, "embed_scale")
        self.scale: float | None = self.embed_tokens.scalar_embed_scale if scaled else None

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
        """int64 [B, S] and [image tokens, width] → [B, S, width], or one column more if marked."""
        words = self._words(input_ids)
        words = torch.cat([words, *[torch.zeros_like(words)] * self.deepstack], dim=-1)
        any_feature = torch.ones_like(image_features[:, 0], dtype=torch.long).sum() > 0
        image = (input_ids == self.image_token) & any_feature
        # Features are numbered from 1, so that a missing one is out of bounds.
        number = image.flatten().long().cumsum(0).view_as(input_ids)
        rows = torch.cat([torch.zeros_like(words[0, :1]), image_features])
        embeds = torch.where(image[..., None], rows[number], words)
        return torch.cat([embeds, image[..., None].to(embeds.dtype)], -1) if self.marked else embeds

    def _words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of tokens as words, [B, S, hidden]."""
        table = self.embed_tokens.weight
        if self.image_token >= len(table):  # a token without a word, which only images have
            input_ids = torch.where(input_ids == self.image_token, 0, input_ids)
        words = nn.functional.embedding(input_ids, table)
        return words if self.scale is None else words * self.scale
