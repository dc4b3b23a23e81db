"""The packages that ONNX files are written and proven with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

WRITES_WITH = ("onnx", "onnx_ir", "onnxscript", "mobius")
OLDEST = (1, 31)  # version of ONNX Runtime that every figure of this project was measured with


def missing() -> str | None:
    """The packages that checking needs and that are not installed or too old, or None."""
    if old := too_old_runtime():
        return old
    lacking = [name for name in (*WRITES_WITH, "onnxruntime") if find_spec(name) is None]
    return ", ".join(lacking) or None


def too_old_runtime() -> str | None:
    """The onnxruntime that is needed, if an older one is installed, or None.

    An older one lacks operators, or computes them differently.
    """
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            major, minor = (int(part) for part in version(name).split(".")[:2])
        except (PackageNotFoundError, ValueError):
            continue
        if (major, minor) < OLDEST:
            return f"{name}>={OLDEST[0]}.{OLDEST[1]} (here is {version(name)})"
    return None
