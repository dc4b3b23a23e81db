"""`--help` in panels of two columns, readable at 80 columns and in a pipe."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperArgument, TyperCommand

from vlmq_export.recipes.choices import CHOICES
from vlmq_export.terminal.log import out

_WIDTH = 100  # columns that help takes at most
_NAMES = 24  # columns of an option's names; the 80 of a terminal leave 50 for its text
_VALUES = {int: "N", float: "X", Path: "PATH"}  # what stands for a value of this type
_FIRST = "Options"  # panel of the options before the first that names one


class Command(TyperCommand):
    """A command whose help stands in panels.

    The first option of a panel names it, as its `rich_help_panel`. The options that follow it in
    the command's signature belong to the same panel.

    notes: further panels of rows, each under its title.
    """

    notes: ClassVar[dict[str, dict[str, str]]] = {}
    shown_as = ""  # the command as its users call it; empty: by its own name

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help. `formatter`, of click, is left empty."""
        blocks: list[RenderableType] = [Text(f"Usage: {self._usage(ctx)}\n", style="bold")]
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            blocks.append(Text(" ".join(paragraph.split()) + "\n"))
        hints = get_type_hints(self.callback) if self.callback else {}
        for title, params in _panels(self.get_params(ctx)).items():
            rows = [row for p in params for row in _rows(p, hints.get(str(p.name)))]
            blocks.append(_panel(title, rows))
        for title, notes in self.notes.items():
            blocks.append(_panel(title, [_pair(name, said) for name, said in notes.items()]))
        if self.epilog:
            blocks.append(Text(f"\n{self.epilog}"))
        out.print(Group(*blocks), width=min(out.width, _WIDTH), highlight=False)

    def _usage(self, ctx: Any) -> str:
        """`vlmq-export [OPTIONS] [MODEL]`."""
        arguments = [p for p in self.get_params(ctx) if isinstance(p, TyperArgument)]
        named = (_names(p, None) if p.required else f"[{_names(p, None)}]" for p in arguments)
        return " ".join([self.shown_as or ctx.command_path, "[OPTIONS]", *named])


def _panels(params: Iterable[Any]) -> dict[str, list[Any]]:
    """Title → parameters, both in the order of the signature."""
    panels: dict[str, list[Any]] = {}
    title = _FIRST
    for param in params:
        title = param.rich_help_panel or title
        panels.setdefault(title, []).append(param)
    return panels


def _panel(title: str, rows: Sequence[RenderableType]) -> Panel:
    return Panel(Group(*rows), title=title, title_align="left", border_style="dim")


def _pair(left: str, right: str) -> Table:
    """A row of a panel."""
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=_NAMES, style="bold")
    table.add_column(ratio=1)
    table.add_row(Text(left), Text(right))
    return table


def _names(param: Any, hint: Any) -> str:
    """The names of a parameter and what stands for its value: `-f, --format NAME`."""
    if isinstance(param, TyperArgument):
        return str(param.name).upper()
    names = sorted([*param.opts, *param.secondary_opts], key=lambda n: n.startswith("--"))
    flag = param.is_flag or param.count
    return " ".join([", ".join(names), *([] if flag else [_value(str(param.name), hint)])])


def _value(name: str, hint: Any) -> str:
    """What stands for the value of an option."""
    if name in CHOICES:
        return "NAME"
    kinds = [k for k in (hint, *get_args(hint)) if k in _VALUES]
    return _VALUES[kinds[0]] if kinds else "TEXT"


def _rows(param: Any, hint: Any) -> list[RenderableType]:
    """What a parameter is for, and a line for each value that it may have."""
    row = _pair(_names(param, hint), " ".join((param.help or "").split()))
    known = {} if isinstance(param, TyperArgument) else CHOICES.get(str(param.name), {})
    if not known:
        return [row]
    values = Table.grid(padding=(0, 2, 0, 0))
    for value, words in known.items():
        values.add_row(Text(value), Text(words))
    return [row, Padding(values, (0, 0, 0, 4))]
