"""The tables of docs/replication.md, from recipes/.

    python -m tools.docs.replication          # writes them into the page

Each row of a paper has a line of its figures, and a line of empty cells for those who measure it.
"""

from __future__ import annotations

from pathlib import Path

from tools.replication.tables import HEADS, RECIPES, read_table

PAGE = Path(__file__).parents[2] / "docs" / "replication.md"
BEGIN, END = "<!-- tables of recipes/ begin -->", "<!-- tables of recipes/ end -->"


def tables() -> str:
    """All tables in Markdown."""
    parts = []
    for file in sorted(RECIPES.glob("*-table*.yaml")):
        table = read_table(file)
        empty = " |" * len(HEADS)
        lines = [
            f"### {table.title}: `recipes/{file.name}`\n",
            f"| row | | {' | '.join(HEADS)} |",
            "|---" * (len(HEADS) + 2) + "|",
        ]
        for row in table.rows.values():
            figures = " | ".join(f"{x:g}" for x in row.printed)
            lines.append(f"| `{row.name}` | {row.named} | {figures} |")
            lines.append(f"| | measured |{empty}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def with_tables(page: str) -> str:
    """The page with the tables between its two marks."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
