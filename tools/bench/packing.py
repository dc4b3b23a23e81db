"""Bytes of block types packed per second: ours as ratios to gguf-py and to libggml's quantizer.

    python -m tools.bench.packing

One thread, alternating runs, CPU time, the median of the pairs' ratios. Each side does what its writer does for a tensor:
ours packs the solver's integers, from the artifact's tensors to the file's bytes; gguf-py's `quantize` and
`ggml_quantize_chunk` start from float32 weights and choose codes on the way (neither of them solves).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import gguf
import numpy as np
import torch
import typer

from vlmq_export.formats.gguf.homes import pack_linear
from vlmq_export.formats.gguf.llama import library_path
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.kquants import GRIDS
from vlmq_export.quantizer.linears import BlockLinear
from vlmq_export.quantizer.solver import nearest_in_blocks


def ggml(weights: np.ndarray, kind: str) -> np.ndarray:
    library = ctypes.CDLL(str(library_path()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    raw = np.zeros((len(weights), TYPES[kind].row_bytes(weights.shape[1])), np.uint8)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (weights, raw)]
    counts = [ctypes.c_int64(n) for n in (0, *weights.shape)]
    assert library.ggml_quantize_chunk(ctypes.c_int(TYPES[kind].id), *pointers, *counts, None) == raw.nbytes
    return raw


def by_gguf_py(weights: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quantize(weights, gguf.GGMLQuantizationType[kind])


def seconds(work: Callable[[], np.ndarray]) -> tuple[float, int]:
    """(CPU seconds, bytes made)."""
    start = time.process_time()
    made = work()
    return time.process_time() - start, made.nbytes


def main(
    rows: int = 2048, columns: int = 2048, pairs: Annotated[int, typer.Option(help="Of alternating runs")] = 15
) -> None:
    torch.set_num_threads(1)
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    plain = weights.numpy().copy()
    print("| type | against | ours, MB/s | theirs, MB/s | ratio |\n|---|---|---|---|---|")
    for kind, name, theirs in (
        ("Q4_0", "gguf-py", by_gguf_py), ("Q4_1", "gguf-py", by_gguf_py), ("TQ2_0", "gguf-py", by_gguf_py), ("Q4_K", "libggml", ggml),
    ):  # fmt: skip
        part = nearest_in_blocks(weights, GRIDS[kind])
        linear = BlockLinear("x", part.codes, part.params, None, kind)
        runs = [
            (seconds(lambda q=linear, k=kind: pack_linear(q, k)), seconds(lambda k=kind, f=theirs: f(plain, k)))
            for _ in range(pairs + 2)
        ][2:]
        ratio = statistics.median(b / a for (a, _), (b, _) in runs)
        ours, other = (statistics.median(size / spent / 1e6 for spent, size in (r[i] for r in runs)) for i in (0, 1))
        print(f"| {kind} | {name} | {ours:.0f} | {other:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
