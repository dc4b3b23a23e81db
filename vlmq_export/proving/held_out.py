"""The held-out rows that the parity checks use."""

from __future__ import annotations

import logging
from pathlib import Path

from vlmq_export import bundled
from vlmq_export.errors import CalibrationError
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.quantizer.samples.rows import Row, read_rows, readable, usable_rows
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.calibration import CalibrationRows

log = logging.getLogger("vlmq_export")


def held_out(data: CalibrationRows) -> list[Row]:
    """As many rows as the checks use.

    They come from `--verify-data`. Without it they are the rows of the user's own calibration file
    that calibration does not take, those with images. Where none are left, and where the user has
    no file, they are the bundled ones. Raises CalibrationError for one of them that the checks
    could not use.
    """
    recipe = data.recipe
    if recipe.verify_data is not None:
        bad = recipe.skip_bad_rows
        rows, _ = usable_rows(recipe.verify_data, recipe.image_root, bad)
        return _usable(recipe.verify_data, rows, bad)
    if recipe.calibration is not None:
        if left := [row for row in data.left if row.images]:
            rows = _usable(data.path, left, recipe.skip_bad_rows)
            log.info(
                "held out for the checks: %d rows of %s that calibration does not take",
                len(rows),
                data.path.name,
            )
            return rows
        log.warning(
            "calibration leaves no row of %s with an image, and so the checks use the bundled drawn"
            " images; give --verify-data, or --samples below %d",
            data.path.name,
            len(data.rows),
        )
    return _bundled()


def held_out_again(
    recipe: Recipe, verify_data: Path | None, image_root: Path | None, calibration: str | None
) -> list[Row]:
    """The held-out rows of an earlier run, from the recipe in its folder, to verify it again.

    `verify_data` and `image_root` are what the user gives this time. A root that the recipe has
    belongs to the recipe's own files, and not to another file that is given now. `calibration` is
    the SHA-256 of the file that the run calibrated on, where there was one. A calibration file that
    is not there any more, or has changed, does not keep a folder from being verified.
    """
    if verify_data is not None:
        before = recipe.verify_data
        same = before is not None and before.resolve() == verify_data.resolve()
        root = image_root or (recipe.image_root if same else None)
        rows, _ = usable_rows(verify_data, root, recipe.skip_bad_rows)
        return _usable(verify_data, rows, recipe.skip_bad_rows)
    data = CalibrationRows(
        recipe.model_copy(update={"image_root": image_root or recipe.image_root})
    )
    if recipe.verify_data is not None or recipe.calibration is None or image_root is not None:
        return held_out(data)
    try:
        rows = held_out(data)
    except CalibrationError as e:
        log.warning("the checks use the bundled drawn images, because %s", e)
        return _bundled()
    if calibration is not None and data.digest != calibration:
        log.warning(
            "%s is not what it was: rows that are held out now may have been calibrated on",
            data.path.name,
        )
    return rows


def _bundled() -> list[Row]:
    return _usable(bundled.HELDOUT, read_rows(bundled.HELDOUT))


def _usable(path: Path, rows: list[Row], bad: float = 0.0) -> list[Row]:
    """As many of the rows of a file as the checks use, without those with bad images.

    Raises CalibrationError where these are more than the share `bad`.
    """
    settings = CheckSettings()
    return readable(path, rows[: max(settings.images, settings.questions)], bad)
