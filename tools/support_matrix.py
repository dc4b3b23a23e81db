"""docs/support.md: which family runs in which runtime at which bits, every cell from a run of the command's own pipeline.

    python -m tools.support_matrix --out docs/support            # all families and grids; a cache a run in --cache

Each model has random weights and its family's published configuration, scaled down. A cell is a run of
`vlmq-export MODEL --format …`: quantized by vlmq, written, read back and run in the real runtime.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tools.reference_vlm.families import make_tiny
from vlmq_export import pipeline
from vlmq_export.bundled import HELDOUT
from vlmq_export.errors import VlmqError
from vlmq_export.formats.base import Check
from vlmq_export.parity import Parity
from vlmq_export.quantizer.families import FAMILIES
from vlmq_export.recipe import FormatName, Recipe

GRIDS = {"W2 g128": (2, 128), "W2": (2, -1), "W3 g128": (3, 128), "W4 g128": (4, 128), "W4 g32": (4, 32), "W8 g128": (8, 128)}  # fmt: skip
RUNTIMES = {
    "gptq": "GPTQ: transformers + gptqmodel",
    "onnx": "ONNX: ONNX Runtime",
    "gguf": "GGUF: llama.cpp",
}
LOGITS = {"gptq": "logits, transformers", "onnx": "logits at accuracy_level 0", "gguf": "float32 twin, image prompts"}
CACHE = Path(tempfile.gettempdir()) / "support-matrix"
err = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """One family, grid and format: what happened."""

    family: str
    grid: str
    format: str
    status: str  # verified | refused | failed
    weights: int = 0  # read back bit for bit
    logits: float | None = None  # relative error of the gate that LOGITS names
    detail: str = ""

    def text(self) -> str:
        if self.status == "verified":
            return f"{self.logits:.1e}"
        return f"{self.status}: {self.detail}"


def run_family(model: Path, family: str, grid: str, folder: Path, rows: Path) -> list[Cell]:
    """All formats of one family and grid in one run, those that refuse aside."""
    bits, group = GRIDS[grid]
    recipe = Recipe(
        model=str(model), format=list(FormatName), bits=bits, group_size=group, samples=8, seq_len=986,
        verify_data=rows, image_root=HELDOUT.parent, out=folder,
    )  # fmt: skip
    plans = pipeline.dry_run(recipe).formats
    refused = {name: plan.refusals for name, plan in plans.items() if plan.refusals}
    cells = [Cell(family, grid, name, "refused", detail="; ".join(why)) for name, why in refused.items()]
    formats = [f for f in FormatName if f.value not in refused]
    try:
        parity = pipeline.run(recipe.model_copy(update={"format": formats})).parity
    except VlmqError as e:
        return [*cells, *(Cell(family, grid, f.value, "failed", detail=str(e)) for f in formats)]
    assert parity is not None
    return [*cells, *(_cell(family, grid, f.value, parity) for f in formats)]


def _cell(family: str, grid: str, name: str, parity: Parity) -> Cell:
    checks = [c for c in parity.checks if c.format == name]
    bad = [c for c in checks if c.status in ("failed", "not run")]
    weights = max((c.compared or 0 for c in checks if c.level == "L1"), default=0)
    logits = next((c.value for c in checks if c.name.startswith(LOGITS[name])), None)
    if bad or logits is None:
        return Cell(
            family, grid, name, "failed", weights, logits, "; ".join(map(_described, bad)) or "no logits compared"
        )
    return Cell(family, grid, name, "verified", weights, logits)


def _described(check: Check) -> str:
    figures = f" ({check.value:.2g} over {check.gate:.2g})" if None not in (check.value, check.gate) else ""
    return f"{check.level} {check.name} {check.status}{figures or f': {check.detail}'}"


def table(cells: list[Cell]) -> str:
    """Markdown: one table a runtime, families down, grids across."""
    lines = []
    for name, runtime in RUNTIMES.items():
        lines += [f"### {runtime}", "", "| family | " + " | ".join(GRIDS) + " |", "|---" * (len(GRIDS) + 1) + "|"]
        for family in FAMILIES:
            found = {c.grid: c.text() for c in cells if (c.family, c.format) == (family, name)}
            lines.append(f"| {family} | " + " | ".join(found.get(g, "not run") for g in GRIDS) + " |")
        lines.append("")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Base of the .json and .md files")] = Path("docs/support"),
    cache: Annotated[Path, typer.Option(help="Finished runs")] = CACHE,
    family: Annotated[list[str] | None, typer.Option(help="Only these")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="Only these")] = None,
) -> None:
    """Run what is not in the cache and write the page's tables."""
    logging.getLogger("vlmq_export").setLevel(logging.ERROR)
    cache.mkdir(parents=True, exist_ok=True)
    rows = cache / "rows.json"
    rows.write_text(json.dumps(json.loads(HELDOUT.read_text("utf-8"))[:8]), "utf-8")
    cells: list[Cell] = []
    for name in family or list(FAMILIES):
        for label in grid or list(GRIDS):
            done = cache / f"{name}-{label.replace(' ', '-')}.json"
            if not done.is_file():
                with tempfile.TemporaryDirectory() as scratch:
                    model = make_tiny(Path(scratch) / name, name, layers=4, depth=4)
                    found = run_family(model, name, label, Path(scratch) / "out", rows)
                done.write_text(json.dumps([asdict(c) for c in found]), "utf-8")
            cells += [Cell(**c) for c in json.loads(done.read_text("utf-8"))]
            err.print(f"{name} {label}: " + "  ".join(f"{c.format} {c.text()}" for c in cells[-3:]))
    out.with_suffix(".json").write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n", "utf-8")
    text = out.with_suffix(".md").read_text("utf-8") if out.with_suffix(".md").is_file() else f"{_MARK}\n"
    out.with_suffix(".md").write_text(text.split(_MARK)[0] + f"{_MARK}\n\n" + table(cells), "utf-8")


_MARK = "<!-- tables: python -m tools.support_matrix -->"

if __name__ == "__main__":
    typer.run(main)
