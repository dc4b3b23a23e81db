"""vlmq-export: one quantization of a vision-language model, every runtime, proven."""

from vlmq_export._version import __version__

__all__ = ["__version__"]
