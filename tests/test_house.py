"""The walls of the house: who may import whom, how full a room may be, how long a function."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("quantizer", "formats", "vlmq_export")
ROOM = 12  # most modules in one folder, without its __init__
LONGEST = 60  # most lines of a function
OFTEN = 0.03  # most of the functions that may be longer than 40 lines


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("vlmq_export", exclude_type_checking_imports=True, cache_dir=None)


def folders() -> Iterator[Path]:
    """Every folder with modules; those that are linked once, under their own names."""
    for top in SOURCES:
        for folder in [ROOT / top, *(ROOT / top).rglob("*")]:
            real = folder.is_dir() and not folder.is_symlink()
            if real and not any(parent.is_symlink() for parent in folder.parents):
                yield folder


def functions() -> Iterator[tuple[str, int]]:
    """(where, lines) of every function."""
    for folder in folders():
        for file in folder.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    where = f"{file.relative_to(ROOT)}: {node.name}"
                    yield where, node.end_lineno - node.lineno + 1


def test_no_import_goes_up():
    """The contracts stand in pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_import_goes_in_a_circle(graph):
    edges = networkx.DiGraph()
    for module in graph.modules:
        imported = graph.find_modules_directly_imported_by(module)
        edges.add_edges_from((module, other) for other in imported)
    circles = [c for c in networkx.strongly_connected_components(edges) if len(c) > 1]
    assert not circles and len(edges) > 150


def test_the_solver_imports_grids_alone(graph):
    inside = "vlmq_export.quantizer."
    for module in graph.find_descendants(f"{inside}solver"):
        for imported in graph.find_modules_directly_imported_by(module):
            room = imported.removeprefix(inside).split(".")[0]
            assert room in ("solver", "grids"), f"{module} imports {imported}"


def test_formats_import_nothing_of_the_command_but_errors_and_the_version(graph):
    allowed = {"vlmq_export.errors", "vlmq_export._version"}
    for module in graph.find_descendants("vlmq_export.formats"):
        for imported in graph.find_modules_directly_imported_by(module):
            below = imported.startswith(("vlmq_export.formats", "vlmq_export.quantizer"))
            assert below or imported in allowed, f"{module} imports {imported}"


def test_no_room_is_too_full():
    for folder in folders():
        modules = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(modules) <= ROOM, f"{folder.relative_to(ROOT)}: {len(modules)} modules"


def test_every_module_says_what_it_is_for():
    for folder in folders():
        for file in folder.glob("*.py"):
            said = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
            assert len(said.split()) >= 3, file


def test_no_function_is_too_long():
    found = dict(functions())
    assert {where: n for where, n in found.items() if n > LONGEST} == {}
    long = [where for where, n in found.items() if n > 40]
    assert len(long) <= OFTEN * len(found), long


def test_the_links_lead_to_the_folders_at_the_top():
    for name in ("quantizer", "formats"):
        link = ROOT / "vlmq_export" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name
