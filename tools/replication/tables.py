"""The papers' tables in recipes/: what each row quantizes, asks, and what the paper prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmq_export.errors import UsageError
from vlmq_export.recipes.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SOURCE = "source"  # in place of a method: the row of full precision
HEADS = ("Chart", "Doc", "MME en", "MME cn", "OCR", "SciQA", "SEED 2+", "Text", "Avg")


@dataclass(frozen=True)
class TableRow:
    """One row of a paper's table."""

    name: str  # model/method
    model: str  # hub id
    method: str  # of ours, or `source`
    named: str  # what the paper calls the method
    printed: tuple[float, ...]  # eight benchmarks and their average, as HEADS


@dataclass(frozen=True)
class Table:
    """One table of a paper."""

    title: str
    recipe: dict[str, Any]  # the keys of a recipe that all rows share
    tasks: tuple[str, ...]
    rows: dict[str, TableRow]

    def recipe_of(self, row: TableRow, **more: Any) -> Recipe:
        """The recipe of a row.

        That of full precision is rounded to nearest, because `eval` asks the source of a run.
        """
        method = "rtn" if row.method == SOURCE else row.method
        return Recipe(**self.recipe | {"model": row.model, "method": method} | more)


def read_table(path: Path) -> Table:
    """A table of recipes/."""
    raw = yaml.safe_load(path.read_text("utf-8"))
    rows = {}
    for name, row in raw["rows"].items():
        method = name.rpartition("/")[2]
        rows[name] = TableRow(name, row["model"], method, row["named"], tuple(row["printed"]))
    return Table(raw["table"], raw["recipe"], tuple(raw["tasks"]), rows)


def row_named(table: Table, name: str) -> TableRow:
    """Raises UsageError with the names that there are."""
    if name not in table.rows:
        raise UsageError(f"{name}: no such row; {table.title} has {', '.join(table.rows)}")
    return table.rows[name]
