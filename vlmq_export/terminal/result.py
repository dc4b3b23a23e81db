"""The last screen of a run: verdicts, files, and the commands that run them.

It is readable at 80 columns and without colour. Paths are not broken, so that they can be copied.
"""

from __future__ import annotations

from rich.table import Table

from vlmq_export.errors import one_line
from vlmq_export.proving.fidelity import Fidelity
from vlmq_export.proving.parity import LEVELS, Parity
from vlmq_export.report.files import files_of, run_with
from vlmq_export.report.page import table_rows
from vlmq_export.result import Result
from vlmq_export.terminal.log import out
from vlmq_export.terminal.tables import plain

_STATUS = {"passed": "green", "failed": "bold red", "not run": "yellow", "info": "dim"}
_FIDELITY = {"close": "green", "worse": "yellow", "far": "bold red"}
_SHOWN = 3  # files of a format that are named; the others are small
_NAME = 54  # columns of a file's name


def print_result(result: Result, *, every_check: bool = False) -> None:
    """How far the model is from its source, each format, and one line of verdict.

    Failed checks are always named.

    every_check: the whole parity table too, which the report has as well.
    """
    parity = result.parity
    if result.fidelity is not None:
        print_fidelity(result.fidelity)
    if parity is not None and every_check:
        print_parity(parity)
    for name in result.plan.formats:
        _print_format(name, result)
    for c in parity.failures() if parity is not None else ():
        _line(f"failed: {c.format} {c.level} {c.name}: {c.worst or c.detail}", "bold red")
    _line(f"{result.out}: {_verdict(result)}; report: {result.out / 'report.html'}")


def print_fidelity(fidelity: Fidelity) -> None:
    """One line: the verdict in its colour, and the figures."""
    style = _FIDELITY.get(fidelity.verdict, "yellow")
    line = f"[{style}]{fidelity.words}[/]: {plain(fidelity.short())}"
    out.print(line, highlight=False)


def _print_format(name: str, result: Result) -> None:
    """Verdict, size, files and commands of one format."""
    folder = result.out / name
    files = files_of(folder)
    total = sum(files.values())
    share = ""
    if result.source_bytes:
        share = f", {total / result.source_bytes:.2f} of the source's {_size(result.source_bytes)}"
    _line(f"{name}: {_size(total)}{share}", "bold")
    said, style = _proven(name, result.parity)
    _line(f"  {said}", style)
    named = [*files.items()][:_SHOWN]
    for file, size in named:
        _line(f"  {one_line(file):<{_NAME}} {_size(size):>14}")
    if rest := len(files) - len(named):
        small = _size(total - sum(size for _, size in named))
        _line(f"  {f'and {rest} more':<{_NAME}} {small:>14}")
    for command in run_with(
        name,
        result.out,
        below=str(result.out),
        by_gptqmodel=result.by_gptqmodel,
        by_vllm=result.by_vllm,
    ):
        _line(f"  run: {command}")


def _proven(name: str, parity: Parity | None) -> tuple[str, str]:
    """What the checks of a format say, and its colour."""
    if parity is None:
        return "not verified", ""
    rows = [c for c in parity.checks if c.format == name]
    failed, not_run, passed = (
        [c for c in rows if c.status == status] for status in ("failed", "not run", "passed")
    )
    if failed:
        return f"FAILED: {len(failed)} of {len(failed) + len(passed)} checks", "bold red"
    why = "; ".join(dict.fromkeys(c.detail for c in not_run))
    if {c.level for c in passed}.issuperset(LEVELS):
        more = f"; {len(not_run)} could not run: {why}" if why else ""
        return f"proven: {len(passed)} checks passed{more}", "green"
    return f"NOT PROVEN: {len(not_run)} checks could not run: {why}", "yellow"


def _verdict(result: Result) -> str:
    parity = result.parity
    if parity is None:
        return "not verified"
    if result.verified:
        return "verified"
    return "UNVERIFIED" if parity.failures() else "not proven"


def _size(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**20:,.1f} MiB" if size >= 2**16 else f"{size / 2**10:,.1f} KiB"


def _line(text: str, style: str = "") -> None:
    """One line that cannot drive a terminal, its spaces kept."""
    safe = "".join(c if c.isprintable() else "?" for c in text)
    out.print(safe, style=style, highlight=False, markup=False, soft_wrap=True)


def print_parity(parity: Parity) -> None:
    """The parity table."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("format", "check"):
        table.add_column(column, overflow="fold")
    for column in ("figure", "gate"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for row, check in zip(table_rows(parity.checks), parity.checks):
        fmt, level, name, figure, gate, compared, status = row
        what = f"{level} {name}" + (f", {compared}" if compared else "")
        table.add_row(fmt, plain(what), figure, gate, f"[{_STATUS[check.status]}]{status}[/]")
    out.print(table)
