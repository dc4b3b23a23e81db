"""The calibration samples of a run, from the file that the recipe names."""

from __future__ import annotations

import logging
import random

from vlmq_export import bundled
from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import Interrupted, UsageError
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.loading import read_samples
from vlmq_export.quantizer.samples.rows import Row, read_rows
from vlmq_export.quantizer.storage.whole_files import sha256_file
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.source import Calibration

log = logging.getLogger("vlmq_export")


def calibration_samples(
    recipe: Recipe, checkpoint: Checkpoint, callbacks: Callbacks
) -> Calibration:
    """Raises CalibrationError for rows that cannot be used, UsageError where none are left."""
    if not METHODS[recipe.method].calibrated:
        return Calibration([], {"rows": 0})
    path = recipe.calibration or bundled.CALIBRATION
    if recipe.calibration is None and recipe.model is not None:
        log.warning(
            "calibrating on the bundled drawn images;"
            " give --calibration for images like those of your users"
        )
    rows = draw(read_rows(path, recipe.image_root), recipe.samples, recipe.seed)
    seq_len = recipe.seq_len or checkpoint.architecture.family.seq_len

    def progress(done: int) -> None:
        callbacks.progress("read samples", done, len(rows))
        if callbacks.should_stop():
            raise Interrupted("stopped while reading samples; nothing was written")

    samples, dropped = read_samples(checkpoint.path, rows, seq_len, progress=progress)
    cut = f"--seq-len {seq_len} would cut"
    if not samples:
        raise UsageError(f"{cut} the vision tokens of all {len(rows)} samples; raise it")
    if dropped:
        log.warning("%d of %d samples dropped: %s their vision tokens", dropped, len(rows), cut)
    if all(s.pixel_values is None for s in samples):
        log.warning("%s: no sample has an image; the model is calibrated on text alone", path.name)
    described = {
        "file": path.name,
        "sha256": sha256_file(path),
        "rows": len(samples),
        "dropped": dropped,
        "seq_len": seq_len,
        "tokens": sum(len(s.input_ids) for s in samples),
        "vision_tokens": sum(int(s.vision.sum()) for s in samples),
    }
    return Calibration(samples, described)


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` rows drawn by `seed`, in the file's order; all of them if there are no more."""
    if count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]
