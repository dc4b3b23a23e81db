"""Writes an artifact as a GPTQ folder. One linear, or one float tensor, is in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.layout import entries, quantization_config, renamer
from vlmq_export.formats.gptq.packing import pack_codes, pack_zeros
from vlmq_export.formats.gptq.plan import notes, plan
from vlmq_export.formats.in_transformers.files import check_uniform, write_folder
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.storage.whole_files import write_json


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write the whole VLM into an empty folder. Returns notes for log and card.

    Raises FormatError before anything is written if the artifact cannot be a GPTQ folder, and at
    the linear whose values cannot be packed.
    """
    model, version = artifact_plan(artifact), options.gptq_version
    if refusals := plan(model, options).refusals:
        raise FormatError(refusals[0])
    check_uniform(artifact.manifest.modules, artifact.config)
    permuted: set[str] = set()

    def pack(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
        check_zeros(linear, version)
        if not linear.solution.natural_order:
            permuted.add(linear.name)
        return pack_linear(linear, version)

    rename = renamer(model.architecture, options)
    table = entries(model.linears, model.floats, model.config, rename)
    write_folder(artifact, folder, table, pack, options.shard_bytes)
    quantization = quantization_config(
        artifact.config, version, bool(permuted), artifact.architecture
    )
    write_json(folder / "quantize_config.json", quantization)
    config = artifact.source_config | {"quantization_config": quantization}
    write_json(folder / "config.json", config)
    return notes(model, options)


def pack_linear(linear: QuantizedLinear, version: str) -> dict[str, torch.Tensor]:
    """What the weight of one linear becomes in the file, by the name of the part."""
    solution = linear.solution
    return {
        "qweight": pack_codes(solution.codes, linear.bits),
        "qzeros": pack_zeros(solution.zero_points, linear.bits, version),
        "scales": solution.scales.half().T.contiguous(),
        "g_idx": solution.g_idx.int(),
    }


def check_zeros(linear: QuantizedLinear, version: str) -> None:
    """Raises FormatError for zero-points that not every reader would decode as we do."""
    # v1 stores the zero-point minus one, and each reader makes something else of −1.
    if version == "v1" and bool((linear.solution.zero_points == 0).any()):
        raise FormatError(
            f"{linear.name}: a zero-point of 0 cannot be written in GPTQ v1;"
            " use --gptq-version v2 or quantize again"
        )
