"""An importance matrix file that stock llama-quantize reads: for each weight the energy of its inputs, a number a column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlmq_export.quantizer.artifact import write_atomic

# llama.cpp rounds the counts to integers when it loads them, and token weights are small numbers: both are scaled up.
_SCALE = 1e4


def write_imatrix(
    path: Path,
    energies: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    *,
    dataset: str,
    chunks: int,
    tokens: int,
) -> None:
    """energies: GGUF name → Σ w·x² a column, float32 [in]; weights: the same names → Σ w; `tokens` of a chunk."""
    import gguf

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, "")
        writer.kv_data[0].clear()  # no architecture: this is no model
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", tokens)
        for name, energy in energies.items():
            writer.add_tensor(f"{name}.in_sum2", np.asarray(energy * _SCALE, np.float32)[None])
            writer.add_tensor(f"{name}.counts", np.array([[weights[name] * _SCALE]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomic(path, write)
