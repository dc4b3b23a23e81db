"""Packs codes on the lattices of the I-quants: numbers of points, signs and scales.

Behind the float16 d, a block of 256 weights has, with n the number of a point, s a sign that is 1
where the weight is negative, and c the stored scale of a sub-block (d·(2c + 1) is its scale):

    IQ2_XXS   for each 32 columns: 4 B of n; a u32 with 4 × 7 bits of s, and c above them
    IQ2_XS    32 u16, each n | 7 bits of s << 9; 8 B of c
    IQ2_S     32 B with bits 0 to 7 of n; 32 B of s; 8 B with bits 8 and 9 of n; 8 B of c
    IQ3_XXS   64 B of n; for each 32 columns a u32 as in IQ2_XXS
    IQ3_S     64 B with bits 0 to 7 of n; 8 B with bit 8 of n; 32 B of s; 4 B of c

Bytes of c hold two sub-blocks, the first in the low nibble. Where 7 signs are stored for 8 columns,
the eighth is what makes the number of negative ones even.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.lattices import Lattice


def iq2_xxs(codes: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    """uint8 [n, 256] and [n, 8] → the fields behind d, each uint8 [n, bytes]. So are the others."""
    numbers, signs = _points("IQ2_XXS", codes)
    words = _words(signs, scales).reshape(-1, 8, 4)
    each = np.concatenate([numbers.astype(np.uint8).reshape(-1, 8, 4), words], axis=2)
    return [each.reshape(-1, 64)]


def iq2_xs(codes: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    numbers, signs = _points("IQ2_XS", codes)
    both = numbers.astype("<u2") | (signs & 127).astype("<u2") << 9
    return [both.astype("<u2").view(np.uint8), _nibbles(scales)]


def iq2_s(codes: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    numbers, signs = _points("IQ2_S", codes)
    high = (numbers >> 8).astype(np.uint8).reshape(-1, 8, 4) << np.array([0, 2, 4, 6], np.uint8)
    low = (numbers & 255).astype(np.uint8)
    return [low, signs, np.bitwise_or.reduce(high, axis=2), _nibbles(scales)]


def iq3_xxs(codes: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    numbers, signs = _points("IQ3_XXS", codes)
    return [numbers.astype(np.uint8), _words(signs, scales)]


def iq3_s(codes: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    numbers, signs = _points("IQ3_S", codes)
    high = np.packbits((numbers >> 8).astype(bool), axis=1, bitorder="little")
    return [(numbers & 255).astype(np.uint8), high, signs, _nibbles(scales)]


def _words(signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[n, 32] and [n, 8] → the u32 of each 32 columns, uint8 [n, 32]."""
    seven = (signs & 127).astype("<u4").reshape(-1, 8, 4) << np.array([0, 7, 14, 21], "<u4")
    words = np.bitwise_or.reduce(seven, axis=2) | scales.astype("<u4") << 28
    return np.ascontiguousarray(words, "<u4").view(np.uint8)


def _nibbles(scales: np.ndarray) -> np.ndarray:
    return scales[:, ::2] | scales[:, 1::2] << 4


def _points(name: str, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each point, int64 [n, points], and a byte of signs for 8 columns, [n, 32].

    Raises ValueError for codes that are no point, and for signs that the type cannot have.
    """
    lattice = GRIDS[name].lattice
    assert lattice is not None
    top = len(lattice.magnitudes)
    negative = codes < top
    places = np.where(negative, top - 1 - codes.astype(np.int64), codes.astype(np.int64) - top)
    signs = np.packbits(negative, axis=1, bitorder="little")
    numbers = _numbers(lattice)[_key(places, lattice)]
    if (numbers < 0).any():
        raise ValueError(f"{name} holds no such {lattice.columns} codes together")
    if lattice.even and (negative.reshape(len(codes), -1, 8).sum(2) % 2).any():
        raise ValueError(f"{name} holds an even number of negative codes among 8")
    return numbers, signs


@cache
def _numbers(lattice: Lattice) -> np.ndarray:
    """Key → the number of the point, or −1 where there is none."""
    numbers = np.full(len(lattice.magnitudes) ** lattice.columns, -1)
    grid = lattice.grid(torch.device("cpu")).numpy()
    numbers[_key(grid, lattice)[:, 0]] = np.arange(len(grid))
    return numbers


def _key(places: np.ndarray, lattice: Lattice) -> np.ndarray:
    """Places of magnitudes, [n, points · columns], as one integer for each point, [n, points]."""
    powers = len(lattice.magnitudes) ** np.arange(lattice.columns)
    return places.reshape(len(places), -1, lattice.columns) @ powers
