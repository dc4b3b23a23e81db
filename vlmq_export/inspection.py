"""`vlmq-export inspect`: what is in an artifact, an output folder, or any exported file."""

from __future__ import annotations

import json
from pathlib import Path

from vlmq_export import formats
from vlmq_export.errors import UsageError
from vlmq_export.formats.contract import FORMATS, Inspection, TensorRow
from vlmq_export.formats.gptq.imports.scheme import quantization_of
from vlmq_export.quantizer.artifact.manifest import MANIFEST
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.storage.tensors import read_header


def inspect_path(path: Path) -> Inspection:
    """What is in an artifact, a format's folder, or one of its files.

    Raises UsageError for a path that is none of them, FormatError or ArtifactError for one that is
    damaged.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if (path / MANIFEST).is_file():
        return inspect_artifact(path)
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return FORMATS["gguf"].inspect(path)
    if path.suffix == ".onnx" or (path.is_dir() and any(path.glob("*.onnx"))):
        return FORMATS["onnx"].inspect(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "quantize_config.json").is_file():
        return FORMATS["gptq"].inspect(folder)
    if (quantization_of(folder) or {}).get("quant_method") == "compressed-tensors":
        return FORMATS["compressed-tensors"].inspect(folder)
    parts = [n for n in ("artifact", *formats.NAMES) if (path / n).is_dir()]
    if parts:
        named = ", ".join(str(path / n) for n in parts)
        raise UsageError(f"{path}: an output folder; inspect one of its parts: {named}")
    raise UsageError(f"{path}: not an artifact, a folder of a format, or a .gguf or .onnx file")


def inspect_artifact(path: Path) -> Inspection:
    """What is in an artifact. Raises ArtifactError where it is damaged."""
    artifact = Artifact(path)
    m = artifact.manifest
    rows = [
        TensorRow(
            name,
            tuple(info["shape"]),
            info["dtype"],
            info["data_offsets"][1] - info["data_offsets"][0],
        )
        for file in sorted(path.glob("*.safetensors"))
        for name, info in read_header(file).items()
    ]
    weights = sum(r.out_features * r.in_features for r in m.modules)
    # Codes take a byte each on disk. What counts is their width once packed.
    bits = sum(r.packed_bits() for r in m.modules)
    metadata = {
        "model": m.name,
        **({"repository": f"{m.repository} at {m.revision}"} if m.repository else {}),
        "model_type": m.model_type,
        "written by": f"vlmq-export {m.version}",
        "schema": str(m.schema),
        "recipe": json.dumps(m.config),
        "calibration": json.dumps(m.calibration),
        "linears": str(len(m.modules)),
    }
    return Inspection("artifact", metadata, rows, bits / weights)
