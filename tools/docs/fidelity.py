"""What README's flags cost the reference VLMs: the figures of its table.

    OMP_NUM_THREADS=1 python -m tools.docs.fidelity [--reference smolvlm] [--samples 128]

Each row of flags is quantized by the default method as the command would do it, and scored on
held-out rows from its decoded weights (`tools/bench/scoring.py`): KL divergence to the source at
answer tokens, in thousandths of a nat, and agreement of the most probable token. Rows of one set of
integers are quantized once.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tools.bench.quality import REFERENCES
from tools.bench.scoring import Scorer, load_model, source_weights
from tools.docs.sizes import FLAGS
from vlmq_export import Recipe
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.locate import open_source


def figures(folder: Path, samples: int, rows: int) -> dict[str, tuple[float, float]]:
    """Flags → KL and agreement of one reference."""
    preprocessor = Preprocessor(folder)
    calibration = [preprocessor.sample(row) for row in read_rows(CALIBRATION)[:samples]]
    full = load_model(folder, source_weights(folder))
    scorer = Scorer(folder, full, read_rows(HELDOUT)[:rows])
    known: dict[str, tuple[float, float]] = {}
    found = {}
    for flags, given in FLAGS.items():
        source = open_source(str(folder))
        recipe = Recipe(model=str(folder), **given)
        recipe = source.recipe_for(recipe, CalibrationRows(recipe))
        config = source.plan(recipe).model.config
        key = repr(asdict(config))
        if key not in known:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "artifact"
                quantize(Checkpoint(folder), calibration, config, out, name="model", calibration={})
                score = scorer.score(load_model(folder, Weights(out).items()))
                known[key] = score.kl, score.agreement
        found[flags] = known[key]
        print(f"{flags}: {1e3 * found[flags][0]:.2g}, {found[flags][1]:.3f}", flush=True)
    return found


def main(
    reference: Annotated[str, typer.Option(help=f"Of {', '.join(REFERENCES)}.")] = "qwen2_5_vl",
    samples: int = 128,
    rows: int = 128,
) -> None:
    """Print KL in thousandths, and agreement, of each row of flags."""
    figures(REFERENCES[reference], samples, rows)


if __name__ == "__main__":
    typer.run(main)
