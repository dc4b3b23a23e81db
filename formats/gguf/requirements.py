"""The packages that GGUF files are written and proven with."""

from __future__ import annotations

from importlib.util import find_spec

WRITES_WITH = ("gguf",)
RUNTIME = ("gguf", "xllamacpp")


def missing() -> str | None:
    """The packages of the runtime that are not installed, or None."""
    lacking = [name for name in RUNTIME if find_spec(name) is None]
    return ", ".join(lacking) or None
