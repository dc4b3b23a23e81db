"""The rows of the calibration file, and the samples that are made of them."""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vlmq_export import bundled
from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import Interrupted, UsageError
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.loading import Limit, Loaded, read_samples
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row, usable_rows
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.storage.whole_files import sha256_file
from vlmq_export.recipes.recipe import Recipe

log = logging.getLogger("vlmq_export")


@dataclass(frozen=True)
class Calibration:
    """The samples of a run, and what the manifest says of them."""

    samples: list[Sample] = field(default_factory=list)
    described: dict = field(default_factory=dict)


class CalibrationRows:
    """The rows of the file that a recipe calibrates on: those that it takes, and the others.

    The file is read once, when the first of its rows is asked for. Raises CalibrationError then
    where it cannot be used.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.path: Path = recipe.calibration or bundled.CALIBRATION

    @cached_property
    def rows(self) -> list[Row]:
        """All rows of the file that can be used."""
        return self._read[0]

    @cached_property
    def _read(self) -> tuple[list[Row], int]:
        """The rows, and the number of bad ones. The image root is that of the user's own file."""
        own = self.recipe.calibration is not None
        root = self.recipe.image_root if own else None
        return usable_rows(self.path, root, self.recipe.skip_bad_rows)

    @property
    def skipped(self) -> int:
        """The number of bad rows of the file, which were left out."""
        return self._read[1]

    @cached_property
    def taken(self) -> list[Row]:
        """The rows that calibration takes; none for a method that needs no samples."""
        if not METHODS[self.recipe.method].calibrated:
            return []
        return draw(self.rows, self.recipe.samples, self.recipe.seed)

    @cached_property
    def left(self) -> list[Row]:
        """The rows that calibration does not take, without copies of those that it takes."""
        taken = {row.content for row in self.taken}
        return [row for row in self.rows if row.content not in taken]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file; of a saved dataset, that of the names and hashes of its files."""
        if self.path.is_file():
            return sha256_file(self.path)
        files = sorted(p for p in self.path.rglob("*") if p.is_file())
        lines = [f"{sha256_file(p)}  {p.relative_to(self.path).as_posix()}\n" for p in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def limit_of(recipe: Recipe, checkpoint: Checkpoint) -> Limit:
    """How long the recipe's samples of a model may be."""
    seq_len = recipe.seq_len or checkpoint.architecture.family.seq_len
    return Limit(seq_len, scale=recipe.long_images == "scale")


def calibration_samples(
    data: CalibrationRows,
    checkpoint: Checkpoint,
    callbacks: Callbacks,
    preprocessor: Preprocessor | None = None,  # the model's, where it was read already
) -> Calibration:
    """Raises CalibrationError for rows that cannot be used, UsageError where none are left."""
    recipe, path = data.recipe, data.path
    if not METHODS[recipe.method].calibrated:
        return Calibration([], {"rows": 0})
    if recipe.calibration is None and recipe.model is not None:
        log.warning(
            "calibrating on the bundled drawn images;"
            " give --calibration for images like those of your users"
        )
    rows = data.taken
    if len(rows) < recipe.samples:
        log.warning(
            "calibrating on %d rows: %s has no more, and --samples asks for %d",
            len(rows),
            path.name,
            recipe.samples,
        )

    def progress(done: int) -> None:
        callbacks.progress("read samples", done, len(rows))
        if callbacks.should_stop():
            raise Interrupted("stopped while reading samples; nothing was written")

    limit = limit_of(recipe, checkpoint)
    loaded = read_samples(
        checkpoint.path,
        rows,
        limit,
        bad=recipe.skip_bad_rows,
        preprocessor=preprocessor,
        progress=progress,
    )
    _tell_lengths(loaded, limit)
    samples = loaded.samples
    if all(s.pixel_values is None for s in samples):
        log.warning("%s: no sample has an image; the model is calibrated on text alone", path.name)
    described = {
        "file": path.resolve().name,
        "sha256": data.digest,
        "rows": len(samples),
        "scaled": loaded.scaled,
        "dropped": loaded.dropped,
        "skipped": data.skipped + loaded.skipped,
        "seq_len": limit.seq_len,
        "tokens": sum(len(s.input_ids) for s in samples),
        "vision_tokens": sum(int(s.vision.sum()) for s in samples),
    }
    return Calibration(samples, described)


def _tell_lengths(loaded: Loaded, limit: Limit) -> None:
    """Log how many samples were scaled or dropped. Raises UsageError where none are left."""
    kept, scaled, dropped = len(loaded.samples), loaded.scaled, loaded.dropped
    cut = f"--seq-len {limit.seq_len} would cut the vision tokens of"
    do = f"--seq-len {loaded.longest} keeps them whole"
    if not limit.scale:
        do += ", and --long-images scale makes their images smaller"
    if not kept:
        raise UsageError(f"{cut} all {dropped} samples; {do}")
    if scaled:
        log.info(
            "%d of %d samples have images that were scaled down to --seq-len %d",
            scaled,
            kept,
            limit.seq_len,
        )
    if dropped:
        log.warning("%s %d of %d samples, dropped; %s", cut, dropped, kept + dropped, do)


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` rows drawn by `seed`, in the file's order; all of them if there are no more."""
    if count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]
