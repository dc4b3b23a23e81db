"""GPTQ safetensors: the whole VLM in the folder layout that transformers, GPTQModel and vLLM load.

A quantized `X` [out=N, in=K] with G groups is five tensors in place of `X.weight`; `weight = scales * (codes − zeros)`:

    X.qweight  int32   [K·bits/32, N]   codes, packed along K
    X.qzeros   int32   [G, N·bits/32]   zero-points (v1: minus one), packed along N
    X.scales   float16 [G, N]
    X.g_idx    int32   [K]              group of input column k, columns in their original order
    X.bias     float16 [N]              only where the linear has one

Packing is one stream of bits, least significant first: value i takes bits [i·b, (i+1)·b) of its row or column, also
where that crosses a 32-bit word (3 bits: 32 values in 3 words).
"""

from vlmq_export.formats.gptq.check import check, missing
from vlmq_export.formats.gptq.layout import plan
from vlmq_export.formats.gptq.read import inspect
from vlmq_export.formats.gptq.write import write

__all__ = ["WRITES_WITH", "check", "inspect", "missing", "plan", "write"]

WRITES_WITH: tuple[str, ...] = ()  # packages without which nothing can be written
