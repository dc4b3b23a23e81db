"""Files of calibration and held-out rows, in either of two layouts.

    the LLaVA/ShareGPT4V list   JSON: rows with `image` and `conversations`
    chat messages               JSON or JSON lines: rows with `messages`, image paths in them or
                                beside them as `images`

A file is read before any weight is, and all its bad rows are reported at once, by row or line
number.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmq_export.errors import CalibrationError, one_line
from vlmq_export.quantizer.samples.images import LONGEST_WHY, load_image

log = logging.getLogger("vlmq_export")
MAX_ROWS_BYTES = 2 * 2**30  # of a file; the 665 000 rows of LLaVA take half
MAX_TEXT = 2**18  # characters of a row
MAX_IMAGES = 64  # of a row
LONGEST_ID = 200  # characters of a row's id or task that are kept
# The first bytes of zip, gzip, bzip2, xz, zstd, parquet, rar and 7z.
_ARCHIVES = (
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"(\xb5/\xfd",
    b"PAR1",
    b"Rar!",
    b"7z\xbc\xaf",
)
_ERRORS_SHOWN = 5
# Speakers of LLaVA's layout → roles.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Row:
    """One conversation, whichever layout it came from."""

    id: str  # the place in the file where the row has none
    # Each {"role", "content"}; the content is a list of {"type": "text", "text"} and
    # {"type": "image"}, in order.
    messages: tuple[dict, ...]
    images: tuple[Path, ...]  # one for each image part, in order
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
    _refuse_other_files(path)
    root = image_root or path.parent
    rows: list[Row] = []
    errors: list[str] = []
    for where, raw in _raw_rows(path):
        try:
            rows.append(_row(raw, root, where))
        except (ValueError, KeyError, TypeError, OSError) as e:
            why = e.args[0] if isinstance(e, ValueError) else f"malformed ({e!r})"
            errors.append(f"{where}: {one_line(why)[:LONGEST_WHY]}")
    _refuse(path, "bad rows", errors)
    if not rows:
        raise CalibrationError(f"{path}: no rows")
    if twice := len(rows) - len({row.content for row in rows}):
        log.warning(
            "%s: %d of %d rows are in the file twice; the copies count as samples of their own",
            path.name,
            twice,
            len(rows),
        )
    return rows


def refuse_unreadable(path: Path, rows: Sequence[Row]) -> None:
    """Decode every image of `rows` once, so that a bad one is known before hours of work.

    Raises CalibrationError with the number of bad images and the first few of them.
    """
    errors = []
    for image in dict.fromkeys(image for row in rows for image in row.images):
        try:
            load_image(image)
        except CalibrationError as e:
            errors.append(str(e))
    _refuse(path, "bad images", errors)


def _refuse(path: Path, what: str, errors: Sequence[str]) -> None:
    """Raises CalibrationError with the number of `errors` and the first few, if there are any."""
    if errors:
        shown = "; ".join(errors[:_ERRORS_SHOWN])
        more = f" (and {len(errors) - _ERRORS_SHOWN} more)" if len(errors) > _ERRORS_SHOWN else ""
        raise CalibrationError(f"{path}: {len(errors)} {what}: {shown}{more}")


def _refuse_other_files(path: Path) -> None:
    """Raises CalibrationError for what is no file of rows. The message says what to do with it."""
    if path.is_dir():
        raise CalibrationError(f"{path}: a folder; give the .json or .jsonl file in it")
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    if path.stat().st_size > MAX_ROWS_BYTES:
        raise CalibrationError(
            f"{path}: over {MAX_ROWS_BYTES} bytes; draw some thousand rows from it"
        )
    with path.open("rb") as f:
        head = f.read(262)
    if head.startswith(_ARCHIVES) or head[257:] == b"ustar":
        raise CalibrationError(
            f"{path}: an archive; unpack it and give the .json or .jsonl file in it"
        )


def _raw_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(place in the file, row as JSON) for every row.

    For a line that is no JSON, a ValueError takes the place of the row. Raises CalibrationError
    where a whole file is no JSON list.
    """
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
    """`_raw_rows` of JSON lines. Empty lines are left out."""
    with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            mark = codecs.BOM_UTF8 if number == 1 else b""
            if line := line.removeprefix(mark).strip():
                try:
                    yield f"line {number}", json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as e:
                    yield f"line {number}", ValueError(f"not JSON ({e})")


def _row(raw: object, root: Path, where: str) -> Row:
    """The row of either layout. Raises ValueError, KeyError, TypeError or OSError."""
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    images = raw.get("image", raw.get("images", []))
    images = [images] if isinstance(images, str) else list(images or [])
    if "conversations" in raw:
        messages = [_llava_turn(turn) for turn in raw["conversations"]]
    elif "messages" in raw:
        messages = [_chat_turn(turn, images) for turn in raw["messages"]]
    else:
        raise ValueError("neither conversations nor messages")
    if not messages:
        raise ValueError("no turns")
    _check_text(messages)
    placeholders = sum(p["type"] == "image" for m in messages for p in m["content"])
    if placeholders != len(images):
        raise ValueError(f"{placeholders} image placeholders for {len(images)} images")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"{len(images)} images; {MAX_IMAGES} in one row is the limit")
    paths = [_image_path(i, root) for i in images]
    identity, task = (one_line(raw.get(key, "") or "")[:LONGEST_ID] for key in ("id", "task"))
    return Row(identity or where, tuple(messages), tuple(paths), task, where)


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


def _llava_turn(turn: dict) -> dict:
    """A turn of LLaVA's layout as a message. Raises ValueError for an unknown speaker."""
    if turn["from"] not in _SPEAKERS:
        raise ValueError(f"unknown speaker {turn['from']!r}")
    # The newline of `<image>\n` belongs to the layout and not to the prompt.
    parts = re.split(r"(<image>\n?|\n<image>$)", turn["value"])
    content = [
        {"type": "image"} if "<image>" in p else {"type": "text", "text": p} for p in parts if p
    ]
    return {"role": _SPEAKERS[turn["from"]], "content": content}


def _chat_turn(turn: dict, images: list[str]) -> dict:
    """A turn of the chat layout as a message. Image paths in it are added to `images`.

    Raises ValueError for an unknown role, and for content that is neither text nor image.
    """
    role, content = turn["role"], turn["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"unknown role {role!r}")
    if isinstance(content, str):
        return {"role": role, "content": [{"type": "text", "text": content}]}
    parts = []
    for p in content:
        if p["type"] == "text":
            parts.append({"type": "text", "text": p["text"]})
        elif p["type"] == "image":
            if path := p.get("image") or p.get("path"):
                images.append(path)
            parts.append({"type": "image"})
        else:
            raise ValueError(f"content of type {p['type']!r} is not supported")
    return {"role": role, "content": parts}


def _image_path(name: object, root: Path) -> Path:
    """A file under `root`. Raises ValueError for a URL, a file elsewhere, and a missing file.

    The name alone must stay under `root`. Links are followed wherever they lead, because whoever
    made the folder put them there (docs/security.md).
    """
    if not isinstance(name, str):
        raise ValueError(f"image {name!r} is no path")
    if "://" in name or name.startswith(("data:", "file:", "//", "\\\\")):
        raise ValueError(f"image {name} is a URL or a network path; download it and give a path")
    # Path.resolve would follow the links.
    path = Path(os.path.abspath(root / name))  # noqa: PTH100
    top = Path(os.path.abspath(root))  # noqa: PTH100
    if not path.is_relative_to(top) or not path.is_file():
        raise ValueError(f"image {name} is not under {root}; set --image-root")
    return path
