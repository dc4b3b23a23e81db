"""An importance matrix file that stock llama-quantize reads: for each weight the energy of its inputs, a number a column.

llama-imatrix makes it from text; no tool of llama.cpp lets images through. Ours is the diagonal of the matrix that the
solver itself works with, A = Σ g² x xᵀ over text and image tokens, divided by Σ g²: weighted as the recipe's method
weighs tokens (`vlmq` the attention projections by importance, `gptq` and `gptaq` all tokens alike), and taken from the
inputs as the quantized layers before have left them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.names import text_to_hub
from vlmq_export.quantizer.artifact import Artifact, write_atomic

IMATRIX = "imatrix.gguf"


def energies(artifact: Artifact) -> dict[str, np.ndarray]:
    """GGUF name → mean g²x² of each input column, float32 [in], of every calibrated linear.

    Raises FormatError for an artifact that was made without calibration, or before energies were kept.
    """
    linears = (artifact.linear(name) for name, record in artifact.records.items() if record.energy)
    found = {f"{linear.name}.weight": linear.energy.numpy() for linear in linears}
    if not found:
        raise FormatError(f"{artifact.path}: no energies of inputs for --emit-imatrix; quantize the float model again")
    return {name: found[hub] for name, hub in text_to_hub(artifact.source_config).items() if hub in found}


def write_imatrix(path: Path, means: Mapping[str, np.ndarray], calibration: Mapping) -> None:
    """means: GGUF name → mean energy a column, float32 [in]. `calibration`: file, rows and tokens, as in a manifest.

    llama-quantize divides sums by counts, which it rounds to integers; both are those of all tokens.
    """
    import gguf

    rows, tokens = int(calibration["rows"]), int(calibration["tokens"])

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, "")
        writer.kv_data[0].clear()  # no architecture: this is no model
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [calibration["file"]])
        writer.add_uint32("imatrix.chunk_count", rows)
        writer.add_uint32("imatrix.chunk_size", -(-tokens // rows))
        for name, mean in means.items():
            writer.add_tensor(f"{name}.in_sum2", np.asarray(mean.astype(np.float64) * tokens, np.float32)[None])
            writer.add_tensor(f"{name}.counts", np.array([[tokens]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomic(path, write)
