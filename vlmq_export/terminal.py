"""What the commands print: tables on stdout, progress and log on stderr, readable at 80 columns and without colour."""

from __future__ import annotations

import logging
import os
import time

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vlmq_export.errors import one_line
from vlmq_export.formats.base import Inspection
from vlmq_export.parity import Parity
from vlmq_export.plan import RunPlan
from vlmq_export.quantizer.memory import MemoryPlan
from vlmq_export.quantizer.timing import time_left
from vlmq_export.report import table_rows

out = Console()
err = Console(stderr=True)
QUIET_SECONDS = 60  # between two lines of a stage that goes on, when piped
_STATUS = {"passed": "green", "failed": "bold red", "not run": "yellow", "info": "dim"}


class _OneLine(logging.Formatter):
    """Log lines quote names of files and rows as errors do."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def set_up_logging(verbosity: int, quiet: bool) -> None:
    level = logging.ERROR if quiet else logging.DEBUG if verbosity else logging.INFO
    handler = RichHandler(
        console=err, show_path=False, show_time=False, show_level=level <= logging.DEBUG, markup=False
    )
    handler.setFormatter(_OneLine("%(message)s"))
    logger = logging.getLogger("vlmq_export")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    quiet_libraries()


def quiet_libraries() -> None:
    """Bars and notices of libraries do not belong into our log: set before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' "Loading weights"
    for name in ("torchao", "torch.utils._pytree", "mobius", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Stages:
    """A progress bar a stage on a terminal; one line a finished stage when piped."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.bar = None if quiet or not err.is_terminal else Progress(
            TextColumn("{task.description:<16}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=err, transient=True,
        )  # fmt: skip
        self.tasks: dict[str, object] = {}
        self.stamps: dict[str, list[float]] = {}  # stage → when 0, 1, 2, … steps were done
        self.told = time.monotonic()

    def __enter__(self) -> Stages:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        stamps = self.stamps.setdefault(stage, [])
        stamps += [now] * (done + 1 - len(stamps))
        left = _duration(time_left(stamps, total))
        if self.bar:
            if stage not in self.tasks:
                self.tasks[stage] = self.bar.add_task(stage, total=total, left="")
            self.bar.update(self.tasks[stage], completed=done, total=total, left=left)
        elif not self.quiet and done == total and total:
            err.print(f"{stage}: {total} in {now - stamps[0]:.1f} s", highlight=False)
        elif not self.quiet and done and now - self.told >= QUIET_SECONDS:
            self.told = now
            err.print(f"{stage}: {done} of {total}, {left}", highlight=False)


def _duration(seconds: float | None) -> str:
    """As one reads it: 40 s left, 12 min left, 3.5 h left."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 6000 else f"{seconds / 3600:.1f} h left"


def plain(text: object) -> str:
    """Text of a file for a table: no markup, no control characters."""
    return escape(one_line(text))


def print_plan(plan: RunPlan) -> None:
    m = plan.model
    weights = sum(s.out_features * s.in_features for s in m.linears)
    kept = sum(t.numel for t in m.floats)
    name = plain(f"{m.name} ({m.model_type})")
    out.print(f"{name}: {len(m.linears)} linears, {weights:,} weights to quantize", highlight=False)
    out.print(f"{len(m.floats)} tensors, {kept:,} weights stay in their dtype", highlight=False)
    kinds: dict[tuple[str, int, int], int] = {}
    for x in m.linears:
        key = (".".join(x.name.split(".")[-2:]), x.out_features, x.in_features)
        kinds[key] = kinds.get(key, 0) + 1
    modules = Table("modules", "count", "out", "in", box=None, pad_edge=False)
    for (kind, rows, columns), count in kinds.items():
        modules.add_row(plain(kind), str(count), str(rows), str(columns))
    out.print(modules)
    table = Table("format", "bits per weight", "size", box=None, pad_edge=False)
    for name, f in plan.formats.items():
        refused = bool(f.refusals)
        table.add_row(
            name,
            "refused" if refused else f"{f.bits_per_weight:.3f}",
            "" if refused else f"{f.size_bytes / 2**20:,.1f} MiB",
        )
    out.print(table)
    if plan.memory is not None:
        print_memory(plan.memory)
    for name, f in plan.formats.items():
        for note in f.notes:
            out.print(plain(f"{name}: {note}"), highlight=False)
    for line in plan.refusals:
        out.print(plain(f"refused: {line}"), style="bold red", highlight=False)


def print_memory(memory: MemoryPlan) -> None:
    """What is held at the peak, and where the activations rest."""
    table = Table("memory", "GB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for part, size in [*memory.parts.items(), ("activations", memory.activations)]:
        table.add_row(part, f"{size / 1e9:.2f}")
    out.print(table)
    places = {
        "device": "on the device" if memory.device_free else "in memory",
        "host": "in host memory",
        "disk": "on disk",
    }
    out.print(f"activations rest {places[memory.place]}", highlight=False)
    for name, need, free in (("host", memory.host, memory.host_free), ("GPU", memory.device, memory.device_free)):
        if free:
            verdict = "" if need <= free else ", TOO LITTLE"
            out.print(f"peak on the {name}: {need / 1e9:.1f} GB of {free / 1e9:.1f} GB{verdict}", highlight=False)


def print_parity(parity: Parity) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("format", "check"):
        table.add_column(column, overflow="fold")
    for column in ("figure", "gate"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for (fmt, level, name, figure, gate, compared, status), c in zip(table_rows(parity.checks), parity.checks):
        what = f"{level} {name}" + (f", {compared}" if compared else "")
        table.add_row(fmt, plain(what), figure, gate, f"[{_STATUS[c.status]}]{status}[/]")
    out.print(table)
    for c in parity.failures():
        out.print(
            one_line(f"failed: {c.format} {c.level} {c.name}: {c.worst or c.detail}"),
            style="bold red",
            highlight=False,
            markup=False,
        )


def print_inspection(found: Inspection) -> None:
    out.print(found.kind, highlight=False)
    for key, value in found.metadata.items():
        text = one_line(value)
        shown = text if len(text) <= 120 else text[:117] + "..."
        out.print(f"  {one_line(key)}: {shown}", highlight=False, markup=False)
    table = Table("tensor", "shape", "type", "bytes", box=None, pad_edge=False)
    for t in found.tensors:
        table.add_row(plain(t.name), "×".join(map(str, t.shape)), plain(t.type), f"{t.nbytes:,}")
    out.print(table)
    total = sum(t.nbytes for t in found.tensors)
    out.print(
        f"{len(found.tensors)} tensors, {total / 2**20:,.1f} MiB, {found.bits_per_weight:.3f} bits per quantized weight",
        highlight=False,
    )
