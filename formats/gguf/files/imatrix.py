"""Writes an importance matrix file that llama-quantize reads: the energies of the inputs.

For each weight there is one number per input column. llama-imatrix makes such a file from text, and
no tool of llama.cpp lets images through. Ours is the diagonal of the matrix that the solver works
with, divided by the sum of the weights of the tokens:

    diag(A) / Σ g²        A = Σ g² x xᵀ over text and image tokens

The tokens have the weights g² that the recipe's method gives them. With `vlmq` they are the
importance of the token for the attention projections; with `gptq` and `gptaq` all tokens weigh
alike. The inputs x are those that the quantized layers before have left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.storage.whole_files import write_atomic

IMATRIX = "imatrix.gguf"


def energies(artifact: Artifact, layout: Layout) -> dict[str, np.ndarray]:
    """GGUF name → mean g²x² of each input column, float32 [in], of every calibrated linear.

    Raises FormatError for an artifact that was made without calibration, or by a version that did
    not keep the energies.
    """
    found: dict[str, np.ndarray] = {}
    for name, record in artifact.records.items():
        if record.energy:
            linear = artifact.linear(name)
            assert linear.energy is not None, "the record says that there is an energy"
            found[f"{linear.name}.weight"] = linear.energy.numpy()
    if not found:
        raise FormatError(
            f"{artifact.path}: no energies of inputs for --emit-imatrix; quantize the float model"
            " again"
        )
    places = layout.text.items()
    return {n: place.of_columns(found[place.hub]) for n, place in places if place.hub in found}


def write_imatrix(
    path: Path,
    means: Mapping[str, np.ndarray],  # GGUF name → mean energy of each column, float32 [in]
    calibration: Mapping,  # file, rows and tokens, as in a manifest
) -> None:
    """Write the file. llama-quantize needs a sum and a count for each weight, and divides them.

    It rounds counts to integers, so the count is the number of all tokens.
    """
    import gguf

    rows, tokens = int(calibration["rows"]), int(calibration["tokens"])

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, "")
        # The writer begins with general.architecture, and an importance matrix has none.
        writer.kv_data[0].clear()
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [calibration["file"]])
        writer.add_uint32("imatrix.chunk_count", rows)
        writer.add_uint32("imatrix.chunk_size", -(-tokens // rows))
        for name, mean in means.items():
            total = np.asarray(mean.astype(np.float64) * tokens, np.float32)
            writer.add_tensor(f"{name}.in_sum2", total[None])
            writer.add_tensor(f"{name}.counts", np.array([[tokens]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomic(path, write)
