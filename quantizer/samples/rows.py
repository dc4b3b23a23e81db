"""Files of calibration and held-out rows, in any of the layouts of `layouts.py`.

A file is read before any weight is, and all its bad rows are reported at once, by row or line
number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmq_export.errors import CalibrationError, one_line
from vlmq_export.quantizer.samples.image_refs import image_source
from vlmq_export.quantizer.samples.images import LONGEST_WHY, ImageBytes, load_image
from vlmq_export.quantizer.samples.layouts import conversation
from vlmq_export.quantizer.samples.row_files import raw_rows, refuse_other_files

log = logging.getLogger("vlmq_export")
MAX_TEXT = 2**18  # characters of a row
MAX_IMAGES = 64  # of a row
LONGEST_ID = 200  # characters of a row's id or task that are kept
_ERRORS_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One conversation, whichever layout it came from."""

    id: str  # the place in the file where the row has none
    # Each {"role", "content"}; the content is a list of {"type": "text", "text"} and
    # {"type": "image"}, in order.
    messages: tuple[dict, ...]
    # One for each image part, in order. Rows of a file have no decoded ones.
    images: tuple[Path | ImageBytes | Image.Image, ...]
    task: str = ""  # kind of question, where the file tells
    where: str = ""  # row or line number in the file

    @property
    def content(self) -> tuple:
        """What two rows with the same content have in common, whatever they are called."""
        return str(self.messages), self.images

    @property
    def answer(self) -> str:
        """Text of the last turn if it is the assistant's, or empty."""
        last = self.messages[-1]
        if last["role"] != "assistant":
            return ""
        return "".join(p.get("text", "") for p in last["content"])


def read_rows(path: Path, image_root: Path | None = None) -> list[Row]:
    """All rows of a file. Images lie under `image_root`, or under the file's folder if it is None.

    Raises CalibrationError with the number of bad rows and the first few of them.
    """
    return usable_rows(path, image_root, 0.0)[0]


def usable_rows(path: Path, image_root: Path | None, bad: float) -> tuple[list[Row], int]:
    """The good rows of a file, and the number of bad ones, which the log names.

    Raises CalibrationError where more than the share `bad` of all rows are bad.
    """
    refuse_other_files(path)
    root = image_root or (path if path.is_dir() else path.parent)
    rows: list[Row] = []
    errors: list[str] = []
    for where, raw in raw_rows(path):
        try:
            rows.append(_row(raw, root, where))
        except (ValueError, KeyError, TypeError, OSError) as e:
            why = e.args[0] if isinstance(e, ValueError) else f"malformed ({e!r})"
            errors.append(f"{where}: {one_line(why)[:LONGEST_WHY]}")
    leave_out(f"{path}:", "bad rows", errors, len(rows) + len(errors), bad)
    if not rows:
        raise CalibrationError(f"{path}: no rows")
    if twice := len(rows) - len({row.content for row in rows}):
        log.warning(
            "%s: %d of %d rows are in the file twice; the copies count as samples of their own",
            path.name,
            twice,
            len(rows),
        )
    return rows, len(errors)


def readable(path: Path, rows: Sequence[Row], bad: float = 0.0) -> list[Row]:
    """The rows whose images can be decoded, so that a bad one is known before hours of work.

    Raises CalibrationError where more than the share `bad` of the rows have one that cannot.
    """
    wrong: dict[Path | ImageBytes | Image.Image, str] = {}
    for image in dict.fromkeys(image for row in rows for image in row.images):
        try:
            load_image(image)
        except CalibrationError as e:
            wrong[image] = str(e)
    left = [row for row in rows if wrong.keys().isdisjoint(row.images)]
    errors = [
        f"{row.where}: {wrong[next(image for image in row.images if image in wrong)]}"
        for row in rows
        if not wrong.keys().isdisjoint(row.images)
    ]
    leave_out(f"{path}:", "bad images", errors, len(rows), bad)
    return left


def allowed(count: int, bad: float) -> float:
    """How many of `count` rows may be bad, for a share."""
    return round(bad * count, 9)  # 0.29 · 100 is 28.999…


def leave_out(where: str, what: str, errors: Sequence[str], count: int, bad: float) -> None:
    """Name bad ones in the log, if they are no more than the share `bad` of `count`.

    Raises CalibrationError with their number and the first few of them otherwise.
    """
    if not errors:
        return
    if len(errors) > allowed(count, bad):
        shown = "; ".join(errors[:_ERRORS_SHOWN])
        more = f" (and {len(errors) - _ERRORS_SHOWN} more)" if len(errors) > _ERRORS_SHOWN else ""
        over = f" of {count}, over --skip-bad-rows {bad:g}" if bad else ""
        raise CalibrationError(f"{where} {len(errors)} {what}{over}: {shown}{more}")
    log.warning("%s %d %s of %d are left out", where, len(errors), what, count)
    for error in errors:
        log.warning("left out: %s", error)


def _row(raw: object, root: Path, where: str) -> Row:
    """The row of any layout. Raises ValueError, KeyError, TypeError or OSError."""
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    messages, named = conversation(raw)
    if not messages:
        raise ValueError("no turns")
    _check_text(messages)
    if len(named) > MAX_IMAGES:
        raise ValueError(f"{len(named)} images; {MAX_IMAGES} in one row is the limit")
    images = [image_source(x, root, f"image {n} of {where}") for n, x in enumerate(named, start=1)]
    identity, task = (one_line(raw.get(key, "") or "")[:LONGEST_ID] for key in ("id", "task"))
    return Row(identity or where, tuple(messages), tuple(images), task, where)


def _check_text(messages: Sequence[dict]) -> None:
    """Raises ValueError for text that no tokenizer takes, for an empty turn, and for too much."""
    texts = [p["text"] for m in messages for p in m["content"] if p["type"] == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text that is no string")
    if any(0xD800 <= ord(c) < 0xE000 for text in texts if not text.isascii() for c in text):
        raise ValueError("a text with half a surrogate pair")
    for number, message in enumerate(messages, start=1):
        if not any(p["type"] == "image" or p["text"].strip() for p in message["content"]):
            raise ValueError(f"turn {number} is empty")
    if (characters := sum(map(len, texts))) > MAX_TEXT:
        raise ValueError(f"{characters} characters of text; {MAX_TEXT} is the limit")
