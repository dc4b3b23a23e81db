"""Cells of the quality bench → markdown tables, in a page between `<!-- table NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

# How a field is written: its factor and digits. KL is told in thousandths of a nat.
FORMATS = {
    "kl": (1e3, ".2g"),
    "kl_text": (1e3, ".2g"),
    "bits": (1, ".2f"),
    "user": (1, ".0f"),
    "wall": (1, ".0f"),
    "ratio": (1, ".2f"),
}


def table(cells: Sequence[dict], rows: str, columns: str, field: str, order: Sequence[str] = ()) -> str:
    """A row a value of `rows`, a column a value of `columns`: mean over the cells of both, ± half their range.

    `order` of row and column titles; what it does not name follows as it comes. `field` of a cell, or `tasks`, for which
    the columns are the tasks.
    """
    if field == "tasks":
        cells = [c | {"exact": share, "task": task} for c in cells for task, share in c.get("tasks", {}).items()]
        columns, field = "task", "exact"
    cells = [c for c in cells if c.get(field) is not None]
    across, down = (_ordered([c[key] for c in cells], order) for key in (columns, rows))
    lines = ["| | " + " | ".join(across) + " |", "|---" * (1 + len(across)) + "|"]
    for row in down:
        found = [[c[field] for c in cells if c[rows] == row and c[columns] == column] for column in across]
        lines.append(
            f"| {row} | " + " | ".join(spread(values, *FORMATS.get(field, (1, ".3f"))) for values in found) + " |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float], factor: float = 1, digits: str = ".3g") -> str:
    """Mean ± half the range, where there is one."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    text = _plain(factor * statistics.fmean(values), digits)
    return text + (f" ± {_plain(factor * half, digits)}" if half else "")


def _plain(value: float, digits: str) -> str:
    """Without an exponent, and without the zero before the point."""
    text = format(value, digits)
    text = f"{float(text):.0f}" if "e+" in text else f"{float(text):.9f}".rstrip("0") if "e" in text else text
    return text.removeprefix("0") if text.startswith("0.") else text


def _ordered(values: Sequence[str], order: Sequence[str]) -> list[str]:
    found = list(dict.fromkeys(values))
    return [v for v in order if v in found] + [v for v in found if v not in order]


def fill(page: Path, tables: dict[str, str]) -> None:
    """Renew the tables that a page asks for by name. Raises KeyError for a name there is no table of."""

    def renewed(match: re.Match) -> str:
        return f"{match[1]}\n\n{tables[match[2]]}\n\n<!-- end -->"

    text = re.sub(r"(<!-- table ([^>]+?) -->).*?<!-- end -->", renewed, page.read_text("utf-8"), flags=re.DOTALL)
    page.write_text(text, "utf-8")
