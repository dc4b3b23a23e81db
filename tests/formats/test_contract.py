"""Every format has the modules and functions that the contract names."""

from importlib import import_module
from pathlib import Path

import pytest

from vlmq_export import formats
from vlmq_export.formats.contract import FORMATS

FUNCTIONS = {
    "plan": ("plan",),
    "write": ("write",),
    "inspect": ("inspect",),
    "proof.check": ("check",),
    "requirements": ("WRITES_WITH", "missing"),
}


def test_the_names_are_the_folders():
    """Every folder with a plan.py is a format that a user can ask for."""
    root = Path(formats.__file__).parent
    assert {p.parent.name for p in root.glob("*/plan.py")} == {f.folder for f in FORMATS.values()}
    assert set(formats.NAMES) == set(FORMATS)


@pytest.mark.parametrize("name", formats.NAMES)
def test_a_format_has_its_functions(name):
    for module, functions in FUNCTIONS.items():
        found = import_module(f"vlmq_export.formats.{FORMATS[name].folder}.{module}")
        assert all(hasattr(found, function) for function in functions), module
    assert FORMATS[name].missing() is None  # every runtime is installed where tests run
    assert all(isinstance(package, str) for package in FORMATS[name].writes_with)
