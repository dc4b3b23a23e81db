"""What a person reads afterwards: report.html and the model card, both from the same facts."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from vlmq_export._version import __version__
from vlmq_export.errors import one_line
from vlmq_export.formats.proof.checks import Check
from vlmq_export.quantizer.artifact.manifest import OUTER, TIMING, VISION, ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.storage.whole_files import write_atomic
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.report import card, figures
from vlmq_export.report.files import files_of, run_with
from vlmq_export.report.widths import width_map

if TYPE_CHECKING:
    from vlmq_export.result import Result


def write(
    out: Path, recipe: Recipe, artifact: Artifact, result: Result, rows: Sequence[Row] = ()
) -> None:
    """Write report.html and README.md into `out`.

    rows: the held-out rows that both models were given, for their images.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmq_export.report"),
        autoescape=jinja2.select_autoescape(["html", "html.j2"]),
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "mib": lambda n: f"{n / 2**20:,.1f} MiB",
        "md": markdown,
    }
    manifest, records = artifact.manifest, artifact.manifest.modules
    facts = {
        "name": manifest.name,
        "version": __version__,
        "recipe": recipe,
        "yaml": _public_yaml(recipe),
        "manifest": manifest,
        "contents": contents(records, recipe),
        "layers": layer_errors(records),
        "widths": width_map(records),
        "errors": figures.error_charts(records),
        "low_importance": figures.low_importance_charts(records),
        "low_ratio": figures.low_importance_ratio(records),
        "compared": any("nearest_error" in r.metrics for r in records),
        "ramp": ", ".join(f"rgb{colour}" for colour in figures.RAMP),
        "maps": figures.importance_maps(records, manifest.calibration.get("pictured")),
        "calibrated": any("relative_error" in r.metrics for r in records),
        "result": result,
        "timing": _timing(artifact),
        "parity": result.parity,
        "fidelity": result.fidelity,
        "evaluation": result.evaluation,
        "pairs": figures.answer_pairs(result.fidelity, rows),
        "sizes": {f: sum(files_of(out / f).values()) for f in recipe.format},
        "plans": result.plan.formats,
        "run_with": {
            f: run_with(f, out, by_gptqmodel=result.by_gptqmodel, by_vllm=result.by_vllm)[0]
            for f in recipe.format
        },
        **card.facts(out, recipe, artifact, result.plan),
    }
    for template, target in (("report.html.j2", "report.html"), ("card.md.j2", "README.md")):
        text = environment.get_template(template).render(facts)
        write_atomic(out / target, lambda t, text=text: t.write_text(text, "utf-8"))


# -- what was quantized, in sentences ------------------------------------------------------------


def contents(records: Sequence[ModuleRecord], recipe: Recipe) -> str:
    """What of the model is quantized and how, and what its other tensors hold.

    These are a few sentences of the card.
    """
    heads = [r for r in records if r.name.endswith("lm_head")]
    embeddings = [r for r in records if r.layer == OUTER]
    tower = [r for r in records if r.layer == VISION]
    outside = [*heads, *embeddings, *tower]
    linears = [r for r in records if r not in outside]
    count = len(linears)
    text = [
        f"{count} linears of the language backbone are quantized by `{recipe.method}`"
        f" {_grid(recipe, linears)}.",
        *_starved(records),
    ]
    if heads:
        grid = "on its type" if recipe.block_types else f"to {heads[0].bits} bits"
        text.append(f"So is the output head, {grid}.")
    if tower:
        text.append(f"So are {len(tower)} linears of vision tower and projector, {_tower(tower)}.")
    if embeddings:
        grid = "on its type" if recipe.block_types else f"to {embeddings[0].bits} bits"
        text.append(f"The embedding is rounded to nearest {grid}.")
    if recipe.rotate != "off":
        text.append(
            "All other tensors but those of the vision tower are rotated (docs/methods.md)."
        )
        return " ".join(text)
    scaled = bool(METHODS[recipe.method].scaling or recipe.smoothing)
    if scaled:
        text.append("The norms of its layers carry what the linears' inputs were divided by.")
    sparse = any("routed" in r.metrics for r in records)
    kept = _kept(
        head=bool(heads),
        embedding=bool(embeddings),
        scaled=scaled,
        tower=bool(tower),
        sparse=sparse,
    )
    text.append(f"{', '.join(kept[:-1]).capitalize()} and {kept[-1]} keep the source's values.")
    return " ".join(text)


def _starved(records: Sequence[ModuleRecord]) -> list[str]:
    """How many experts few tokens came to, if any."""
    routed = [r for r in records if "routed" in r.metrics and r.name.endswith(".gate_proj")]
    few = [r for r in routed if "few" in r.metrics]
    if not few:
        return []
    return [
        f"Of {len(routed)} experts {len(few)} had fewer than {few[0].metrics['few']} calibration"
        " tokens, and were solved on all other tokens as well, with a small weight."
    ]


def _grid(recipe: Recipe, linears: Sequence[ModuleRecord]) -> str:
    """The grid of the linears: `to 4 bits, groups of 128, asymmetric`."""
    if recipe.block_types:
        by_cost = f"chosen by measured cost for {recipe.grid}"
        types = by_cost if recipe.types_by_cost else recipe.gguf_type
        return f"on the block types of llama.cpp, {types}"
    size = recipe.quant_config().group_size
    groups = "one scale an output channel" if size == -1 else f"groups of {size}"
    symmetry = "symmetric" if recipe.symmetric else "asymmetric"
    counts = sorted(Counter(r.bits for r in linears).items())
    if len(counts) > 1:
        spread = ", ".join(f"{n} to {bits}" for bits, n in counts)
        cost = f", chosen by measured cost for {recipe.grid}" if recipe.by_cost else ""
        symmetry += " below 8 bits" if not recipe.symmetric and counts[-1][0] == 8 else ""
        return f"to mixed widths ({spread} bits){cost}, {groups}, {symmetry}"
    return f"to {recipe.bits if not linears else linears[0].bits} bits, {groups}, {symmetry}"


def _tower(linears: Sequence[ModuleRecord]) -> str:
    """The grids of the vision tower: `to 8 bits, groups of 32, symmetric`."""
    blocks = Counter(r.type for r in linears if r.type)
    affine = Counter(r.bits for r in linears if not r.type)
    said = [f"{count} on {kind}" for kind, count in blocks.items()]
    said += [f"{count} to {bits} bits, groups of 32, symmetric" for bits, count in affine.items()]
    return " and ".join(said) if len(said) > 1 else said[0].partition(" ")[2]


_TOWER = ["vision tower", "projector"]


def _kept(*, head: bool, embedding: bool, scaled: bool, tower: bool, sparse: bool) -> list[str]:
    """The parts of the model that keep the source's values.

    head, embedding, tower: these are quantized; the output head may share the embedding's matrix.
    scaled: the norms of the layers took a scale.
    sparse: the layers have experts.
    """
    kept = ["other tensors of vision tower and projector"] if tower else _TOWER
    kept = [*kept, *([] if embedding else ["embeddings"]), *(["routers"] if sparse else [])]
    kept += ["last norm" if scaled else "norms"]
    return kept if head or embedding else [*kept, "output head"]


# -- figures -------------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    """A figure as a person reads it: 0, 32, 98.8, 1.3e-06, not a number, infinite."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


def table_rows(checks: Iterable[Check]) -> list[tuple[str, ...]]:
    """The parity table, for the terminal.

    Columns: format, level, what, figure, gate, compared, status.
    """
    return [
        (
            c.format,
            c.level,
            c.name,
            f"{figure(c.value)} {c.unit}".strip(),
            f"≤ {figure(c.gate)}" if c.gate is not None else "",
            f"{c.compared:,}" if c.compared is not None else "",
            c.status,
        )
        for c in checks
    ]


def layer_errors(records: Sequence[ModuleRecord]) -> list[dict]:
    """One entry for each layer: its linears with their relative error and a bar's width in percent.

    The error is that of the outputs on the calibration samples, or of the weights themselves where
    nothing was calibrated.
    """
    errors = {r.name: _error(r) for r in records}
    worst = max((e for e in errors.values() if math.isfinite(e)), default=0.0) or 1.0
    layers: dict[int, list[dict]] = {}
    for r in records:
        entry = {
            "name": ".".join(r.name.split(".")[-2:]),
            "error": errors[r.name],
            "width": 100 * errors[r.name] / worst if math.isfinite(errors[r.name]) else 100,
            "fallback": bool(r.metrics.get("fallback")),
        }
        layers.setdefault(r.layer, []).append(entry)
    named = {VISION: "tower"}
    return [{"index": named.get(i, i), "linears": linears} for i, linears in layers.items()]


def _error(record: ModuleRecord) -> float:
    """The error of a linear. NaN where the manifest has no number, as for one that was infinite."""
    metrics = record.metrics
    value = metrics.get("relative_error", metrics.get("weight_error", 0.0))
    return float(value) if isinstance(value, (int, float)) else math.nan


# -- the run and its files -----------------------------------------------------------------------


def _timing(artifact: Artifact) -> str:
    """What the quantizer took, in words; empty where the file does not say, as others' may not."""
    try:
        t = json.loads((artifact.path / TIMING).read_text("utf-8"))
        taken = (f"{phase} {float(seconds):.1f} s" for phase, seconds in t["seconds"].items())
        phases = ", ".join(taken)
        memory = f"peak memory {t['peak_host_bytes'] / 1e9:.2f} GB"
        if t["peak_device_bytes"]:
            memory += f", on the GPU {t['peak_device_bytes'] / 1e9:.2f} GB"
        speed = f"{t['tokens_per_second']:.0f} tokens/s through a layer"
        return f"quantizer: {phases}; {speed}; {memory}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _public_yaml(recipe: Recipe) -> str:
    """The recipe without the folders of whoever ran it."""
    public = {
        k: Path(v).name
        for k in ("model", "calibration", "image_root", "verify_data", "out")
        if (v := getattr(recipe, k))
    }
    return recipe.model_copy(update=public).to_yaml()


def markdown(text: object) -> str:
    """Text of a file or a user as text of the card: no tag, cell, link or code of its own."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("`", "'")
    return re.sub(r"([\\|*\[\]])", r"\\\1", line)
