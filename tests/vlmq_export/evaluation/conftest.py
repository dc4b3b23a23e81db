"""Whether lmms-eval is here."""

import os
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session")
def lmms_eval() -> None:
    """Skips a test without lmms-eval. VLMQ_REQUIRE declares it present as `eval`: it fails then."""
    if find_spec("lmms_eval") is None:
        if "eval" in os.environ.get("VLMQ_REQUIRE", "").split(","):
            pytest.fail("VLMQ_REQUIRE declares eval, lmms-eval is not installed", pytrace=False)
        pytest.skip("lmms-eval is not installed")
