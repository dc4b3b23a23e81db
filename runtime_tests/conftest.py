"""The same models as in tests/, for the runtimes; and onnxruntime-genai, which not every environment has."""

from importlib.util import find_spec

import pytest

from tests.conftest import tiny
from vlmq_export.parity import required_runtimes

__all__ = ["genai", "tiny"]


@pytest.fixture
def genai():
    """The package. Where `onnx` is declared present so is this: `verify` counts it in, too."""
    if find_spec("onnxruntime_genai") is None:
        assert "onnx" not in required_runtimes(), "VLMQ_REQUIRE declares onnx; onnxruntime-genai is not installed"
        pytest.skip("onnxruntime-genai is not installed, and onnx not declared present")
    import onnxruntime_genai

    return onnxruntime_genai
