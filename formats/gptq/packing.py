"""Codes and zero-points → the int32 words of a GPTQ file."""

from __future__ import annotations

import torch

WORD = 32  # bits; 32 values of b bits fill exactly b words


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first axis: uint8 [L, M] → int32 [L·bits/32, M], least significant bit first.

    L is a multiple of 32. Values are in [0, 2^bits − 1]; a larger one would spill into its neighbour, so ValueError.
    """
    length, width = values.shape
    if length % WORD or int(values.max()) >> bits:
        raise ValueError(f"cannot pack {length} values up to {int(values.max())} in {bits} bits")
    blocks = values.view(length // WORD, WORD, width)
    words = torch.zeros(length // WORD, bits, width, dtype=torch.int64)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        value = blocks[:, i].long()
        words[:, word] |= value << shift
        if shift + bits > WORD:  # the value's high bits open the next word
            words[:, word + 1] |= value >> (WORD - shift)
    words &= 0xFFFFFFFF
    words -= (words >> 31) << 32  # the same 32 bits as a signed integer
    return words.view(-1, width).int()


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K] → qweight int32 [K·bits/32, N]."""
    return pack(codes.T.contiguous(), bits).contiguous()


def pack_zeros(zero_points: torch.Tensor, bits: int, version: str) -> torch.Tensor:
    """uint8 [N, G] → qzeros int32 [G, N·bits/32]. v1 stores the zero-point minus one, which must not be −1."""
    stored = zero_points - 1 if version == "v1" else zero_points
    return pack(stored.contiguous(), bits).T.contiguous()
