"""What llama.cpp's CPU kernels do to activations, in numpy float32, and the product that must come out.

A weight of a block type makes llama.cpp round the *input* of that linear to 8 bits per block first, so no comparison of
outputs with a float product can see a wrong scale. Doing the same rounding here, on the inputs captured in the real
run, leaves only the summation order of float32: a worst row of 5e-8 where one scale off by one unit in the last place
gives 3e-6 and more (formats: ggml-quants.c `quantize_row_q8_*_ref`, ggml-cpu `vec_dot_type` at llama.cpp b11549).
"""

from __future__ import annotations

import numpy as np

# weight type → what its inputs are rounded to
ACTIVATIONS = {
    "F32": "F32", "F16": "F16", "BF16": "BF16",
    "Q4_0": "Q8_0", "Q5_0": "Q8_0", "Q8_0": "Q8_0", "Q2_0": "Q8_0", "MXFP4": "Q8_0",
    "Q4_1": "Q8_1", "Q5_1": "Q8_1",
    "Q2_K": "Q8_K", "Q3_K": "Q8_K", "Q4_K": "Q8_K", "Q5_K": "Q8_K", "Q6_K": "Q8_K", "TQ2_0": "Q8_K",
}  # fmt: skip

_ONE = np.float32(1)
_127 = np.float32(127)
_ROWS = 4096


def q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, K] → codes float32 [n, K/32, 32] and unrounded scales float32 [n, K/32]: amax/127 per 32."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(len(x), -1, 32)
    top = np.abs(blocks).max(-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(top > 0, _127 / top, np.float32(0))  # 1/(amax/127) would round differently
    return np.rint(blocks * inverse[..., None]), top / _127


def q8_k(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, K] → codes [n, K/256, 256] and scales [n, K/256]; the largest magnitude maps to −127."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(len(x), -1, 256)
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]  # signed, first of equals
    with np.errstate(divide="ignore"):
        inverse = np.where(top != 0, -_127 / top, np.float32(0))
        scale = np.where(top != 0, _ONE / inverse, np.float32(0))
    return np.minimum(np.rint(blocks * inverse[..., None]), _127), scale


def bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even bfloat16, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16) << 16).astype(np.uint32).view(np.float32)


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """float64 [n, K]: the inputs as the kernel multiplies them."""
    if kind == "F32":
        return x.astype(np.float64)
    if kind == "F16":
        return x.astype(np.float16).astype(np.float64)
    if kind == "BF16":
        return bf16(x).astype(np.float64)
    codes, scale = q8_k(x) if kind == "Q8_K" else q8_0(x)
    if kind != "Q8_K":
        scale = scale.astype(np.float16)
    return (codes.astype(np.float64) * scale.astype(np.float64)[..., None]).reshape(x.shape)


def product(x: np.ndarray, weight: np.ndarray, kind: str, offset: np.ndarray | None = None) -> np.ndarray:
    """float64 [n, out]: `weight` [out, K] (decoded, float32) times the rounded inputs x [n, K].

    `offset` [out, K/32] is m of w = d·q + m and needed for Q8_1 alone: there the kernel adds m · fp16(d_x · Σ q_x),
    with d_x not rounded, in place of m · Σ x̂.
    """
    inputs = rounded(x, kind)
    # By rows of the weight: an output matrix in float64 would take gigabytes at once.
    parts = [inputs @ weight[i : i + _ROWS].astype(np.float64).T for i in range(0, len(weight), _ROWS)]
    y = np.concatenate(parts, axis=1)
    if kind == "Q8_1":
        codes, scale = q8_0(x)
        total = codes.sum(-1, dtype=np.float64)
        stored = (scale * total.astype(np.float32)).astype(np.float16).astype(np.float64)
        y += (stored - scale.astype(np.float16).astype(np.float64) * total) @ offset.astype(np.float64).T
    return y


def row_error(y: np.ndarray, expected: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """e_row [out] = ‖y_r − ŷ_r‖ / (‖w_r‖ · ‖X‖): y and ŷ [n, out], x [n, K], weight [out, K].

    Not relative to ‖ŷ_r‖: rows whose terms cancel reach 4e-6 when nothing is wrong.
    """
    rows = np.sqrt(np.einsum("ij,ij->i", weight, weight, dtype=np.float64))
    size = rows * np.linalg.norm(x.astype(np.float64))
    return np.linalg.norm(y.astype(np.float64) - expected, axis=0) / np.maximum(size, np.finfo(np.float64).tiny)
