"""What the commands print on stdout: tables, readable at 80 columns and without colour."""

from __future__ import annotations

from collections import Counter

from rich.markup import escape
from rich.table import Table

from vlmq_export.errors import NOT_PROVEN, one_line
from vlmq_export.formats.contract import Inspection
from vlmq_export.formats.model_plan import PARTS, source_parts
from vlmq_export.planning.run_plan import RunPlan, narrow_groups
from vlmq_export.planning.run_time import spoken
from vlmq_export.proving.scores import Evaluation
from vlmq_export.quantizer.run.memory_plan import MemoryPlan
from vlmq_export.quantizer.run.time_plan import TimePlan
from vlmq_export.terminal.log import out

_LONGEST = 120  # characters of a value of metadata


def plain(text: object) -> str:
    """Text of a file for a table: no markup, no control characters."""
    return escape(one_line(text))


def print_plan(plan: RunPlan) -> None:
    """What a run would do."""
    model = plan.model
    weights = sum(x.out_features * x.in_features for x in model.linears)
    kept = sum(t.numel for t in model.floats)
    name = plain(f"{model.name} ({model.architecture.model_type})")
    count = len(model.linears)
    out.print(f"{name}: {count} linears, {weights:,} weights to quantize", highlight=False)
    if model.tower:
        count, weights = len(model.tower), sum(x.numel for x in model.tower)
        said = (
            f"vision tower: {count} linears, {weights:,} weights to {model.config.vision_bits} bits"
        )
        out.print(said, highlight=False)
    out.print(f"{len(model.floats)} tensors, {kept:,} weights stay in their dtype", highlight=False)
    if why := narrow_groups(model):
        out.print(why, highlight=False)
    out.print(_modules(plan))
    out.print(_sizes(plan))
    if found := samples_of(plan):
        looked = "" if found["share"] == 1 else f", from a count of {found['share']:.0%} of them"
        tokens = f"{found['tokens']:,} tokens, {found['image_tokens']:,} of images"
        out.print(f"{found['samples']:,} samples: {tokens}{looked}", highlight=False)
    if plan.memory is not None:
        print_memory(plan.memory)
    if plan.time is not None:
        print_time(plan.time)
    for name, planned in plan.formats.items():
        for note in planned.notes:
            out.print(plain(f"{name}: {note}"), highlight=False)
    for name, why in plan.not_provable.items():
        said = f"{name} will be written and not proven, exit code {NOT_PROVEN}: {why}"
        out.print(plain(said), style="yellow", highlight=False)
    for line in plan.refusals:
        out.print(plain(f"refused: {line}"), style="bold red", highlight=False)


def _modules(plan: RunPlan) -> Table:
    """The linears to quantize, by kind and shape; all experts together."""
    kinds = Counter((_kind(x.name), x.out_features, x.in_features) for x in plan.model.linears)
    table = Table("modules", "count", "out", "in", box=None, pad_edge=False)
    for (kind, rows, columns), count in kinds.items():
        table.add_row(plain(kind), str(count), str(rows), str(columns))
    return table


def _kind(name: str) -> str:
    """What a linear is called in every layer: self_attn.q_proj, experts.*.up_proj."""
    parts = name.split(".")
    if len(parts) > 2 and parts[-2].isdigit():
        return f"{parts[-3]}.*.{parts[-1]}"
    return ".".join(parts[-2:])


def _sizes(plan: RunPlan) -> Table:
    """What each part of the model takes in the source and in each format."""
    source = source_parts(plan.model)
    # Of a format that is refused some parts may be known, which would be no size of anything.
    written = {n: {} if p.refusals else p.parts for n, p in plan.formats.items()}
    columns = {"source": source} | written
    totals = {name: sum(parts.values()) for name, parts in columns.items()}
    unit, scale = ("GB", 1e9) if max(totals.values()) >= 1e9 else ("MB", 1e6)
    table = Table(unit, *columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        sizes = [parts.get(part, 0) for parts in columns.values()]
        if any(sizes):
            table.add_row(part, *(f"{size / scale:.2f}" if size else "" for size in sizes))
    table.add_row("all", *(f"{size / scale:.2f}" if size else "" for size in totals.values()))
    bits = ["refused" if p.refusals else f"{p.bits_per_weight:.2f}" for p in plan.formats.values()]
    table.add_row("bits per weight", "", *bits)
    return table


def print_memory(memory: MemoryPlan) -> None:
    """What is held at the peak, and where the activations rest."""
    table = Table("memory", "GB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for part, size in [*memory.parts.items(), ("activations", memory.activations)]:
        table.add_row(part, f"{size / 1e9:.2f}")
    out.print(table)
    on_device = "on the device" if memory.device_free else "in memory"
    places = {"device": on_device, "host": "in host memory", "disk": "on disk"}
    out.print(f"activations rest {places[memory.place]}", highlight=False)
    for name, need, free in (
        ("host", memory.host, memory.host_free),
        ("GPU", memory.device, memory.device_free),
    ):
        if free:
            verdict = "" if need <= free else ", TOO LITTLE"
            amount = f"{need / 1e9:.1f} GB of {free / 1e9:.1f} GB{verdict}"
            out.print(f"peak on the {name}: {amount}", highlight=False)


def samples_of(plan: RunPlan) -> dict | None:
    """How much a run calibrates on, for JSON; None where it has no samples.

    `share` is the part of the rows that was counted.
    """
    if plan.lengths is None or not plan.lengths.each:
        return None
    n = plan.lengths
    known = {"samples": n.samples, "tokens": n.tokens, "image_tokens": n.images}
    return known | {"share": round(n.share, 4)}


def print_time(time: TimePlan) -> None:
    """How long each phase takes, and all of them."""
    table = Table("time", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for phase, seconds in time.phases.items():
        table.add_row(phase, spoken(seconds) if seconds >= 1 else "< 1 s")
    out.print(table)
    without = f", without {', '.join(time.left_out)}" if time.left_out else ""
    said = f"about {spoken(time.seconds)} on this machine with nothing else to do{without}"
    out.print(said, highlight=False)


def print_inspection(found: Inspection) -> None:
    """Metadata and tensors of an artifact or an exported file."""
    out.print(found.kind, highlight=False)
    for key, value in found.metadata.items():
        text = one_line(value)
        shown = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
        out.print(f"  {one_line(key)}: {shown}", highlight=False, markup=False)
    table = Table("tensor", "shape", "type", "bytes", box=None, pad_edge=False)
    for t in found.tensors:
        table.add_row(plain(t.name), "×".join(map(str, t.shape)), plain(t.type), f"{t.nbytes:,}")
    out.print(table)
    total = sum(t.nbytes for t in found.tensors) / 2**20
    bits = f"{found.bits_per_weight:.3f} bits per quantized weight"
    out.print(f"{len(found.tensors)} tensors, {total:,.1f} MiB, {bits}", highlight=False)


def print_scores(evaluation: Evaluation) -> None:
    """The benchmarks, each file beside full precision."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("benchmark", "file"):
        table.add_column(column, no_wrap=column == "file", overflow="fold")
    for column in ("score, %", "against full", "changed"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in evaluation.rows():
        table.add_row(*map(plain, row))
    out.print(table)
