"""Writes an artifact as a compressed-tensors folder, by the library that vLLM reads it with."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.compressed_tensors.layout import entries, graded, quantization_config
from vlmq_export.formats.compressed_tensors.plan import notes, plan
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.in_transformers.files import check_uniform, write_folder
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.storage.whole_files import write_json


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write the whole VLM into an empty folder. Returns notes for log and card.

    Raises FormatError before anything is written if the artifact cannot be such a folder, and at
    the linear whose values cannot be packed.
    """
    model = artifact_plan(artifact)
    if refusals := plan(model, options).refusals:
        raise FormatError(refusals[0])
    check_uniform(artifact.manifest.modules, artifact.config)
    table = entries(graded(model), model.floats)
    write_folder(artifact, folder, table, pack_linear, options.shard_bytes)
    quantization = quantization_config(model)
    config = artifact.source_config | {"quantization_config": quantization}
    write_json(folder / "config.json", config)
    return notes(model, options)


def pack_linear(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    """What the weight of one linear becomes in the file, by the name of the part.

    Raises FormatError for groups of permuted columns.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    solution, bits = linear.solution, linear.bits
    if not solution.natural_order:
        raise FormatError(
            f"{linear.name}: its groups have permuted columns, which compressed-tensors cannot"
            " hold; quantize again with --act-order gar"
        )

    def pack(values: torch.Tensor, axis: int) -> torch.Tensor:
        """uint8 [N, …] → int32. The library takes signed values, and adds 2^(bits−1) itself."""
        signed = (values.short() - 2 ** (bits - 1)).to(torch.int8)
        return pack_to_int32(signed, bits, packed_dim=axis)  # type: ignore[arg-type]

    parts = {
        "weight_packed": pack(solution.codes, 1),
        "weight_scale": solution.scales.half().contiguous(),
        "weight_shape": torch.tensor(solution.codes.shape),
    }
    if not linear.symmetric:
        parts["weight_zero_point"] = pack(solution.zero_points, 0)
    return parts
