"""vlmq-export: one quantization of a vision-language model, every runtime, proven.

    from vlmq_export import Recipe, export, plan, verify, inspect

`vlmq_export.api` says how these are used. They are imported when they are first asked for, so that
`import vlmq_export` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmq_export._version import __version__

if TYPE_CHECKING:
    from vlmq_export.api import evaluate, export, inspect, plan, verify
    from vlmq_export.errors import VlmqError
    from vlmq_export.recipes.recipe import Recipe

__all__ = ["Recipe", "VlmqError", "__version__", "evaluate", "export", "inspect", "plan", "verify"]

_HOMES = {
    "Recipe": "vlmq_export.recipes.recipe",
    "VlmqError": "vlmq_export.errors",
    "evaluate": "vlmq_export.api",
    "export": "vlmq_export.api",
    "inspect": "vlmq_export.api",
    "plan": "vlmq_export.api",
    "verify": "vlmq_export.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
