"""A --target-size whose vision tower, embedding and head are chosen too, against 8 bits for them.

    python -m tools.bench.sizes --sizes 3.5,4,5

Every package of a row has at most the row's size in MB, in one format. KL is that at the answer
tokens of held-out rows, by the weights that the artifact holds.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tools.bench.quality import REFERENCES
from tools.bench.scoring import load_model, source_weights
from tools.bench.widths import answers
from vlmq_export.api import export
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.divergence import distance_of
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe import Recipe

FIXED: dict[str, dict[str, Any]] = {
    "onnx": {"vision_bits": 8, "embedding_bits": 8},
    "gguf": {"vision_bits": 8},
}


def rows_of(
    reference: str, form: str, sizes: list[float], samples: int, rows: int
) -> Iterator[list[str]]:
    """The rows of a reference's table: size, parts, their bits, KL in thousandths."""
    folder = REFERENCES[reference]
    preprocessor = Preprocessor(folder)
    held = [preprocessor.sample(row) for row in read_rows(HELDOUT)[:rows]]
    full = answers(load_model(folder, source_weights(folder)), held)
    given = {"calibration": CALIBRATION, "samples": samples, "verify": False}
    for size in sizes:
        for parts, fixed in (("8 bits", FIXED[form]), ("chosen", {})):
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                keys: dict[str, Any] = {**given, **fixed, "target_size": size / 1e3, "out": out}
                export(Recipe(model=str(folder), format=[form], **keys))
                found = load_model(folder, Weights(out / "artifact").items())
                kl = float(distance_of(full, answers(found, held)).kl.mean())
                config = Artifact(out / "artifact").config
            outside = f"{config.vision_bits}, {config.embedding_bits or 'its type'}"
            yield [f"{size:g}", parts, outside, f"{1e3 * kl:.2g}".removeprefix("0")]


def main(
    sizes: Annotated[str, typer.Option(help="In MB, comma-separated.")],
    reference: Annotated[str, typer.Option(help=f"One of {', '.join(REFERENCES)}.")] = "qwen2_5_vl",
    form: Annotated[str, typer.Option("--format", help="onnx or gguf.")] = "onnx",
    samples: int = 128,
    rows: int = 128,
) -> None:
    """Print a reference's table, row after row."""
    logging.disable(logging.WARNING)
    head = ["MB", "tower and embedding", "their bits", "KL"]
    for line in (head, ["---"] * len(head)):
        print(f"| {' | '.join(line)} |")
    for line in rows_of(reference, form, [float(s) for s in sizes.split(",")], samples, rows):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
