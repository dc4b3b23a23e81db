"""Activations of 4 bits and keys and values of 8, as a fake quantization of a loaded model (W4A4KV8).

    each decoder linear's input     a scale a token, symmetric, range .9 of the largest      (QuaRot's setting)
    keys and values                 a scale and zero-point a token and head, range .95, when attention reads them

Nothing is calibrated. Keys are rounded after their positions are in, so every step rounds a cached key alike. With the
rotation's online part, down_proj's input, queries and keys are multiplied by a Hadamard matrix first.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmq_export.quantizer.families import DECODER_GROUPS
from vlmq_export.quantizer.rotation import RotatedCheckpoint, rotate_inner

INPUT_BITS, INPUT_RANGE = 4, 0.9
CACHE_BITS, CACHE_RANGE = 8, 0.95
ATTENTION = "rounded_keys_and_values"


def round_symmetric(x: torch.Tensor, bits: int = INPUT_BITS, share: float = INPUT_RANGE) -> torch.Tensor:
    """x rounded to 2^bits − 1 levels a row of the last axis, up to `share` of the row's largest magnitude."""
    top = 2 ** (bits - 1) - 1
    scale = (share * x.abs().amax(-1, keepdim=True) / top).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).round().clamp(-top - 1, top) * scale


def round_affine(x: torch.Tensor, bits: int = CACHE_BITS, share: float = CACHE_RANGE) -> torch.Tensor:
    """x rounded to 2^bits levels a row of the last axis between `share` of its least and of its largest value."""
    top = 2**bits - 1
    low, high = share * x.amin(-1, keepdim=True).clamp(max=0), share * x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).clamp_min(torch.finfo(x.dtype).tiny)
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, top) - zero) * scale


def attach(model: nn.Module, online: RotatedCheckpoint | None = None) -> nn.Module:
    """Let the decoder of a transformers model round its activations; `online` where its weights expect the online part."""
    decoder = model.model.language_model
    if online is not None:
        rotate_inner(decoder.layers, online.inner_rotation())
    for layer in decoder.layers:
        for name in (n for group in DECODER_GROUPS for n in group):
            layer.get_submodule(name).register_forward_pre_hook(lambda _m, args: (round_symmetric(args[0]), *args[1:]))
        layer.self_attn.head_rotation = online and online.head_rotation()
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    decoder.config._attn_implementation = ATTENTION
    return model


def _attention(module, query, key, value, attention_mask, **kwargs):
    if (rotation := module.head_rotation) is not None:
        query, key = rotation.apply(query), rotation.apply(key)
    return sdpa_attention_forward(module, query, round_affine(key), round_affine(value), attention_mask, **kwargs)
