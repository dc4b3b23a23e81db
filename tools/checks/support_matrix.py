"""docs/support.md: which family runs in which runtime, and at which bits.

    python -m tools.checks.support_matrix --out docs/support     # all families and grids
    python -m tools.checks.support_matrix --family gemma3        # one; the page keeps the others

Each model has random weights and its family's published configuration, scaled down. A cell is a
family, a grid and a format. It comes from a run of the pipeline behind `vlmq-export MODEL --format
…`: quantized by vlmq, written, read back, and run in the real runtime. Block types are for GGUF
alone. Every finished run has a file in --cache, and is not repeated.
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

from tools.reference_vlm.tiny_checkpoints import make_tiny
from tools.reference_vlm.tiny_families import ARCHES
from vlmq_export.bundled import HELDOUT
from vlmq_export.errors import VlmqError
from vlmq_export.formats import NAMES
from vlmq_export.formats.proof.checks import Check
from vlmq_export.pipeline import dry_run, run
from vlmq_export.proving.parity import Parity
from vlmq_export.recipes.recipe import Recipe

SHARED = {
    "W2 g128": {"bits": 2, "group_size": 128},
    "W2": {"bits": 2, "group_size": -1},
    "W3 g128": {"bits": 3, "group_size": 128},
    "W4 g128": {"bits": 4, "group_size": 128},
    "W4 g32": {"bits": 4, "group_size": 32},
    "W8 g128": {"bits": 8, "group_size": 128},
}
GRIDS = SHARED | {name: {"gguf_type": name} for name in ("Q4_K_M", "Q2_K")}
RUNTIMES = {
    "gptq": "GPTQ: transformers + gptqmodel",
    "compressed-tensors": "compressed-tensors: transformers",
    "onnx": "ONNX: ONNX Runtime",
    "gguf": "GGUF: llama.cpp",
}
# The check of each format whose figure is shown; its name begins like this.
LOGITS = {
    "gptq": "logits, transformers",
    "compressed-tensors": "logits, transformers",
    "onnx": "logits at accuracy_level 0",
    "gguf": "float32 twin, image prompts",
}
OUT = Path("docs/support")
CACHE = Path(tempfile.gettempdir()) / "support-matrix"
_MARK = "<!-- tables: python -m tools.checks.support_matrix -->"
err = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """What happened with one family, grid and format."""

    family: str  # one of ARCHES
    grid: str  # a key of GRIDS
    format: str
    status: str  # verified | refused | failed
    weights: int = 0  # read back bit for bit
    logits: float | None = None  # relative error in the check that LOGITS names
    detail: str = ""  # why it is refused or failed

    def text(self) -> str:
        """The entry of the table."""
        if self.status == "verified":
            return f"{self.logits:.1e}"
        return f"{self.status}: {self.detail}"


def formats_of(grid: str) -> list[str]:
    """The formats that can hold a grid."""
    return list(NAMES) if grid in SHARED else ["gguf"]


def run_family(model: Path, family: str, grid: str, folder: Path, rows: Path) -> list[Cell]:
    """The cells of one family and grid, from one run of all formats that do not refuse."""
    wanted = formats_of(grid)
    recipe = Recipe(
        model=str(model),
        format=wanted,
        samples=8,
        seq_len=986,
        verify_data=rows,
        image_root=HELDOUT.parent,
        out=folder,
        **GRIDS[grid],
    )
    try:
        plans = dry_run(recipe).formats
    except VlmqError as e:
        return [Cell(family, grid, f, "refused", detail=str(e)) for f in wanted]
    refused = {name: plan.refusals for name, plan in plans.items() if plan.refusals}
    cells = [
        Cell(family, grid, name, "refused", detail="; ".join(why)) for name, why in refused.items()
    ]
    formats = [f for f in wanted if f not in refused]
    if not formats:
        return cells
    try:
        parity = run(recipe.model_copy(update={"format": formats})).parity
    except VlmqError as e:
        return [*cells, *(Cell(family, grid, f, "failed", detail=str(e)) for f in formats)]
    assert parity is not None
    return [*cells, *(_cell(family, grid, f, parity) for f in formats)]


def _cell(family: str, grid: str, name: str, parity: Parity) -> Cell:
    """The cell of one format from the checks of a run."""
    checks = [c for c in parity.checks if c.format == name]
    bad = [c for c in checks if c.status in ("failed", "not run")]
    weights = max((c.compared or 0 for c in checks if c.level == "L1"), default=0)
    logits = next((c.value for c in checks if c.name.startswith(LOGITS[name])), None)
    if bad or logits is None:
        why = "; ".join(map(_described, bad)) or "no logits compared"
        return Cell(family, grid, name, "failed", weights, logits, why)
    return Cell(family, grid, name, "verified", weights, logits)


def _described(check: Check) -> str:
    """One line about a check that failed or was not run."""
    why = f": {check.detail}"
    if check.value is not None and check.gate is not None:
        why = f" ({check.value:.2g} over {check.gate:.2g})"
    return f"{check.level} {check.name} {check.status}{why}"


def table(cells: list[Cell]) -> str:
    """Markdown: a table for each runtime, with a row for each family and a column for each grid."""
    lines = []
    for name, runtime in RUNTIMES.items():
        grids = [g for g in GRIDS if name in formats_of(g)]
        head = "| family | " + " | ".join(grids) + " |"
        lines += [f"### {runtime}", "", head, "|---" * (len(grids) + 1) + "|"]
        for family in dict.fromkeys(c.family for c in cells):
            found = {c.grid: c.text() for c in cells if (c.family, c.format) == (family, name)}
            entries = " | ".join(found.get(g, "not run") for g in grids)
            lines.append(f"| {family} | {entries} |")
        lines.append("")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Base of the .json and .md files")] = OUT,
    cache: Annotated[Path, typer.Option(help="Finished runs")] = CACHE,
    family: Annotated[list[str] | None, typer.Option(help="Only these")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="Only these")] = None,
) -> None:
    """Run what is not in the cache and write the page's tables."""
    logging.getLogger("vlmq_export").setLevel(logging.ERROR)
    cache.mkdir(parents=True, exist_ok=True)
    rows = cache / "rows.json"
    rows.write_text(json.dumps(json.loads(HELDOUT.read_text("utf-8"))[:8]), "utf-8")
    asked = family or list(ARCHES)
    stored = out.with_suffix(".json")
    cells = [Cell(**c) for c in json.loads(stored.read_text("utf-8"))] if stored.is_file() else []
    cells = [c for c in cells if c.family not in asked]
    for name in asked:
        for label in grid or list(GRIDS):
            done = cache / f"{name}-{label.replace(' ', '-')}.json"
            if not done.is_file():
                with tempfile.TemporaryDirectory() as scratch:
                    model = make_tiny(Path(scratch) / name, name, layers=4, depth=4)
                    found = run_family(model, name, label, Path(scratch) / "out", rows)
                done.write_text(json.dumps([asdict(c) for c in found]), "utf-8")
            cells += [Cell(**c) for c in json.loads(done.read_text("utf-8"))]
            err.print(
                f"{name} {label}: "
                + "  ".join(f"{c.format} {c.text()}" for c in cells[-len(formats_of(label)) :])
            )
    data = json.dumps([asdict(c) for c in cells], indent=1) + "\n"
    stored.write_text(data, "utf-8")
    page = out.with_suffix(".md")
    text = page.read_text("utf-8").split(_MARK)[0] if page.is_file() else ""
    page.write_text(f"{text}{_MARK}\n\n{table(cells)}", "utf-8")


if __name__ == "__main__":
    typer.run(main)
