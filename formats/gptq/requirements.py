"""The packages that a GPTQ folder is proven with. Writing one needs none."""

from __future__ import annotations

from importlib.util import find_spec

WRITES_WITH: tuple[str, ...] = ()
RUNTIME = ("optimum", "gptqmodel", "torchao")


def missing() -> str | None:
    """The packages of the runtime that are not installed, or None.

    Nothing is imported, because gptqmodel changes the process that it is imported in.
    """
    lacking = [name for name in RUNTIME if find_spec(name) is None]
    return ", ".join(lacking) or None
