"""How llama.cpp's CPU kernels round activations, the products that come of it, and what it costs.

A weight of a block type makes llama.cpp round the input of its linear to 8 bits a block. No
comparison of outputs with a float product can see a wrong scale for that. The same rounding is done
here, in numpy, on the inputs that were captured in the real run. What then remains is the order of
summation in float32: 5e-8 in the worst row, where one scale that is off by one unit in the last
place gives 3e-6 and more. (Source: `quantize_row_q8_*_ref` in ggml-quants.c, and `vec_dot_type` of
ggml-cpu, both at llama.cpp b11549.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from vlmq_export.formats.gguf.runtime.prompts import as_rows
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.proof.checks import relative_error
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.model.experts import separated
from vlmq_export.quantizer.samples.sample import Sample

# Type of a weight → what its inputs are rounded to.
ACTIVATIONS = {
    "F32": "F32", "F16": "F16", "BF16": "BF16",
    "Q4_0": "Q8_0", "Q5_0": "Q8_0", "Q8_0": "Q8_0", "Q2_0": "Q8_0", "MXFP4": "Q8_0",
    "Q4_1": "Q8_1", "Q5_1": "Q8_1",
    "Q2_K": "Q8_K", "Q3_K": "Q8_K", "Q4_K": "Q8_K", "Q5_K": "Q8_K", "Q6_K": "Q8_K", "TQ2_0": "Q8_K",
    "IQ4_NL": "Q8_0", "IQ4_XS": "Q8_K", "IQ3_S": "Q8_K", "IQ3_XXS": "Q8_K",
    "IQ2_S": "Q8_K", "IQ2_XS": "Q8_K", "IQ2_XXS": "Q8_K",
}  # fmt: skip

_ONE = np.float32(1)
_127 = np.float32(127)
_ROWS = 4096


def q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of Q8_0 and Q8_1, float32 [n, K/32, 32], and their scales, float32 [n, K/32].

    x: float32 [n, K]. A scale is amax / 127 of its 32 values, and is not rounded here.
    """
    blocks = np.ascontiguousarray(x, np.float32).reshape(len(x), -1, 32)
    top = np.abs(blocks).max(-1)
    with np.errstate(divide="ignore"):
        # 1 / (amax / 127) would round differently.
        inverse = np.where(top > 0, _127 / top, np.float32(0))
    return np.rint(blocks * inverse[..., None]), top / _127


def q8_k(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of Q8_K, float32 [n, K/256, 256], and their scales, float32 [n, K/256].

    x: float32 [n, K]. The largest magnitude of a block has the code −127.
    """
    blocks = np.ascontiguousarray(x, np.float32).reshape(len(x), -1, 256)
    # The largest magnitude with its sign, the first of equals.
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
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


def product(
    x: np.ndarray, weight: np.ndarray, kind: str, offset: np.ndarray | None = None
) -> np.ndarray:
    """The product of a decoded weight with rounded inputs, float64 [n, out].

    x: float32 [n, K].
    weight: float32 [out, K].
    offset: m of w = d·q + m, [out, K/32]. Q8_1 alone needs it: there the kernel adds
        m · fp16(d_x · Σ q_x), with d_x not rounded, in place of m · Σ x̂.
    """
    inputs = rounded(x, kind)
    # Some rows at a time: a whole output matrix in float64 would take gigabytes.
    slabs = (weight[i : i + _ROWS] for i in range(0, len(weight), _ROWS))
    parts = [inputs @ slab.astype(np.float64).T for slab in slabs]
    y = np.concatenate(parts, axis=1)
    if kind == "Q8_1":
        codes, scale = q8_0(x)
        total = codes.sum(-1, dtype=np.float64)
        assert offset is not None, "Q8_1 is the rounding of types that have an offset"
        stored = (scale * total.astype(np.float32)).astype(np.float16).astype(np.float64)
        more = stored - scale.astype(np.float16).astype(np.float64) * total
        y += more @ offset.astype(np.float64).T
    return y


def row_error(y: np.ndarray, expected: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """‖y_r − ŷ_r‖ / (‖w_r‖ · ‖X‖) of every row r of a weight, [out].

    It is not relative to ‖ŷ_r‖, because rows whose terms cancel reach 4e-6 when nothing is wrong.

    y, expected: [n, out].
    x: [n, K].
    weight: [out, K].
    """
    rows = np.sqrt(np.einsum("ij,ij->i", weight, weight, dtype=np.float64))
    size = rows * np.linalg.norm(x.astype(np.float64))
    difference = np.linalg.norm(y.astype(np.float64) - expected, axis=0)
    return difference / np.maximum(size, np.finfo(np.float64).tiny)


@torch.no_grad()
def cost(
    reference: Reference,
    layout: Layout,
    types: Mapping[str, str],  # GGUF name → type
    samples: Iterable[Sample],
) -> dict[str, float]:
    """What rounded activations cost one model: prompt → relative error of the logits of its text.

    It is the model's own matter how far they move. They move by 2e-2 to 3e-2 where it was trained,
    and by five times as much for random weights at two bits, where small differences of large terms
    carry the answer.
    """
    samples = list(samples)
    wanted = {s.id: reference.logits(s) for s in samples}  # before anything is rounded
    found = {}
    with separated(reference.model):  # so that the linears of experts have inputs to round
        hooks = [_round_inputs(module, kind) for module, kind in _linears(reference, layout, types)]
        try:
            for sample in samples:
                out = reference.model(**sample.model_inputs(), use_cache=False).logits[0]
                text = ~as_rows(reference, layout, sample)
                got = out[:, : reference.vocabulary].numpy()
                found[sample.id] = relative_error(got[text], wanted[sample.id][text])
        finally:
            for hook in hooks:
                hook.remove()
    return found


def _linears(
    reference: Reference, layout: Layout, types: Mapping[str, str]
) -> Iterator[tuple[torch.nn.Module, str]]:
    """Every linear of the language model, with the rounding of its inputs.

    A tied output matrix has the type of the embedding.
    """
    for name, place in layout.text.items():
        for parameter in place.modules:
            module = reference.model.get_submodule(parameter.rpartition(".")[0])
            if isinstance(module, torch.nn.Linear) and name.endswith(".weight"):
                yield module, ACTIVATIONS[types[name]]
    if "output.weight" not in layout.text:
        yield reference.model.get_output_embeddings(), ACTIVATIONS[types["token_embd.weight"]]


def _round_inputs(module: torch.nn.Module, kind: str) -> RemovableHandle:
    def action(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]):
        x = args[0]
        if not len(x):  # no token comes to this expert
            return args
        flat = rounded(x.reshape(-1, x.shape[-1]).numpy(), kind).astype(np.float32)
        return (torch.from_numpy(flat).view_as(x),)

    return module.register_forward_pre_hook(action)
