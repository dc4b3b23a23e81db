"""Fixtures of the tests that start a runtime: the models of tests/, and onnxruntime-genai."""

from importlib.util import find_spec

import pytest

from tests.conftest import tiny
from vlmq_export.proving.parity import required_runtimes

__all__ = ["genai", "tiny"]


@pytest.fixture
def genai():
    """The package onnxruntime_genai. The test is skipped without it.

    VLMQ_REQUIRE=onnx declares this package present too, as it does for `verify`.
    """
    if find_spec("onnxruntime_genai") is None:
        declared = "onnx" in required_runtimes()
        assert not declared, "VLMQ_REQUIRE declares onnx; onnxruntime-genai is not installed"
        pytest.skip("onnxruntime-genai is not installed, and onnx not declared present")
    import onnxruntime_genai

    return onnxruntime_genai
