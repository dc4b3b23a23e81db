"""The same models as in tests/, for the runtimes."""

from tests.conftest import tiny

__all__ = ["tiny"]
