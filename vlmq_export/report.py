"""What a person reads afterwards: report.html and the model card, both from the same facts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from vlmq_export import __version__, figures
from vlmq_export.errors import one_line
from vlmq_export.formats.base import Check
from vlmq_export.formats.gguf.imatrix import IMATRIX
from vlmq_export.quantizer.artifact import OUTER, TIMING, Artifact, ModuleRecord, write_atomic
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.recipe import Recipe

RUN_WITH = {
    "gptq": 'AutoModelForImageTextToText.from_pretrained("gptq", device_map="auto")  # transformers + optimum + gptqmodel',
    "onnx": "vision.onnx → embedding.onnx → text.onnx in ONNX Runtime, in that order",
    "gguf": "llama-mtmd-cli -m gguf/{text} --mmproj gguf/{mmproj} --image photo.png -p 'What is shown?'",
}


def write(out: Path, recipe: Recipe, artifact: Artifact, result) -> None:
    """report.html and README.md in `out`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmq_export"), autoescape=jinja2.select_autoescape(["html", "html.j2"]),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"figure": figure, "mib": lambda n: f"{n / 2**20:,.1f} MiB", "md": markdown}
    facts = {
        "name": artifact.manifest.name,
        "version": __version__,
        "recipe": recipe,
        "yaml": _public_yaml(recipe),
        "manifest": artifact.manifest,
        "contents": contents(artifact.manifest.modules, recipe),
        "layers": layer_errors(artifact.manifest.modules),
        "errors": figures.error_charts(artifact.manifest.modules),
        "low_importance": figures.low_importance_charts(artifact.manifest.modules),
        "low_ratio": figures.low_importance_ratio(artifact.manifest.modules),
        "compared": any("nearest_error" in r.metrics for r in artifact.manifest.modules),
        "ramp": ", ".join(f"rgb{colour}" for colour in figures.RAMP),
        "maps": figures.importance_maps(artifact.manifest.modules, artifact.manifest.calibration.get("pictured")),
        "calibrated": any("relative_error" in r.metrics for r in artifact.manifest.modules),
        "result": result,
        "timing": _timing(artifact),
        "parity": result.parity,
        "sizes": {f.value: _size(out / f.value) for f in recipe.format},
        "plans": result.plan.formats,
        "run_with": {f.value: _run_with(f.value, out) for f in recipe.format},
    }
    for template, target in (("report.html.j2", "report.html"), ("card.md.j2", "README.md")):
        text = environment.get_template(template).render(facts)
        write_atomic(out / target, lambda t, text=text: t.write_text(text, "utf-8"))


def contents(records: Sequence[ModuleRecord], recipe: Recipe) -> str:
    """What of the model is quantized and how, and what its other tensors hold: a few sentences of the card."""
    heads = [r for r in records if r.name.endswith("lm_head")]
    embeddings = [r for r in records if r.layer == OUTER]
    if recipe.block_types:
        chosen = f"chosen by measured cost for {recipe.grid}" if recipe.target_bpw else recipe.gguf_type
        grid = f"on the block types of llama.cpp, {chosen}"
    else:
        groups = "one scale an output channel" if recipe.group_size == -1 else f"groups of {recipe.group_size}"
        grid = f"to {recipe.bits} bits, {groups}, {'symmetric' if recipe.symmetric else 'asymmetric'}"
    count = len(records) - len(heads) - len(embeddings)
    text = [f"{count} linears of the language backbone are quantized by `{recipe.method}` {grid}."]
    if heads:
        text.append(f"So is the output head, {'on its type' if recipe.block_types else f'to {recipe.head_bits} bits'}.")
    if embeddings:
        text.append("The embedding is rounded to nearest on its type.")
    if recipe.rotate != "off":
        return " ".join([*text, "All other tensors but those of the vision tower are rotated (docs/methods.md)."])
    scaled = METHODS[recipe.method].scaling
    if scaled:
        text.append("The norms of its layers carry what the linears' inputs were divided by.")
    kept = ["vision tower", "projector", *([] if embeddings else ["embeddings"]), "last norm" if scaled else "norms"]
    kept += [] if heads or embeddings else ["output head"]
    return " ".join([*text, f"{', '.join(kept[:-1]).capitalize()} and {kept[-1]} keep the source's values."])


def _timing(artifact: Artifact) -> str:
    """What the quantizer took, or nothing where that is not known; the file may be another's."""
    try:
        t = json.loads((artifact.path / TIMING).read_text("utf-8"))
        phases = ", ".join(f"{phase} {float(seconds):.1f} s" for phase, seconds in t["seconds"].items())
        memory = f"peak memory {t['peak_host_bytes'] / 1e9:.2f} GB"
        if t["peak_device_bytes"]:
            memory += f", on the GPU {t['peak_device_bytes'] / 1e9:.2f} GB"
        return f"quantizer: {phases}; {t['tokens_per_second']:.0f} tokens/s through a layer; {memory}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def markdown(text: object) -> str:
    """Text of a file or a user as text of the card: no tag, cell, link or code of its own."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("`", "'")
    return re.sub(r"([\\|*\[\]])", r"\\\1", line)


def figure(value: float | None) -> str:
    """A figure as a person reads it: 0, 32, 98.8, 1.3e-06."""
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


def table_rows(checks: Iterable[Check]) -> list[tuple[str, ...]]:
    """format, level, what, figure, gate, compared, status: the parity table, for terminal and pages."""
    return [
        (c.format, c.level, c.name, f"{figure(c.value)} {c.unit}".strip(), f"≤ {figure(c.gate)}" if c.gate is not None else "",
         f"{c.compared:,}" if c.compared is not None else "", c.status)
        for c in checks
    ]  # fmt: skip


def layer_errors(records: list[ModuleRecord]) -> list[dict]:
    """One entry a decoder layer: its linears with their relative error and its bar's width in per cent.

    The error of outputs on the calibration samples; of the weights themselves where nothing was calibrated.
    """
    errors = {r.name: float(r.metrics.get("relative_error", r.metrics.get("weight_error", 0.0))) for r in records}
    worst = max(errors.values(), default=0.0) or 1.0
    layers: dict[int, list[dict]] = {}
    for r in records:
        entry = {
            "name": ".".join(r.name.split(".")[-2:]),
            "error": errors[r.name],
            "width": 100 * errors[r.name] / worst,
        }
        layers.setdefault(r.layer, []).append(entry | {"fallback": bool(r.metrics.get("fallback"))})
    return [{"index": index, "linears": linears} for index, linears in layers.items()]


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _public_yaml(recipe: Recipe) -> str:
    """The recipe without the folders of whoever ran it."""
    public = {
        k: Path(v).name
        for k in ("model", "calibration", "image_root", "verify_data", "out")
        if (v := getattr(recipe, k))
    }
    return recipe.model_copy(update=public).to_yaml()


def _run_with(name: str, out: Path) -> str:
    if name != "gguf":
        return RUN_WITH[name]
    models = [p.name for p in (out / "gguf").glob("*.gguf") if p.name != IMATRIX]
    files = sorted(models, key=lambda name: (name.startswith("mmproj"), name))
    text, mmproj = (files[0], files[-1]) if files else ("model.gguf", "mmproj.gguf")
    return RUN_WITH[name].format(text=text, mmproj=mmproj)
