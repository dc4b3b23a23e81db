"""How far each method lets the hidden states stray from full precision, layer after layer.

    python -m tools.bench.drift --out docs/drift          # docs/drift.json and docs/drift.svg

For each decoder layer and method this is ‖x̂ − x‖/‖x‖ on held-out rows, over image tokens and over
text tokens:

    x    the layer's output in full precision
    x̂   its output with the weights that the method left

It is one measure for all methods. The errors of single linears in a manifest are not, because there
each method has its own target and its own inputs.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from tools.bench import quality
from tools.bench.scoring import batches, load_model, source_weights
from tools.reference_vlm.distillation import Recorder
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.quantizer.layers.measures import ratio
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.samples.sample import Sample

METHODS = ("rtn", "gptq", "gptaq", "vlmq-paper", "exact", "auto")
SAMPLES = {"qwen2_5_vl": 512, "llava_onevision": 128}  # calibration samples, as in docs/quality.md
TOKENS = ("image", "text")
STYLE = {  # of the figure, for matplotlib
    "svg.hashsalt": "drift",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
err = Console(stderr=True)


@dataclass(frozen=True)
class Drift:
    """The errors that one method leaves on one reference VLM."""

    reference: str  # a key of quality.REFERENCES
    method: str
    grid: str  # a key of quality.GRIDS
    rows: int  # held-out rows
    image: list[float]  # of each layer's output, over image tokens
    text: list[float]  # the same over text tokens


@torch.no_grad()
def layer_outputs(model: Any, samples: list[Sample]) -> dict[str, list[torch.Tensor]]:
    """`image` and `text` → each decoder layer's output at all such tokens, [tokens, hidden]."""
    layers = model.get_decoder().layers
    recorder, found = Recorder(layers), {kind: [[] for _ in layers] for kind in TOKENS}
    for part, inputs in batches(samples):
        model(**inputs, use_cache=False)
        image = torch.stack([samples[i].vision for i in part])
        for kind, tokens in zip(TOKENS, (image, ~image)):
            for parts, output in zip(found[kind], recorder.outputs, strict=True):
                parts.append(output[tokens])
    return {kind: [torch.cat(parts) for parts in each] for kind, each in found.items()}


def drift(
    full: dict[str, list[torch.Tensor]], rounded: dict[str, list[torch.Tensor]]
) -> dict[str, list[float]]:
    """`image` and `text` → the relative error of each layer's output over all such tokens.

    Both arguments are what `layer_outputs` gives.
    """
    return {
        kind: [ratio(y - x, x) for x, y in zip(full[kind], rounded[kind], strict=True)]
        for kind in TOKENS
    }


def draw(found: list[Drift], file: Path) -> None:
    """Draw a figure: a row for each reference, a column for image tokens and one for text tokens.

    The same numbers give the same bytes.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    references = list(dict.fromkeys(d.reference for d in found))
    with matplotlib.rc_context(STYLE):
        size = (8, 2.6 * len(references) + 0.5)
        figure, axes = pyplot.subplots(
            len(references), 2, figsize=size, sharex="row", sharey="row", squeeze=False
        )
        for row, reference in zip(axes, references):
            mine = [d for d in found if d.reference == reference]
            for axis, kind in zip(row, TOKENS):
                _draw_errors(axis, mine, kind)
            row[0].set_ylabel("‖x̂ − x‖ / ‖x‖")
        lines, names = axes[0][0].get_legend_handles_labels()
        figure.legend(lines, names, loc="lower center", ncols=len(METHODS), frameon=False)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def _draw_errors(axis: Any, found: list[Drift], kind: str) -> None:
    """One reference's errors at one kind of token: a line for each method, layers from the left."""
    for d in found:
        errors = getattr(d, kind)
        axis.plot(range(len(errors)), errors, label=d.method, marker=".", linewidth=1.3)
    title = f"{found[0].reference}, {found[0].grid}: {kind} tokens"
    axis.set(yscale="log", title=title, xlabel="layer")
    axis.grid(axis="y", which="both", alpha=0.25)


def main(
    out: Annotated[Path, typer.Option(help="OUT.json and OUT.svg.")] = Path("out/drift"),
    reference: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(quality.REFERENCES),
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    grid: Annotated[str, typer.Option(help=f"One of {', '.join(quality.GRIDS)}.")] = "W2 g128",
    rows: int = 128,
) -> None:
    """Measure every method on every reference, and write the figures and the drawing."""
    logging.disable(logging.WARNING)
    found = []
    for name in reference.split(","):
        folder = quality.REFERENCES[name]
        preprocessor = Preprocessor(folder)
        heldout = [preprocessor.sample(r) for r in read_rows(HELDOUT)[:rows]]
        full = layer_outputs(load_model(folder, source_weights(folder)), heldout)
        samples = [preprocessor.sample(r) for r in read_rows(CALIBRATION)[: SAMPLES[name]]]
        for method in methods.split(","):
            cell = quality.Cell(
                method, grid, CALIBRATION.name, len(samples), reference=name, rows=rows
            )
            with tempfile.TemporaryDirectory() as temporary:
                made = Path(temporary) / "artifact"
                weights, _ = quality.quantized(cell, folder, CALIBRATION, samples, made)
                rounded = layer_outputs(load_model(folder, weights), heldout)
            found.append(Drift(name, method, grid, rows, **drift(full, rounded)))
            last = f"{found[-1].text[-1]:.2e} at the last layer's text tokens"
            err.print(f"{name} {method}: {last}", highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(d)) for d in found)
    out.with_suffix(".json").write_text(f"[\n{lines}\n]\n")
    draw(found, out.with_suffix(".svg"))


if __name__ == "__main__":
    typer.run(main)
