"""Quality of each method on each grid, ours and the peers', on both reference VLMs.

    python -m tools.bench.quality --calibration SET0 --calibration SET1 --out docs/quality
    python -m tools.bench.quality --quick                  # 64 samples, 64 rows, two grids
    python -m tools.bench.quality --methods ablations --grids W3,"W2 g128",W2     # ablations.py
    python -m tools.bench.quality --grids W4A4KV8 --rotate off,folded,online \\
        --methods rtn,gptq,gptaq,vlmq-paper --samples 128

All held-out rows are scored by scoring.py, whatever wrote the weights: KL to full precision at
answer tokens and at all text tokens, agreement of the most probable token, exact match over all
rows and by task.

A cell is one quantized model with its scores. Every cell has a file in --cache, and OUT.json keeps
every cell there ever was; what either of them holds is not run again. A cell is known by the name
of its calibration file, not by the contents.

Peers get the same model, samples and grid (peers.py). GPTQModel also gets the damping and the
column order of our `gptq`: its group-aware order, and per channel plain activation order, which is
the same when there is one group.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from tools.bench import ablations
from tools.bench.activations import attach
from tools.bench.peers import peers
from tools.bench.scoring import Scorer, load_model, source_weights
from tools.bench.tables import fill, table
from tools.reference_vlm import onevision, smolvlm
from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.rotation import ROTATIONS, RotatedCheckpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.samples.sample import Sample

REFERENCES = {
    "qwen2_5_vl": REFERENCE_VLM,
    "llava_onevision": onevision.FOLDER,
    "smolvlm": smolvlm.BUILT,
}
# Bits and group_size of the weights.
GRIDS = {
    "W4 g128": (4, 128),
    "W4 g64": (4, 64),
    "W3": (3, -1),
    "W3 g128": (3, 128),
    "W3 g64": (3, 64),
    "W2 g128": (2, 128),
    "W2 g64": (2, 64),
    "W2": (2, -1),
}
# The table that a user reads first: its rows, and the grids of each reference.
SUMMARY = (
    "rtn", "gptq", "gptaq", "vlmq-paper", "vlmq", "exact", "auto",
    "GPTQModel GPTQ", "llm-compressor GPTQ", "AutoRound", "AutoRound extended",
)  # fmt: skip
SUMMARY_GRIDS = {
    "qwen2_5_vl": {"W3": "first, W3", "W2 g128": "first, W2 g128"},
    "llava_onevision": {"W3": "second, W3", "W2 g128": "second, W2 g128"},
    "smolvlm": {"W3 g64": "third, W3 g64", "W2 g64": "third, W2 g64"},
}
ACTIVATIONS = "W4A4KV8"  # the grid of 4-bit weights per channel with activations.py
ACTIVATIONS_GRID = (4, -1)
OURS = tuple(METHODS)
PEERS = ("GPTQModel GPTQ", "GPTQModel GPTAQ")
FULL = "full precision"
ROTATED = ", rotated"
FIELDS = ("kl", "kl_text", "agreement", "exact", "bits", "user")
# Float32 weights by hub name, and the bits per weight of the quantized linears.
Quantized = tuple[Iterator[tuple[str, np.ndarray]], float]
err = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """What makes one quantized model, and how many rows it is scored on."""

    method: str  # of METHODS, of the ablations or of the peers, or FULL
    grid: str  # a key of GRIDS, or ACTIVATIONS
    calibration: str  # name of its file
    samples: int  # of the calibration file
    seed: int = 0
    reference: str = "qwen2_5_vl"  # a key of REFERENCES
    rows: int = 512  # held-out rows
    rotate: str = "off"  # off | folded | online

    def key(self) -> str:
        """A name for its file in the cache."""
        values = {k: v for k, v in asdict(self).items() if (k, v) != ("rotate", "off")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return (GRIDS | {ACTIVATIONS: ACTIVATIONS_GRID})[self.grid][0]

    @property
    def group(self) -> int:
        """group_size of the weights; -1 is one group per channel."""
        return (GRIDS | {ACTIVATIONS: ACTIVATIONS_GRID})[self.grid][1]

    @classmethod
    def of(cls, result: dict) -> Cell:
        """The cell of a result as the JSON files hold it."""
        return cls(**{k: v for k, v in result.items() if k in cls.__dataclass_fields__})


class Bench:
    """One reference VLM with its held-out rows and what full precision gives on them."""

    def __init__(self, reference: str, rows: int):
        self.folder = REFERENCES[reference]
        self.samples: dict[Path, list[Sample]] = {}  # of the latest calibration file
        self.preprocessor = Preprocessor(self.folder)
        full = load_model(self.folder, source_weights(self.folder))
        self.scorer = Scorer(self.folder, full, read_rows(HELDOUT)[:rows])

    def run(self, cell: Cell, calibration: Path, folder: Path) -> dict:
        """Quantize as the cell says into `folder`, and score what is on disk then.

        Returns the cell with its figures: bits per weight, wall seconds, CPU seconds as `user`, and
        the score. Raises RuntimeError for a peer that fails.
        """
        if calibration not in self.samples:
            rows = read_rows(calibration)
            self.samples = {calibration: [self.preprocessor.sample(r) for r in rows]}
        samples = self.samples[calibration][: cell.samples]
        start, cpu = time.perf_counter(), os.times()
        weights, bits = quantized(cell, self.folder, calibration, samples, folder)
        now = os.times()
        spent = sum(now[i] - cpu[i] for i in (0, 2))  # user seconds, this process and its children
        result = asdict(cell) | {"bits": bits, "wall": time.perf_counter() - start, "user": spent}
        model = load_model(self.folder if cell.rotate == "off" else folder / "source", weights)
        if cell.grid == ACTIVATIONS:
            online = None
            if cell.rotate == "online":
                online = RotatedCheckpoint(self.folder, cell.seed, online=True)
            attach(model, online)
        return result | asdict(self.scorer.score(model))


def quantized(
    cell: Cell, model: Path, calibration: Path, samples: list[Sample], folder: Path
) -> Quantized:
    """What we or a peer make of a model, written into `folder`."""
    if cell.method in peers.PEERS:
        return peers.quantize(
            cell.method, model, calibration, samples, cell.bits, cell.group, folder
        )
    return ours(cell, model, samples, folder)


def ours(cell: Cell, model: Path, samples: list[Sample], folder: Path) -> Quantized:
    """The same by us: what the artifact in `folder` decodes to."""
    config = QuantConfig(cell.method, cell.bits, cell.group, seed=cell.seed, rotate=cell.rotate)
    with ablations.listed(cell.method) as changes:
        config = replace(config, smooth=METHODS[cell.method].smooths, **changes)
        quantize(
            Checkpoint(model),
            samples,
            config,
            folder,
            name="reference-vlm",
            calibration={},
            device="cpu",
        )
    records = Artifact(folder).manifest.modules
    weights = sum(r.out_features * r.in_features for r in records)
    return Weights(folder).items(), sum(r.packed_bits() for r in records) / weights


def read_cells(file: Path) -> dict[Cell, dict]:
    """Every cell of an OUT.json, which need not be there.

    Cells from before there were two references have the defaults of `Cell`.
    """
    results = json.loads(file.read_text()) if file.is_file() else []
    return {Cell.of(r): asdict(Cell.of(r)) | r for r in results}


def write_cells(file: Path, cells: dict[Cell, dict]) -> None:
    """Write an OUT.json in a fixed order, with one cell per line so that git can merge two."""
    ordered = sorted(cells, key=lambda cell: tuple(asdict(cell).values()))
    lines = (json.dumps(cells[cell]) for cell in ordered)
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def all_tables(cells: list[dict]) -> dict[str, str]:
    """Name of a table → markdown.

        summary                     KL of ten methods on all references
        FIELD REFERENCE             our methods and the peers', without the ablations
        tasks GRID REFERENCE        exact match by task
        W4A4KV8 FIELD REFERENCE     methods by rotation
        ablations FIELD REFERENCE   ratios to each ablation's base

    Tables have the cells of a reference that were scored on most rows, and of those, on each grid,
    the ones with most samples.
    """
    tables, order = {}, (*GRIDS, FULL, *OURS, *peers.PEERS)
    summary: list[dict] = []
    for reference in REFERENCES:
        every = [c for c in cells if c["reference"] == reference]
        every = [c | {"rotate": c.get("rotate", "off")} for c in every]
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
        titles = SUMMARY_GRIDS[reference]
        chosen = [c for c in own if c["method"] in SUMMARY and c["grid"] in titles]
        summary += [c | {"grid": titles[c["grid"]]} for c in chosen]
        grids = dict.fromkeys(c["grid"] for c in own)
        own += [c | {"grid": grid} for c in every if c["method"] == FULL for grid in grids]
        for field in FIELDS:
            tables[f"{field} {reference}"] = table(own, "method", "grid", field, order)
        for grid in GRIDS:
            alike = [c for c in own if c["grid"] == grid]
            tables[f"tasks {grid} {reference}"] = table(alike, "method", "grid", "tasks", order)
    columns = [title for grids in SUMMARY_GRIDS.values() for title in grids.values()]
    tables["summary"] = table(summary, "method", "grid", "kl", (*columns, *SUMMARY))
    return tables


def _most(cells: list[dict], key: str) -> list[dict]:
    """The cells with the largest `key` on their grid."""
    largest: dict[str, int] = {}
    for c in cells:
        largest[c["grid"]] = max(c[key], largest.get(c["grid"], 0))
    return [c for c in cells if c[key] == largest[c["grid"]]]


def _row(cell: dict) -> str:
    """The title of a cell's row: its method, and whether it is rotated."""
    return cell["method"] if cell["rotate"] == "off" else cell["method"] + ROTATED


def _rows(methods: str, turns: list[str]) -> list[tuple[str, str]]:
    """Method and rotation of each row that is asked for. `ablations` stands for all of those."""
    rows = []
    # A name may have a comma in it, which a space follows.
    for name in re.split(",(?! )", methods):
        for each in ablations.names() if name == "ablations" else [name]:
            plain = each.removesuffix(ROTATED)
            rows += [(plain, turn) for turn in (turns if plain == each else ["folded"])]
    return rows


def main(
    out: Annotated[
        Path | None,
        typer.Option(help="Adds the cells to OUT.json and renews the tables that OUT.md asks for."),
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="One JSON a cell; a cell found there is not run again.")
    ] = Path("out/quality"),
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Calibration sets; default: the bundled one.")
    ] = None,
    reference: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(REFERENCES)}.")
    ] = ",".join(REFERENCES),
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated; ours, `ablations`, or {', '.join(peers.PEERS)}.")
    ] = ",".join((*OURS, *PEERS)),
    grids: Annotated[
        str, typer.Option(help=f"Comma-separated; {ACTIVATIONS} rounds activations too.")
    ] = ",".join(GRIDS),
    rotate: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(ROTATIONS)}; our methods only.")
    ] = "off",
    samples: int = 512,
    rows: int = 512,
    quick: bool = False,
) -> None:
    """Run what neither cache nor OUT.json has, then print the tables."""
    logging.disable(logging.WARNING)
    if quick:
        samples, rows, grids = 64, 64, "W4 g128,W2 g128"
    if "online" in rotate.split(",") and grids != ACTIVATIONS:
        raise typer.BadParameter(
            f"online is for --grids {ACTIVATIONS} alone: the part that needs a runtime of its own"
        )
    cache.mkdir(parents=True, exist_ok=True)
    known = read_cells(out.with_suffix(".json")) if out else {}
    wanted: dict[Cell, dict] = {}
    failed = []
    for name in reference.split(","):
        asked = _asked(name, calibration or [CALIBRATION], grids, methods, rotate, samples, rows)
        found, complaints = _reference(name, rows, asked, known, cache)
        wanted |= found
        failed += complaints
    _finish(out, known | wanted if out else wanted)
    raise typer.Exit(1 if failed else 0)


def _finish(out: Path | None, cells: dict[Cell, dict]) -> None:
    """Write OUT.json, fill OUT.md where it is there, and print the tables that are not empty."""
    tables = all_tables(list(cells.values()))
    if out:
        write_cells(out.with_suffix(".json"), cells)
        if out.with_suffix(".md").is_file():
            fill(out.with_suffix(".md"), tables)
    for title, text in tables.items():
        if text.count("\n") > 1:
            print(f"{title}\n\n{text}\n")


def _asked(
    reference: str,
    calibration: list[Path],
    grids: str,
    methods: str,
    rotate: str,
    samples: int,
    rows: int,
) -> Iterator[tuple[Cell, Path]]:
    """Every cell that is asked for on one reference, with its calibration file."""
    turned = _rows(methods, rotate.split(","))
    for path, grid, (method, turn) in product(calibration, grids.split(","), turned):
        cell = Cell(method, grid, path.name, samples, reference=reference, rows=rows, rotate=turn)
        ablation = ablations.ABLATIONS.get(method)
        if cell.group == -1 and ablation is not None and ablation.grouped:
            continue
        yield cell, path


def _reference(
    name: str,
    rows: int,
    asked: Iterable[tuple[Cell, Path]],
    known: dict[Cell, dict],
    cache: Path,
) -> tuple[dict[Cell, dict], list[str]]:
    """The results of all cells of one reference, and a line for each that failed.

    What neither `known` nor the cache has is run. The reference is loaded only for that.
    """
    bench: Bench | None = None
    found, failed = {}, []
    for cell, path in asked:
        done = cache / f"{cell.key()}.json"
        if cell not in known and not done.is_file():
            bench = bench or _bench(name, rows, cache)
            try:
                done.write_text(json.dumps(_run(bench, cell, path, cache), indent=1) + "\n")
            except RuntimeError as e:
                failed.append(f"{cell.method} at {cell.grid} on {name}: {e}")
                err.print(failed[-1], highlight=False, markup=False)
                continue
        found[cell] = known.get(cell) or json.loads(done.read_text())
        _tell(found[cell])
    full = _full(name, rows)
    if (done := cache / f"{full.key()}.json").is_file():
        found[full] = json.loads(done.read_text())
    return found, failed


def _full(reference: str, rows: int) -> Cell:
    """The cell of a reference in full precision."""
    return Cell(FULL, "", "", 0, reference=reference, rows=rows)


def _bench(reference: str, rows: int, cache: Path) -> Bench:
    """A reference ready to score with. Its full-precision cell is put into the cache."""
    bench = Bench(reference, rows)
    cell, own = _full(reference, rows), bench.scorer.baseline
    told = asdict(cell) | {"exact": own.exact, "tasks": own.tasks}
    (cache / f"{cell.key()}.json").write_text(json.dumps(told, indent=1) + "\n")
    return bench


def _run(bench: Bench, cell: Cell, calibration: Path, cache: Path) -> dict:
    """`Bench.run` in a folder that is removed afterwards."""
    folder = cache / f"{cell.key()}-{os.getpid()}"
    try:
        return bench.run(cell, calibration, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(r: dict) -> None:
    """Print one result on stderr."""
    name = f"{r['reference']} {r['method']} {r['grid']} {r.get('rotate', 'off')} {r['calibration']}"
    seconds = r.get("user", float("nan"))
    figures = f"KL {r['kl']:.1e}, exact {r['exact']:.3f}, {seconds:.0f} s"
    err.print(f"{name}: {figures}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
