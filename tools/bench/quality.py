"""Quality of each method on each grid, ours and the peers', on both reference VLMs.

    python -m tools.bench.quality --calibration SET0 --calibration SET1 --out docs/quality
    python -m tools.bench.quality --quick                       # 64 samples, 64 rows, two grids
    python -m tools.bench.quality --methods ablations --grids W3,"W2 g128",W2     # ablations.py
    python -m tools.bench.quality --grids W4A4KV8 --rotate off,folded,online --methods rtn,gptq,gptaq,vlmq --samples 128

Held-out rows are scored by one piece of code (scoring.py), whatever wrote the weights: KL to full precision at answer tokens
and at all text tokens, top-1 agreement, exact match over all rows and by task. Every cell has a file in --cache, and OUT.json
keeps every cell there ever was: what either holds is not run again. Cells are known by the name of the calibration file.

Peers get the same model, samples and grid (peers.py); GPTQModel the same damping and column order as our `gptq` (its
group-aware order; per channel plain activation order, which is the same thing when there is one group).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tools.bench import ablations, peers
from tools.bench.activations import attach
from tools.bench.scoring import Scorer, load_model, source_weights
from tools.bench.tables import fill, table
from tools.reference_vlm import onevision
from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.calibration import Preprocessor, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.quantize import quantize
from vlmq_export.quantizer.rotation import ROTATIONS, RotatedCheckpoint
from vlmq_export.reference import Weights

REFERENCES = {"qwen2_5_vl": REFERENCE_VLM, "llava_onevision": onevision.FOLDER}
GRIDS = {"W4 g128": (4, 128), "W3": (3, -1), "W3 g128": (3, 128), "W2 g128": (2, 128), "W2": (2, -1)}
ACTIVATIONS = "W4A4KV8"  # 4-bit weights per channel, and activations.py
OURS = tuple(METHODS)
PEERS = ("GPTQModel GPTQ", "GPTQModel GPTAQ")
FULL = "full precision"
ROTATED = ", rotated"
FIELDS = ("kl", "kl_text", "agreement", "exact", "bits", "user")
err = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """One quantized model: what made it, of what, on which calibration set."""

    method: str
    grid: str
    calibration: str  # its file's name
    samples: int
    seed: int = 0
    reference: str = "qwen2_5_vl"
    rows: int = 512
    rotate: str = "off"  # off | folded | online

    def key(self) -> str:
        values = {k: v for k, v in asdict(self).items() if (k, v) != ("rotate", "off")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def bits(self) -> int:
        return (GRIDS | {ACTIVATIONS: (4, -1)})[self.grid][0]

    @property
    def group(self) -> int:
        return (GRIDS | {ACTIVATIONS: (4, -1)})[self.grid][1]

    @classmethod
    def of(cls, result: dict) -> Cell:
        return cls(**{k: v for k, v in result.items() if k in cls.__dataclass_fields__})


class Bench:
    """One reference, its held-out rows and full-precision figures; made only when a cell has to be run."""

    def __init__(self, reference: str, rows: int):
        self.folder, self.samples = REFERENCES[reference], {}
        self.preprocessor = Preprocessor(self.folder)
        self.scorer = Scorer(
            self.folder, load_model(self.folder, source_weights(self.folder)), read_rows(HELDOUT)[:rows]
        )

    def run(self, cell: Cell, calibration: Path, folder: Path) -> dict:
        """Quantize as the cell says and score what is on disk then."""
        if calibration not in self.samples:
            self.samples = {calibration: [self.preprocessor.sample(r) for r in read_rows(calibration)]}
        start, cpu = time.perf_counter(), os.times()
        weights, bits = quantized(cell, self.folder, calibration, self.samples[calibration][: cell.samples], folder)
        now = os.times()
        spent = sum(now[i] - cpu[i] for i in (0, 2))  # user seconds, this process and its children
        result = asdict(cell) | {"bits": bits, "wall": time.perf_counter() - start, "user": spent}
        model = load_model(self.folder if cell.rotate == "off" else folder / "source", weights)
        if cell.grid == ACTIVATIONS:
            online = RotatedCheckpoint(self.folder, cell.seed, online=True) if cell.rotate == "online" else None
            attach(model, online)
        return result | asdict(self.scorer.score(model))


def quantized(cell: Cell, model: Path, calibration: Path, samples: list, folder: Path):
    """(weights by hub name, bits per weight of the quantized linears), by us or by a peer."""
    if cell.method in peers.PEERS:
        return peers.quantize(cell.method, model, calibration, samples, cell.bits, cell.group, folder)
    return ours(cell, model, samples, folder)


def ours(cell: Cell, model: Path, samples: list, folder: Path):
    """`quantized`, by us; what the artifact in `folder` decodes to."""
    config = QuantConfig(cell.method, cell.bits, cell.group, seed=cell.seed, rotate=cell.rotate)
    with ablations.listed(cell.method) as changes:
        config = replace(config, **changes)
        quantize(Checkpoint(model), samples, config, folder, name="reference-vlm", calibration={}, device="cpu")
    records = Artifact(folder).manifest.modules
    weights = sum(r.out_features * r.in_features for r in records)
    return Weights(folder).items(), sum(r.packed_bits() for r in records) / weights


def read_cells(file: Path) -> dict[Cell, dict]:
    """Every cell of an OUT.json; those that know of no reference nor rows are of the first, on 512."""
    results = json.loads(file.read_text()) if file.is_file() else []
    return {Cell.of(r): asdict(Cell.of(r)) | r for r in results}


def write_cells(file: Path, cells: dict[Cell, dict]) -> None:
    """One cell a line, so that two people's cells merge."""
    lines = (json.dumps(cells[cell]) for cell in sorted(cells, key=lambda c: tuple(asdict(c).values())))
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def all_tables(cells: list[dict]) -> dict[str, str]:
    """NAME of a table → markdown: `FIELD REFERENCE`, `tasks GRID REFERENCE`, `W4A4KV8 FIELD REFERENCE`, and
    `ablations FIELD REFERENCE`, which has the ablations that the others leave out.

    Of each reference the cells that were scored on most rows, and of those on each grid the ones with most samples.
    """
    tables, order = {}, (*GRIDS, FULL, *OURS, *peers.PEERS)
    for reference in REFERENCES:
        every = [c | {"rotate": c.get("rotate", "off")} for c in cells if c["reference"] == reference]
        every = _most(_most(every, "rows"), "samples")
        rounding = [c for c in every if c["grid"] == ACTIVATIONS]
        for field in ("kl", "exact"):
            tables[f"{ACTIVATIONS} {field} {reference}"] = table(
                rounding, "method", "rotate", field, (*order, *ROTATIONS)
            )
        own = [c | {"method": _row(c)} for c in every if c["grid"] not in (ACTIVATIONS, "")]
        for field in ("kl", "kl_text"):
            found = ablations.ratios([c for c in own if c["method"] != FULL], field)
            tables[f"ablations {field} {reference}"] = table(found, "row", "grid", "ratio", order)
        own = [c for c in own if c["rotate"] == "off" and c["method"] not in ablations.ABLATIONS]
        grids = dict.fromkeys(c["grid"] for c in own)
        own += [c | {"grid": grid} for c in every if c["method"] == FULL for grid in grids]
        for field in FIELDS:
            tables[f"{field} {reference}"] = table(own, "method", "grid", field, order)
        for grid in GRIDS:
            alike = [c for c in own if c["grid"] == grid]
            tables[f"tasks {grid} {reference}"] = table(alike, "method", "grid", "tasks", order)
    return tables


def _most(cells: list[dict], key: str) -> list[dict]:
    """Of each grid, the cells with the largest `key`."""
    largest: dict[str, int] = {}
    for c in cells:
        largest[c["grid"]] = max(c[key], largest.get(c["grid"], 0))
    return [c for c in cells if c[key] == largest[c["grid"]]]


def _row(cell: dict) -> str:
    return cell["method"] if cell["rotate"] == "off" else cell["method"] + ROTATED


def _rows(methods: str, turns: list[str]) -> list[tuple[str, str]]:
    """(method, rotation) of each row that is asked for; `ablations`: all of those."""
    rows = []
    for name in re.split(",(?! )", methods):  # a name may have a comma, with a space after it
        for each in ablations.names() if name == "ablations" else [name]:
            plain = each.removesuffix(ROTATED)
            rows += [(plain, turn) for turn in (turns if plain == each else ["folded"])]
    return rows


def main(
    out: Annotated[
        Path | None, typer.Option(help="Adds the cells to OUT.json and renews the tables that OUT.md asks for.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="One JSON a cell; a cell found there is not run again.")] = Path(
        "out/quality"
    ),
    calibration: Annotated[list[Path] | None, typer.Option(help="Calibration sets; default: the bundled one.")] = None,
    reference: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(REFERENCES)}.")] = ",".join(REFERENCES),
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated; ours, `ablations`, or {', '.join(peers.PEERS)}.")
    ] = ",".join((*OURS, *PEERS)),
    grids: Annotated[str, typer.Option(help=f"Comma-separated; {ACTIVATIONS} rounds activations too.")] = ",".join(
        GRIDS
    ),
    rotate: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(ROTATIONS)}; our methods only.")] = "off",
    samples: int = 512,
    rows: int = 512,
    quick: bool = False,
) -> None:
    """Run what neither cache nor OUT.json has, then print the tables."""
    logging.disable(logging.WARNING)
    if quick:
        samples, rows, grids = 64, 64, "W4 g128,W2 g128"
    if "online" in rotate.split(",") and grids != ACTIVATIONS:
        raise typer.BadParameter(f"online is for --grids {ACTIVATIONS} alone: the part that needs a runtime of its own")
    cache.mkdir(parents=True, exist_ok=True)
    known = read_cells(out.with_suffix(".json")) if out else {}
    wanted, failed = {}, []
    for name in reference.split(","):
        bench = None
        for path in calibration or [CALIBRATION]:
            for grid, (method, turn) in product(grids.split(","), _rows(methods, rotate.split(","))):
                cell = Cell(method, grid, path.name, samples, reference=name, rows=rows, rotate=turn)
                if cell.group == -1 and method in ablations.ABLATIONS and ablations.ABLATIONS[method].grouped:
                    continue
                done = cache / f"{cell.key()}.json"
                if cell not in known and not done.is_file():
                    bench = bench or _bench(name, rows, cache)
                    try:
                        done.write_text(json.dumps(_run(bench, cell, path, cache), indent=1) + "\n")
                    except RuntimeError as e:
                        failed.append(f"{method} at {grid} on {name}: {e}")
                        err.print(failed[-1], highlight=False, markup=False)
                        continue
                wanted[cell] = known.get(cell) or json.loads(done.read_text())
                _tell(wanted[cell])
        full = Cell(FULL, "", "", 0, reference=name, rows=rows)
        if (done := cache / f"{full.key()}.json").is_file():
            wanted[full] = json.loads(done.read_text())
    known |= wanted
    if out:
        write_cells(out.with_suffix(".json"), known)
        if out.with_suffix(".md").is_file():
            fill(out.with_suffix(".md"), all_tables(list(known.values())))
    for title, text in all_tables(list(known.values() if out else wanted.values())).items():
        if text.count("\n") > 1:
            print(f"{title}\n\n{text}\n")
    raise typer.Exit(1 if failed else 0)


def _bench(reference: str, rows: int, cache: Path) -> Bench:
    """A reference ready to score with, and its own full-precision cell in the cache."""
    bench = Bench(reference, rows)
    cell, own = Cell(FULL, "", "", 0, reference=reference, rows=rows), bench.scorer.baseline
    told = asdict(cell) | {"exact": own.exact, "tasks": own.tasks}
    (cache / f"{cell.key()}.json").write_text(json.dumps(told, indent=1) + "\n")
    return bench


def _run(bench: Bench, cell: Cell, calibration: Path, cache: Path) -> dict:
    folder = cache / f"{cell.key()}-{os.getpid()}"
    try:
        return bench.run(cell, calibration, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(r: dict) -> None:
    err.print(
        f"{r['reference']} {r['method']} {r['grid']} {r.get('rotate', 'off')} {r['calibration']}: KL {r['kl']:.1e}, exact {r['exact']:.3f},"
        f" {r.get('user', float('nan')):.0f} s",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
