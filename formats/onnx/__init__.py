"""ONNX: three graphs for ONNX Runtime, quantized linears as com.microsoft::MatMulNBits.

`import onnx` inside this package is the real onnx: imports are absolute.
"""

from __future__ import annotations

from pathlib import Path

from vlmq_export.formats.base import Check, CheckSettings, FormatOptions, Inspection
from vlmq_export.formats.onnx.planning import plan
from vlmq_export.quantizer.artifact import Artifact

__all__ = ["WRITES_WITH", "check", "inspect", "missing", "plan", "write"]

WRITES_WITH: tuple[str, ...] = (
    "onnx",
    "onnx_ir",
    "onnxscript",
    "mobius",
)  # packages without which nothing can be written


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    from vlmq_export.formats.onnx.writer import write

    return write(artifact, folder, options)


def check(folder: Path, reference, options: FormatOptions, settings: CheckSettings) -> list[Check]:
    from vlmq_export.formats.onnx.checks import check

    return check(folder, reference, options, settings)


def inspect(path: Path) -> Inspection:
    from vlmq_export.formats.onnx.listing import inspect

    return inspect(path)


def missing() -> str | None:
    from vlmq_export.formats.onnx.checks import missing

    return missing()
