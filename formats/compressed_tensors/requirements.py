"""The packages that a compressed-tensors folder is written and proven with."""

from __future__ import annotations

from importlib.util import find_spec

WRITES_WITH = ("compressed_tensors", "loguru")


def missing() -> str | None:
    """The packages of the runtime that are not installed, or None."""
    lacking = [name for name in (*WRITES_WITH, "accelerate") if find_spec(name) is None]
    return ", ".join(lacking) or None
