"""GGUF for llama.cpp: a text model with every linear in the exact home of its grid, and an mmproj for the vision side.

types     table of tensor types, packers          homes   which type holds a grid exactly
params    hyperparameters from config.json        names   tensor names and shapes on both sides
metadata  general.*, tokenizer.*                  writer  the container, tensor by tensor
text, mmproj, write                               the two files
container, decode, read                           our reader, and the two others that L1 asks
complete  what llama.cpp would miss in silence    plan, inspect
"""

from importlib.util import find_spec

from vlmq_export.formats.gguf.check import check
from vlmq_export.formats.gguf.inspect import inspect
from vlmq_export.formats.gguf.plan import plan
from vlmq_export.formats.gguf.write import write

__all__ = ["WRITES_WITH", "check", "inspect", "missing", "plan", "write"]

WRITES_WITH: tuple[str, ...] = ("gguf",)  # packages without which nothing can be written


def missing() -> str | None:
    """The packages of the runtime that are not installed, or None."""
    absent = [name for name in ("gguf", "xllamacpp") if find_spec(name) is None]
    return ", ".join(absent) or None
