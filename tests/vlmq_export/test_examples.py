"""The programs in examples/ run as their first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.reference_vlm.model import make_random_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *args: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested_here():
    assert {p.name for p in EXAMPLES.glob("*.py")} == {"export_and_prove.py", "plan_sizes.py"}


def test_plan_sizes():
    lines = run("plan_sizes.py").splitlines()
    assert [line.split(":")[0] for line in lines] == ["2 bits", "3 bits", "4 bits", "8 bits"]
    assert all("MB" in line for line in lines)


@pytest.mark.slow
def test_export_and_prove(tmp_path):
    model = make_random_checkpoint(tmp_path / "model", layers=2, depth=3)
    said = run("export_and_prove.py", tmp_path / "out", model)
    assert said.splitlines()[-1] == "verified"
    assert "5.00 bits a quantized weight" in said
