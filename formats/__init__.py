"""Artifact → a runtime's files, and back. One package a format; `base` holds what they share."""

from importlib import import_module
from types import ModuleType

NAMES = ("gptq", "onnx", "gguf")


def get(name: str) -> ModuleType:
    """The format package; its heavy imports (onnx, gguf, the runtimes) happen inside its functions."""
    return import_module(f"vlmq_export.formats.{name}")
