"""Fake quantization of a model's activations to 4 bits, and of keys and values to 8: W4A4KV8.

    each decoder linear's input   symmetric, a scale per token, clipped at .9 of the largest value
    keys and values               affine, a scale and zero-point per token and head, clipped at .95,
                                  rounded when attention reads them

The clipping is that of QuaRot (arXiv 2404.00456). Nothing is calibrated. A key is rounded after its
position has been rotated in, so that every step rounds a cached key alike. With the online part of
the rotation, down_proj's input, queries and keys are first multiplied by a Hadamard matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmq_export.quantizer.model.families import DECODER, groups_of
from vlmq_export.quantizer.model.rotation import RotatedCheckpoint, rotate_inner

INPUT_BITS, INPUT_RANGE = 4, 0.9
CACHE_BITS, CACHE_RANGE = 8, 0.95
ATTENTION = "rounded_keys_and_values"


def round_symmetric(
    x: torch.Tensor, bits: int = INPUT_BITS, share: float = INPUT_RANGE
) -> torch.Tensor:
    """x rounded symmetrically, with a scale for each row of the last axis.

    The largest code stands for `share` of the row's largest magnitude; what is beyond is clipped.
    """
    top = 2 ** (bits - 1) - 1
    scale = (share * x.abs().amax(-1, keepdim=True) / top).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).round().clamp(-top - 1, top) * scale


def round_affine(
    x: torch.Tensor, bits: int = CACHE_BITS, share: float = CACHE_RANGE
) -> torch.Tensor:
    """x rounded with a scale and a zero-point for each row of the last axis.

    The 2^bits codes reach from `share` of the row's least value to `share` of its largest, with 0
    always among them; what is beyond is clipped.
    """
    top = 2**bits - 1
    low = share * x.amin(-1, keepdim=True).clamp(max=0)
    high = share * x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).clamp_min(torch.finfo(x.dtype).tiny)
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, top) - zero) * scale


def attach(model: Any, online: RotatedCheckpoint | None = None) -> nn.Module:
    """Let the decoder of a transformers model round its activations. Returns the model.

    online: the checkpoint of the weights, where these expect the rotation's online part.
    """
    decoder = model.get_decoder()
    if online is not None:
        rotate_inner(decoder.layers, DECODER, online.inner_rotation())
    for layer in decoder.layers:
        for name in (n for group in groups_of(DECODER) for n in group):
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _m, args: (round_symmetric(args[0]), *args[1:])
            )
        layer.self_attn.head_rotation = online and online.head_rotation()
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    decoder.config._attn_implementation = ATTENTION
    return model


def _attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention on rounded keys and values."""
    if (rotation := module.head_rotation) is not None:
        query, key = rotation.apply(query), rotation.apply(key)
    return sdpa_attention_forward(
        module, query, round_affine(key), round_affine(value), attention_mask, **kwargs
    )
