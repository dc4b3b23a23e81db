"""The pictures of docs/architecture.md are what the code is."""

from pathlib import Path

import networkx
import pytest

from tools.docs import architecture

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["rooms", "weight"])
def test_the_committed_picture_is_the_one_that_is_drawn(name):
    drawn = getattr(architecture, f"draw_{name}")()
    committed = (DOCS / f"{name}.svg").read_text("utf-8")
    assert drawn == committed, "run python -m tools.docs.architecture"


def test_a_room_stands_above_all_that_it_imports():
    graph = networkx.DiGraph([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("e", "d")])
    assert architecture.floors(graph) == [["a"], ["b", "c", "e"], ["d"]]


def test_a_step_that_is_no_function_is_an_error():
    with pytest.raises(ValueError, match="no such function"):
        architecture.checked(architecture.Step("quantizer.solver.hessian:gone", ""))
