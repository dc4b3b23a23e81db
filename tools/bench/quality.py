"""One table: KL to full precision and exact match of each method on each grid, ours and GPTQModel's.

    python -m tools.bench.quality --out docs/quality            # everything; a cache a cell in --cache
    python -m tools.bench.quality --quick                       # 64 samples, 64 rows, two grids

Held-out rows are scored by one piece of code (scoring.py), whatever wrote the weights. GPTQModel gets the same model,
samples, grid, damping and column order as our `gptq` (its group-aware order; per channel plain activation order, which is
the same thing when there is one group).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tools.bench.scoring import Scorer, load_model
from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.quantizer.calibration import Preprocessor, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.quantize import quantize
from vlmq_export.reference import Weights

GRIDS = {"W4 g128": (4, 128), "W3": (3, -1), "W3 g128": (3, 128), "W2 g128": (2, 128), "W2": (2, -1)}
OURS = ("rtn", "gptq", "gptaq", "vlmq", "vlmq-l2", "vlmq-gptq")
PEERS = ("GPTQModel GPTQ", "GPTQModel GPTAQ")
err = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """One quantized model: what made it, on which calibration set."""

    method: str
    grid: str
    calibration: str
    samples: int
    seed: int = 0

    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def ours(cell: Cell, folder: Path):
    bits, group = GRIDS[cell.grid]
    checkpoint = Checkpoint(REFERENCE_VLM)
    preprocessor = Preprocessor(REFERENCE_VLM)
    samples = [preprocessor.sample(r) for r in read_rows(Path(cell.calibration))[: cell.samples]]
    config = QuantConfig(method=cell.method, bits=bits, group_size=group, seed=cell.seed)
    quantize(checkpoint, samples, config, folder, name="reference-vlm", calibration={}, device="cpu")
    return Weights(folder).items()


def peer(cell: Cell, folder: Path):
    bits, group = GRIDS[cell.grid]
    request = {
        "model": str(REFERENCE_VLM), "out": str(folder.resolve()), "rows": str(Path(cell.calibration).resolve()), "samples": cell.samples, "bits": bits,
        "group_size": group, "sym": False, "desc_act": group == -1, "act_group_aware": group != -1, "gptaq": cell.method.endswith("GPTAQ"),
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("gptqmodel_quantize.py")
    done = subprocess.run(
        [sys.executable, str(script), str((folder / "request.json").resolve())],
        capture_output=True, text=True, check=False, cwd=folder,  # it leaves a folder of logs where it runs
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{cell.method} at {cell.grid} failed: {done.stderr.strip().splitlines()[-1]}")
    written = GptqFolder(folder)
    return ((name, written.array(name)) for name in written.weight_names())


def run_cell(cell: Cell, scorer: Scorer, cache: Path) -> dict:
    done = cache / f"{cell.key()}-{len(scorer.rows)}.json"
    if done.is_file():
        return json.loads(done.read_text())
    folder = cache / f"{cell.key()}-{os.getpid()}"
    start, cpu = time.perf_counter(), os.times()
    weights = (peer if cell.method in PEERS else ours)(cell, folder)
    now = os.times()
    spent = sum(now[i] - cpu[i] for i in (0, 2))  # user seconds, this process and its children
    result = {**asdict(cell), "wall": time.perf_counter() - start, "user": spent}
    result |= asdict(scorer.score(load_model(REFERENCE_VLM, weights)))
    result["calibration"] = Path(cell.calibration).name
    done.write_text(json.dumps(result, indent=1))
    return result


def table(cells: list[dict], field: str, digits: str) -> str:
    """Markdown, a row a method and a column a grid: mean over the calibration sets, ± half their range."""
    grids = [g for g in GRIDS if any(c["grid"] == g for c in cells)]
    lines = ["| | " + " | ".join(grids) + " |", "|---" * (1 + len(grids)) + "|"]
    for method in (*OURS, *PEERS):
        row = []
        for grid in grids:
            values = [c[field] for c in cells if c["method"] == method and c["grid"] == grid]
            text = f"{statistics.fmean(values):{digits}}" if values else ""
            row.append(text + (f" ± {(max(values) - min(values)) / 2:{digits}}" if len(values) > 1 else ""))
        if any(row):
            lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path | None, typer.Option(help="Writes OUT.md (the table) and OUT.json (every cell).")] = None,
    cache: Annotated[Path, typer.Option(help="One JSON a cell; a cell found there is not run again.")] = Path(
        "out/quality"
    ),
    calibration: Annotated[list[Path] | None, typer.Option(help="Calibration sets; default: the bundled one.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join((*OURS, *PEERS)),
    grids: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(GRIDS),
    samples: int = 512,
    rows: int = 512,
    quick: bool = False,
) -> None:
    """Run what is not in the cache, then print the table."""
    logging.disable(logging.WARNING)
    if quick:
        samples, rows, grids = 64, 64, "W4 g128,W2 g128"
    cache.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(REFERENCE_VLM, load_model(REFERENCE_VLM, _source_weights()), read_rows(HELDOUT)[:rows])
    results = []
    for path in calibration or [CALIBRATION]:
        for grid in grids.split(","):
            for method in methods.split(","):
                cell = Cell(method, grid, str(path), samples)
                results.append(run_cell(cell, scorer, cache))
                r = results[-1]
                err.print(
                    f"{method} {grid} {path.stem}: KL {r['kl']:.5f}, exact {r['exact']:.3f}, {r['user']:.0f} s",
                    highlight=False,
                )
    text = f"KL to full precision at answer tokens\n\n{table(results, 'kl', '.1e')}\n"
    text += f"Exact match (full precision: {scorer.baseline.exact:.3f})\n\n{table(results, 'exact', '.3f')}"
    if out:
        out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(text)
    print(text)


def _source_weights():
    checkpoint = Checkpoint(REFERENCE_VLM)
    return ((name, checkpoint.tensor(name).float().numpy()) for name in checkpoint.tensors)


if __name__ == "__main__":
    typer.run(main)
