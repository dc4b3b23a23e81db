"""`vlmq-export inspect`: what is in an artifact, an output folder, or any exported file."""

from __future__ import annotations

import json
from pathlib import Path

from vlmq_export import formats
from vlmq_export.errors import UsageError
from vlmq_export.formats.base import Inspection, TensorRow
from vlmq_export.quantizer.artifact import MANIFEST, Artifact
from vlmq_export.quantizer.checkpoint import read_header


def inspect_path(path: Path) -> Inspection:
    """Raises UsageError when the path is none of ours, FormatError or ArtifactError when it is damaged."""
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if (path / MANIFEST).is_file():
        return inspect_artifact(path)
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return formats.get("gguf").inspect(path)
    if path.suffix == ".onnx" or (path.is_dir() and any(path.glob("*.onnx"))):
        return formats.get("onnx").inspect(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "quantize_config.json").is_file():
        return formats.get("gptq").inspect(folder)
    parts = [n for n in ("artifact", *formats.NAMES) if (path / n).is_dir()]
    if parts:
        raise UsageError(
            f"{path}: an output folder; inspect one of its parts: {', '.join(str(path / n) for n in parts)}"
        )
    raise UsageError(f"{path}: not an artifact, a GPTQ or ONNX folder, or a .gguf or .onnx file")


def inspect_artifact(path: Path) -> Inspection:
    artifact = Artifact(path)
    m = artifact.manifest
    rows = [
        TensorRow(name, tuple(info["shape"]), info["dtype"], info["data_offsets"][1] - info["data_offsets"][0])
        for file in sorted(path.glob("*.safetensors"))
        for name, info in read_header(file).items()
    ]
    weights = sum(r.out_features * r.in_features for r in m.modules)
    # Codes take a byte each on disk; what counts is their width once packed.
    bits = sum(r.packed_bits() for r in m.modules)
    metadata = {
        "model": m.name, "model_type": m.model_type, "written by": f"vlmq-export {m.version}", "schema": str(m.schema),
        "recipe": json.dumps(m.config), "calibration": json.dumps(m.calibration), "linears": str(len(m.modules)),
    }  # fmt: skip
    return Inspection("artifact", metadata, rows, bits / weights)
