"""`--help` in an 80-column terminal: panels, and a line of words for each value."""

import pytest
from typer.testing import CliRunner

from vlmq_export.cli import app
from vlmq_export.errors import EXIT_CODES
from vlmq_export.formats import NAMES
from vlmq_export.quantizer.config import ACT_ORDERS
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.recipes.choices import CHOICES
from vlmq_export.recipes.recipe import Recipe

TITLES = ("What is quantized", "Calibration", "GPTQ", "ONNX", "GGUF", "Proof", "The run")


def help_of(*args: str) -> str:
    result = CliRunner().invoke(app, [*args], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    return result.stdout


def panels(text: str) -> dict[str, str]:
    """Title of each panel → its lines, without the frame."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("╭"):
            found[line.strip("╭╮─ ")] = lines = []
        elif line.startswith("│"):
            lines.append(line.strip("│ "))
    return {title: "\n".join(lines) for title, lines in found.items()}


def test_every_option_stands_in_its_panel():
    found = panels(help_of("--help"))
    for title, option in zip(
        TITLES,
        ("--method", "--samples", "--gptq-names", "--onnx-graph", "--mmproj", "--verify", "--out"),
        strict=True,
    ):
        assert any(name.startswith(title) and option in text for name, text in found.items())
    everything = "\n".join(found.values())
    for key in Recipe.model_fields:
        flag = "MODEL" if key == "model" else f"--{key.replace('_', '-')}"
        assert flag in everything, key


def test_every_value_has_a_line_of_words():
    lines = " ".join(help_of("--help").replace("│", " ").split())
    for key in ("format", "method", "act_order"):
        for value, words in CHOICES[key].items():
            assert words and f"{value} {words}" in lines, value
    assert CHOICES["method"].keys() == METHODS.keys()
    assert CHOICES["act_order"].keys() == ACT_ORDERS.keys()
    assert tuple(CHOICES["format"]) == NAMES


def test_every_exit_code_is_explained():
    codes = panels(help_of("--help"))["Exit codes"]
    assert [int(line.split()[0]) for line in codes.splitlines() if line[0].isdigit()] == [
        *EXIT_CODES
    ]


@pytest.mark.parametrize("command", [[], ["export"], ["verify"], ["inspect"]])
def test_short_help(command):
    assert help_of(*command, "-h") == help_of(*command, "--help")
