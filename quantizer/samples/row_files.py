"""Files of rows → the rows as their layout has them: JSON, JSON lines, and tables."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.samples.tables import is_table, table_rows

MAX_ROWS_BYTES = 2 * 2**30  # of a file; the 665 000 rows of LLaVA take half
# The first bytes of zip, gzip, bzip2, xz, zstd, rar and 7z.
_ARCHIVES = (
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"(\xb5/\xfd",
    b"Rar!",
    b"7z\xbc\xaf",
)


def refuse_other_files(path: Path) -> None:
    """Raises CalibrationError for what is no file of rows. The message says what to do with it."""
    if path.is_dir() and not is_table(path):
        raise CalibrationError(
            f"{path}: a folder; give the .json, .jsonl or .parquet file in it, or a folder that"
            " Dataset.save_to_disk wrote"
        )
    if not path.is_dir() and not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    if sum(p.stat().st_size for p in files) > MAX_ROWS_BYTES:
        raise CalibrationError(
            f"{path}: over {MAX_ROWS_BYTES} bytes; draw some thousand rows from it"
        )
    if path.is_dir():
        return
    with path.open("rb") as f:
        head = f.read(262)
    if head.startswith(_ARCHIVES) or head[257:] == b"ustar":
        raise CalibrationError(
            f"{path}: an archive; unpack it and give the .json or .jsonl file in it"
        )


def raw_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(place in the file, row as JSON) for every row.

    The rows of a table may hold bytes. For a line that is no JSON, a ValueError takes the place of
    the row. Raises CalibrationError where a whole file is no JSON list, and no table.
    """
    if is_table(path):
        yield from table_rows(path, MAX_ROWS_BYTES)
        return
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    except (ValueError, RecursionError) as e:
        raise CalibrationError(
            f"{path}: not JSON ({e}); a file of one object a line must end in .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise CalibrationError(
            f"{path}: a JSON list of rows is expected, got {type(rows).__name__}"
        )
    yield from ((f"row {i}", row) for i, row in enumerate(rows))


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    """`raw_rows` of JSON lines. Empty lines are left out."""
    with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            mark = codecs.BOM_UTF8 if number == 1 else b""
            if line := line.removeprefix(mark).strip():
                try:
                    yield f"line {number}", json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as e:
                    yield f"line {number}", ValueError(f"not JSON ({e})")
