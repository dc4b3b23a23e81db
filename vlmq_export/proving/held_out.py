"""The held-out rows that the parity checks use."""

from __future__ import annotations

from pathlib import Path

from vlmq_export import bundled
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.quantizer.samples.rows import Row, read_rows, refuse_unreadable


def held_out(path: Path | None, image_root: Path | None) -> list[Row]:
    """As many rows as the checks use, from `path` or the bundled file.

    Raises CalibrationError for one of them that the checks could not use.
    """
    path = path or bundled.HELDOUT
    settings = CheckSettings()
    rows = read_rows(path, image_root)[: max(settings.images, settings.questions)]
    refuse_unreadable(path, rows)
    return rows
