"""Bytes of block types packed per second: our packing against gguf-py's and libggml's.

    python -m tools.bench.packing

The figure is the median ratio of CPU times over pairs of alternating runs on one thread. Each side
does what its writer does for a tensor. Ours packs the solver's codes, from the artifact's tensors
to the file's bytes. gguf-py's `quantize` and libggml's `ggml_quantize_chunk` start from float32
weights and choose codes on the way, without solving anything.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import gguf
import numpy as np
import torch
import typer

from tools.bench.gguf import quantized_by_ggml
from vlmq_export.formats.gguf.types.exact import pack_linear
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.linears import BlockLinear
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks

WARM_UP = 2  # pairs that are thrown away


def by_gguf_py(weights: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of gguf-py's `quantize`: uint8 [out, row bytes]."""
    return gguf.quantize(weights, gguf.GGMLQuantizationType[kind])


def seconds(work: Callable[[], np.ndarray]) -> tuple[float, int]:
    """The CPU seconds that `work` took, and the bytes that it made."""
    start = time.process_time()
    made = work()
    return time.process_time() - start, made.nbytes


def main(
    rows: int = 2048,
    columns: int = 2048,
    pairs: Annotated[int, typer.Option(help="Of alternating runs")] = 15,
) -> None:
    """Print a table with a row for each block type."""
    torch.set_num_threads(1)
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    plain = weights.numpy().copy()
    print("| type | against | ours, MB/s | theirs, MB/s | ratio |\n|---|---|---|---|---|")
    for kind, name, theirs in (
        ("Q4_0", "gguf-py", by_gguf_py),
        ("Q4_1", "gguf-py", by_gguf_py),
        ("TQ2_0", "gguf-py", by_gguf_py),
        ("Q4_K", "libggml", quantized_by_ggml),
    ):
        part = nearest_in_blocks(weights, GRIDS[kind])
        linear = BlockLinear("x", part, None)
        ours_packs = partial(pack_linear, linear, kind)
        theirs_packs = partial(theirs, plain, kind)
        runs = [(seconds(ours_packs), seconds(theirs_packs)) for _ in range(pairs + WARM_UP)]
        runs = runs[WARM_UP:]
        ratio = statistics.median(b / a for (a, _), (b, _) in runs)
        ours, other = (
            statistics.median(size / spent / 1e6 for spent, size in (r[i] for r in runs))
            for i in (0, 1)
        )
        print(f"| {kind} | {name} | {ours:.0f} | {other:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
