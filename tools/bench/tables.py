"""Markdown tables from the cells of a bench, and the place of each in a page.

A cell is a JSON object: what was measured, and the figures. A page asks for a table by its name,
between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

# How a field is written: its factor and its digits. KL is in thousandths of a nat.
FORMATS: dict[str, tuple[float, str]] = {
    "kl": (1e3, ".2g"),
    "kl_text": (1e3, ".2g"),
    "bits": (1, ".2f"),
    "user": (1, ".0f"),
    "wall": (1, ".0f"),
    "ratio": (1, ".2f"),
}


def table(
    cells: Sequence[dict],
    rows: str,  # the key of the cells whose values are the row titles
    columns: str,  # the same for the column titles
    field: str,  # the figure to show, or `tasks`
    order: Sequence[str] = (),  # of the titles; those not named follow as they come
) -> str:
    """A table of one figure: the mean over the cells of a row and column, ± half their range.

    For `tasks` the columns are the tasks, and the figure is the exact match of each.
    """
    if field == "tasks":
        cells = [
            c | {"exact": share, "task": task}
            for c in cells
            for task, share in c.get("tasks", {}).items()
        ]
        columns, field = "task", "exact"
    cells = [c for c in cells if c.get(field) is not None]
    across, down = (_ordered([c[key] for c in cells], order) for key in (columns, rows))
    lines = ["| | " + " | ".join(across) + " |", "|---" * (1 + len(across)) + "|"]
    for row in down:
        found = [
            [c[field] for c in cells if c[rows] == row and c[columns] == column]
            for column in across
        ]
        figures = (spread(values, *FORMATS.get(field, (1, ".3f"))) for values in found)
        lines.append(f"| {row} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], factor: float = 1, digits: str = ".3g") -> str:
    """The mean ± half the range, the mean alone where there is no range; no values, no text."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    text = _plain(factor * statistics.fmean(values), digits)
    return text + (f" ± {_plain(factor * half, digits)}" if half else "")


def _plain(value: float, digits: str) -> str:
    """A number without an exponent, and without the zero before the point."""
    text = format(value, digits)
    if "e+" in text:
        text = f"{float(text):.0f}"
    elif "e" in text:
        text = f"{float(text):.9f}".rstrip("0")
    return text.removeprefix("0") if text.startswith("0.") else text


def _ordered(values: Sequence[str], order: Sequence[str]) -> list[str]:
    """Every value once: first those that `order` names, then the others as they come."""
    found = list(dict.fromkeys(values))
    return [v for v in order if v in found] + [v for v in found if v not in order]


def fill(page: Path, tables: dict[str, str]) -> None:
    """Renew the tables that a page asks for. Raises KeyError for a name that has no table."""

    def renewed(match: re.Match) -> str:
        return f"{match[1]}\n\n{tables[match[2]]}\n\n<!-- end -->"

    place = r"(<!-- table ([^>]+?) -->).*?<!-- end -->"
    text = re.sub(place, renewed, page.read_text("utf-8"), flags=re.DOTALL)
    page.write_text(text, "utf-8")
