"""The decoder with its KV cache and the embedding, traced by torch.onnx in the standard operators of mobius' graphs.

RMSNormalization, RotaryEmbedding and Attention are written as such: what a runtime fuses, or another pass replaces, has
the same shape whichever library built the graph. The linears are the model's own modules.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.onnx.ops import symbolic, symbolic_multi_out

from vlmq_export.errors import FormatError

OPSET = 23


class Text(nn.Module):
    """inputs_embeds [B, S, width], attention_mask int64 [B, past + S], positions int64 [B, S] or [3, B, S], cache → logits.

    Where the vision tower feeds later layers too (deepstack), `width` is (1 + layers fed)·hidden: the embedding first,
    then what is added after layer 0, 1, ...: zeros at every token that is no image's.
    """

    def __init__(self, model: nn.Module, deepstack: int = 0):
        super().__init__()
        language = model.model.language_model
        self.config, self.deepstack = language.config, deepstack
        self.layers, self.norm, self.lm_head = language.layers, language.norm, model.lm_head
        sliding = {"sliding_attention", "chunked_attention"} & set(getattr(self.config, "layer_types", None) or [])
        if sliding:
            raise FormatError(
                f"ONNX graphs have no {min(sliding)}, which config.json asks for; leave out --format onnx"
            )
        self.rotary = Rotary(language)

    def forward(self, inputs_embeds, attention_mask, position_ids, past):
        batch, length, total = *inputs_embeds.shape[:2], attention_mask.shape[1]
        size = self.config.hidden_size
        hidden, *added = (inputs_embeds[..., i * size : (i + 1) * size] for i in range(1 + self.deepstack))
        mask = attention_mask.bool()[:, None, None, :].expand(batch, 1, length, total)
        rotary = [r.to(inputs_embeds.dtype) for r in self.rotary(position_ids)]
        present = []
        for i, layer in enumerate(self.layers):
            attended, key, value = self._attend(
                layer.self_attn, rms_norm(layer.input_layernorm, hidden), rotary, mask, past[2 * i : 2 * i + 2]
            )
            present += [key, value]
            hidden = hidden + attended
            hidden = hidden + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden))
            if i < self.deepstack:
                hidden = hidden + added[i]
        return self.lm_head(rms_norm(self.norm, hidden)), *present

    def _attend(self, attention, x, rotary, mask, past):
        """Output [B, S, hidden] and the cache [B, kv heads, past + S, head size] after it."""
        size, (past_key, past_value) = attention.head_dim, past
        batch, length = x.shape[:2]
        query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        heads, kv_heads = query.shape[-1] // size, key.shape[-1] // size
        if hasattr(attention, "q_norm"):  # over the head size
            query = rms_norm(attention.q_norm, query.unflatten(-1, (heads, size))).flatten(2)
            key = rms_norm(attention.k_norm, key.unflatten(-1, (kv_heads, size))).flatten(2)
        query, key = rotate(query, rotary, heads), rotate(key, rotary, kv_heads)
        cache = (batch, kv_heads, past_key.shape[2] + length, size)
        attended, key, value = symbolic_multi_out(
            "::Attention",
            (query, key, value, mask, past_key, past_value),
            {"is_causal": 1, "q_num_heads": heads, "kv_num_heads": kv_heads, "scale": float(attention.scaling)},
            dtypes=(x.dtype,) * 3, shapes=((batch, length, heads * size), cache, cache), version=OPSET,
        )  # fmt: skip
        return attention.o_proj(attended), key, value


class Rotary(nn.Module):
    """Positions → (cosines, sines) float32 [B, S, head size / 2] from the model's own frequencies.

    Raises FormatError for frequencies that depend on the length of the prompt; `dynamic` ones do so only beyond
    max_position_embeddings.
    """

    def __init__(self, language: nn.Module):
        super().__init__()
        rope = type(language.rotary_emb)(config=language.config)  # the model itself has no values
        if rope.rope_type not in ("default", "linear", "dynamic", "yarn", "llama3"):
            raise FormatError(f"ONNX graphs have no rotary positions of type {rope.rope_type}; leave out --format onnx")
        self.register_buffer("inv_freq", rope.inv_freq.clone())
        self.scaling = rope.attention_scaling
        self.sections = getattr(rope, "mrope_section", None)

    def forward(self, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq  # [(3,) B, S, head size / 2]
        if self.sections:  # interleaved: frequency 3j + 1 by height, 3j + 2 by width, as far as their sections reach
            _, height, width = self.sections
            index = torch.arange(self.inv_freq.numel())
            by_height, by_width = (index % 3 == 1) & (index < 3 * height), (index % 3 == 2) & (index < 3 * width)
            angles = torch.where(by_height, angles[1], torch.where(by_width, angles[2], angles[0]))
        return angles.cos() * self.scaling, angles.sin() * self.scaling


class Embedding(nn.Module):
    """input_ids [B, S], image_features [image tokens, width] → inputs_embeds [B, S, width], features in order.

    Without any feature an image token is the word that it is; with fewer than image tokens the run fails.
    """

    def __init__(self, model: nn.Module, image_token: int, deepstack: int = 0):
        super().__init__()
        self.embed_tokens, self.image_token, self.deepstack = model.get_input_embeddings(), image_token, deepstack

    def forward(self, input_ids, image_features):
        words = self.embed_tokens(input_ids)
        words = torch.cat([words, *[torch.zeros_like(words)] * self.deepstack], dim=-1)
        any_feature = torch.ones_like(image_features[:, 0], dtype=torch.long).sum() > 0
        image = (input_ids == self.image_token) & any_feature  # one that was generated is a word, as in the models
        nth = image.flatten().long().cumsum(0).view_as(input_ids)  # from 1: a feature too few is out of bounds
        rows = torch.cat([torch.zeros_like(words[0, :1]), image_features])
        return torch.where(image[..., None], rows[nth], words)


def rms_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    attributes = {"axis": -1, "epsilon": float(norm.variance_epsilon)}
    return symbolic("::RMSNormalization", (x, norm.weight), attributes, dtype=x.dtype, shape=x.shape, version=OPSET)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], heads: int) -> torch.Tensor:
    """Halves of each head rotated against each other; x [B, S, heads · head size]."""
    attributes = {"num_heads": heads, "interleaved": 0}
    return symbolic("::RotaryEmbedding", (x, *rotary), attributes, dtype=x.dtype, shape=x.shape, version=OPSET)
