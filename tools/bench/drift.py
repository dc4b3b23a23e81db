"""How far each method lets the hidden states stray from full precision, layer after layer.

    python -m tools.bench.drift --out docs/drift          # docs/drift.json and docs/drift.svg

On held-out rows: ‖x̂ − x‖/‖x‖ of every decoder layer's output, x̂ with the weights that a method left and x in full
precision, over image tokens and over text tokens. One yardstick for all methods, which the errors of single linears in a
manifest are not: those are against each method's own target, on its own inputs.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from tools.bench import quality
from tools.bench.scoring import batches, load_model, source_weights
from tools.reference_vlm.distillation import Recorder
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.quantizer.calibration import Preprocessor, Sample, read_rows
from vlmq_export.quantizer.solving import ratio

METHODS = ("rtn", "gptq", "gptaq", "vlmq", "exact", "auto")
SAMPLES = {"qwen2_5_vl": 512, "llava_onevision": 128}  # of calibration, as in docs/quality.md
TOKENS = ("image", "text")
err = Console(stderr=True)


@dataclass(frozen=True)
class Drift:
    reference: str
    method: str
    grid: str
    rows: int
    image: list[float]  # a layer each
    text: list[float]


@torch.no_grad()
def layer_outputs(model: torch.nn.Module, samples: list[Sample]) -> dict[str, list[torch.Tensor]]:
    """`image` and `text` → what leaves each decoder layer at all such tokens, [tokens, hidden]."""
    layers = model.model.language_model.layers
    recorder, found = Recorder(layers), {kind: [[] for _ in layers] for kind in TOKENS}
    for part, inputs in batches(samples):
        model(**inputs, use_cache=False)
        image = torch.stack([samples[i].vision for i in part])
        for kind, tokens in zip(TOKENS, (image, ~image)):
            for parts, output in zip(found[kind], recorder.outputs, strict=True):
                parts.append(output[tokens])
    return {kind: [torch.cat(parts) for parts in each] for kind, each in found.items()}


def drift(full: dict[str, list[torch.Tensor]], rounded: dict[str, list[torch.Tensor]]) -> dict[str, list[float]]:
    """`image` and `text` → relative error of each layer's output over all such tokens; of what `layer_outputs` gave."""
    return {kind: [ratio(y - x, x) for x, y in zip(full[kind], rounded[kind], strict=True)] for kind in TOKENS}


def draw(found: list[Drift], file: Path) -> None:
    """A row a reference, a column for image tokens and one for text tokens; the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    references = list(dict.fromkeys(d.reference for d in found))
    style = {
        "svg.hashsalt": "drift",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        size = (8, 2.6 * len(references) + 0.5)
        figure, axes = pyplot.subplots(len(references), 2, figsize=size, sharex="row", sharey="row", squeeze=False)
        for row, reference in zip(axes, references):
            mine = [d for d in found if d.reference == reference]
            for axis, kind in zip(row, TOKENS):
                for d in mine:
                    axis.plot(range(len(d.text)), getattr(d, kind), label=d.method, marker=".", linewidth=1.3)
                axis.set(yscale="log", title=f"{reference}, {mine[0].grid}: {kind} tokens", xlabel="layer")
                axis.grid(axis="y", which="both", alpha=0.25)
            row[0].set_ylabel("‖x̂ − x‖ / ‖x‖")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(METHODS), frameon=False)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="OUT.json and OUT.svg.")] = Path("out/drift"),
    reference: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(quality.REFERENCES),
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    grid: Annotated[str, typer.Option(help=f"One of {', '.join(quality.GRIDS)}.")] = "W2 g128",
    rows: int = 128,
) -> None:
    logging.disable(logging.WARNING)
    found = []
    for name in reference.split(","):
        folder = quality.REFERENCES[name]
        preprocessor = Preprocessor(folder)
        heldout = [preprocessor.sample(r) for r in read_rows(HELDOUT)[:rows]]
        full = layer_outputs(load_model(folder, source_weights(folder)), heldout)
        samples = [preprocessor.sample(r) for r in read_rows(CALIBRATION)[: SAMPLES[name]]]
        for method in methods.split(","):
            cell = quality.Cell(method, grid, CALIBRATION.name, len(samples), reference=name, rows=rows)
            with tempfile.TemporaryDirectory() as temporary:
                weights, _ = quality.quantized(cell, folder, CALIBRATION, samples, Path(temporary) / "artifact")
                rounded = layer_outputs(load_model(folder, weights), heldout)
            found.append(Drift(name, method, grid, rows, **drift(full, rounded)))
            err.print(f"{name} {method}: {found[-1].text[-1]:.2e} at the last layer's text tokens", highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(d)) for d in found)
    out.with_suffix(".json").write_text(f"[\n{lines}\n]\n")
    draw(found, out.with_suffix(".svg"))


if __name__ == "__main__":
    typer.run(main)
