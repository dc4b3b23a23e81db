"""The emulated rounding of activations, against scalar loops that follow ggml-quants.c."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.formats.gguf.proof import emulate

f32 = np.float32


def slow_q8_0(row):
    """quantize_row_q8_0_ref, value by value: the rounded row, and the sums that Q8_1 stores."""
    values, sums = [], []
    for start in range(0, len(row), 32):
        block = [f32(v) for v in row[start : start + 32]]
        amax = max(abs(v) for v in block)
        d = f32(amax / f32(127))
        inverse = f32(f32(127) / amax) if amax else f32(0)
        codes = [round(float(f32(v * inverse))) for v in block]  # halves to even, as AVX2 rounds
        # ggml's scale and sum would be infinite as well where float16 overflows.
        with np.errstate(over="ignore"):
            values += [q * float(np.float16(d)) for q in codes]
            sums.append(float(np.float16(f32(d * f32(sum(codes))))))
    return values, sums


def slow_q8_k(row):
    """quantize_row_q8_K_ref, value by value: the rounded row."""
    values = []
    for start in range(0, len(row), 256):
        block = [f32(v) for v in row[start : start + 256]]
        top = f32(0)
        for v in block:
            if abs(v) > abs(top):
                top = v
        inverse = f32(f32(-127) / top) if top else f32(0)
        scale = f32(f32(1) / inverse) if top else f32(0)
        values += [min(127, round(float(f32(v * inverse)))) * float(scale) for v in block]
    return values


def rows(seed, n, k, spread=1.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, k)) * np.exp(spread * rng.standard_normal((n, k)))).astype(f32)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    blocks=st.integers(1, 4),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_rounding_is_the_scalar_loops(seed, blocks, spread):
    """Codes of 0 times an infinite scale are NaN on both sides."""
    x = rows(seed, 2, 32 * blocks, spread)
    for r, got in zip(x, emulate.rounded(x, "Q8_0")):
        np.testing.assert_array_equal(got, slow_q8_0(r)[0])
    x = rows(seed, 2, 256 * blocks, spread)
    for r, got in zip(x, emulate.rounded(x, "Q8_K")):
        np.testing.assert_array_equal(got, slow_q8_k(r))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["Q8_0", "Q8_1", "Q8_K", "F16", "BF16", "F32"]),
)
def test_rounding_moves_a_value_by_half_a_step_at_most(seed, kind):
    x = rows(seed, 3, 512)
    # How many values share a scale, and the step of the grid relative to the largest of them.
    grids = {"F16": (1, 2**-10), "BF16": (1, 2**-7), "F32": (1, 0), "Q8_K": (256, 1 / 127)}
    size, step = grids.get(kind, (32, 1 / 127))
    top = np.abs(x.reshape(3, -1, size)).max(-1, keepdims=True)
    error = np.abs(emulate.rounded(x, kind) - x).reshape(3, -1, size)
    float16_scale = 2**-11 if kind.startswith("Q") else 0
    assert (error <= (0.5 * step + float16_scale) * top + 1e-7).all()


def test_zeros_stay_zeros():
    x = np.zeros((2, 256), f32)
    for kind in set(emulate.ACTIVATIONS.values()):
        assert not emulate.rounded(x, kind).any()


def test_halves_round_to_even_and_the_largest_magnitude_keeps_its_sign():
    x = np.zeros((1, 256), f32)
    x[0, :4] = [-127.0, 0.5, 1.5, 2.5]
    assert emulate.rounded(x, "Q8_0")[0, :4].tolist() == [-127, 0, 2, 2]
    assert emulate.rounded(x, "Q8_K")[0, :4].tolist() == [-127, 0, 2, 2]
    x[0, 4] = 127.0  # the first of equal magnitudes decides
    assert emulate.q8_k(x)[1][0, 0] == 1.0


def test_bfloat16_rounds_to_nearest_even():
    x = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8]], f32)
    assert emulate.bf16(x)[0].tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


def test_offset_types_add_m_times_the_stored_sum():
    """A product with Q4_1 is Σ over blocks of d_w·d_x·Σ q_w·q_x + m_w·fp16(d_x·Σ q_x)."""
    rng = np.random.default_rng(3)
    x = rows(5, 2, 128)
    codes = rng.integers(0, 16, (3, 128))
    d = (rng.random((3, 4)) + 0.5).astype(np.float16)
    m = (-rng.random((3, 4)) * 8).astype(np.float16)
    scale, offset = d.astype(f32)[:, :, None], m.astype(f32)[:, :, None]  # [out, blocks, 1]
    weight = (scale * codes.reshape(3, 4, 32) + offset).reshape(3, 128)
    want = np.zeros((2, 3))
    for s in range(2):
        values, sums = slow_q8_0(x[s])
        for n in range(3):
            for b in range(4):
                block = slice(32 * b, 32 * b + 32)
                inner = math.fsum(int(q) * v for q, v in zip(codes[n, block], values[block]))
                want[s, n] += float(d[n, b]) * inner + float(m[n, b]) * sums[b]
    got, size = emulate.product(x, weight, "Q8_1", m.astype(f32)), np.abs(want).max()
    # `weight` was rounded to float32, `want` was not
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * size)
    # a product without the stored sums would be seen: it is fifty times farther away
    plain = emulate.rounded(x, "Q8_1") @ weight.astype(np.float64).T
    assert np.abs(plain - want).max() > 1e-4 * size


@pytest.mark.parametrize("kind", sorted(set(emulate.ACTIVATIONS.values()) - {"Q8_1"}))
def test_product_is_linear_in_the_weight_and_row_error_finds_the_row(kind):
    x, w = rows(1, 4, 512), rows(2, 8, 512)
    y = emulate.product(x, w, kind)
    np.testing.assert_allclose(emulate.product(x, 2 * w, kind), 2 * y)
    bad = w.copy()
    bad[5, 32:64] *= f32(1 + 2**-10)  # the scale of one block is off by one ulp of float16
    e = emulate.row_error(emulate.product(x, bad, kind), y, x, w)
    assert e.argmax() == 5
    assert e[5] > 3e-6
    assert np.delete(e, 5).max() < 1e-12
