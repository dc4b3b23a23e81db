"""Packs codes and zero-points into the int32 words of a GPTQ file.

The values are one stream of bits, least significant bit first: value i takes the bits
[i·bits, (i+1)·bits). 32 values of `bits` bits fill exactly `bits` words.
"""

from __future__ import annotations

import torch

WORD = 32  # bits


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first axis: uint8 [L, M] → int32 [L·bits/32, M].

    L is a multiple of 32, and the values are in [0, 2^bits − 1]. Raises ValueError otherwise,
    because a larger value would spill into its neighbour.
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
    """qweight, int32 [in·bits/32, out], of codes uint8 [out, in]."""
    return pack(codes.T.contiguous(), bits).contiguous()


def pack_zeros(zero_points: torch.Tensor, bits: int, version: str) -> torch.Tensor:
    """qzeros, int32 [groups, out·bits/32], of zero-points uint8 [out, groups].

    v1 stores a zero-point minus one. A zero-point of 0 has no place there and must not be given.
    """
    stored = zero_points - 1 if version == "v1" else zero_points
    return pack(stored.contiguous(), bits).T.contiguous()
