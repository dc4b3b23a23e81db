"""GPTQ's packed words against the format's definition, and against words computed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.formats.gptq.packing import pack, pack_codes, pack_zeros
from vlmq_export.formats.gptq.read import unpack


def slow_pack(column: list[int], bits: int) -> list[int]:
    """GPTQ's packing by its definition, in Python integers.

    The values are concatenated into one large number, the first in the lowest bits. It is cut into
    words of 32 bits, which are stored as signed integers.
    """
    stream = sum(value << (i * bits) for i, value in enumerate(column))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(column) * bits // 32)]
    return [w - 2**32 if w >= 2**31 else w for w in words]


# bits → the words of the 32 values 0, 1, 2, … modulo 2^bits, computed by hand from the layout.
GOLDEN = {
    2: [0xE4E4E4E4, 0xE4E4E4E4],
    3: [0x88FAC688, 0xC688FAC6, 0xFAC688FA],
    4: [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98],
    8: [0x03020100, 0x07060504, 0x0B0A0908, 0x0F0E0D0C,
        0x13121110, 0x17161514, 0x1B1A1918, 0x1F1E1D1C],
}  # fmt: skip


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits):
    values = (torch.arange(32) % 2**bits).to(torch.uint8)[:, None]
    words = np.array(GOLDEN[bits], np.uint32).astype(np.int32)[:, None]
    assert np.array_equal(pack(values, bits).numpy(), words)
    assert np.array_equal(unpack(words, bits), values.numpy())


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [(2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)],
)
def test_symmetric_zero_words(bits, v1, v2):
    zeros = torch.full((32, 1), 2 ** (bits - 1), dtype=torch.uint8)
    assert set(pack_zeros(zeros, bits, "v1").numpy().astype(np.uint32).ravel().tolist()) == {v1}
    assert set(pack_zeros(zeros, bits, "v2").numpy().astype(np.uint32).ravel().tolist()) == {v2}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 5))
def test_pack_agrees_with_the_definition(data, bits, blocks, width):
    row = st.lists(st.integers(0, 2**bits - 1), min_size=width, max_size=width)
    values = data.draw(st.lists(row, min_size=32 * blocks, max_size=32 * blocks))
    words = pack(torch.tensor(values, dtype=torch.uint8), bits)
    columns = list(zip(*values, strict=True))
    assert words.T.tolist() == [slow_pack(list(c), bits) for c in columns]
    assert unpack(words.numpy(), bits).tolist() == values


def test_unpack_in_chunks(monkeypatch):
    # A chunk then holds one row of the linear.
    monkeypatch.setattr("vlmq_export.formats.in_transformers.read._CHUNK", 100)
    codes = torch.randint(0, 8, (17, 64), dtype=torch.uint8)
    assert np.array_equal(unpack(pack_codes(codes, 3).numpy(), 3).T, codes.numpy())


def test_a_value_too_large_is_not_packed():
    with pytest.raises(ValueError, match="in 3 bits"):
        pack(torch.full((32, 1), 8, dtype=torch.uint8), 3)
