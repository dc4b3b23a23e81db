"""What every reader does with files of others: JSON with limits, names that stay in their folder.

No count, name or link in such a file is trusted. docs/security.md lists the attacks, and the tests
that show them refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from vlmq_export.errors import CheckpointError, VlmqError, one_line

MAX_JSON = 100 * 2**20  # bytes: safetensors' own limit on a header, far above any config or index


def read_json(
    path: Path, *, error: type[VlmqError] = CheckpointError, limit: int = MAX_JSON
) -> dict:
    """The JSON object in a file of at most `limit` bytes.

    Raises `error` for anything else, with one line that names the file.
    """
    try:
        with path.open("rb") as f:
            raw = f.read(limit + 1)
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror or e})") from None
    if len(raw) > limit:
        raise error(f"{path}: over {limit} bytes, which is no file of this kind")
    return parse_object(raw, str(path), error=error)


def parse_object(raw: bytes, where: str, *, error: type[VlmqError] = CheckpointError) -> dict:
    """A JSON object in UTF-8 without a byte-order mark. `where` names it in messages.

    Raises `error` for bytes that are no such object, for a key that appears twice, and for JSON
    that is nested too deeply.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    # ValueError: bad UTF-8, bad JSON, an integer of over 4300 digits, a key twice.
    except (ValueError, RecursionError) as e:
        raise error(f"{where}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise error(f"{where}: a JSON object is expected, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """The object with these keys and values. Raises ValueError for a key that appears twice.

    Readers differ in which of two equal keys they keep, so such a file means different things to
    different readers.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"key {twice!r} appears twice")
    return value


def contained(folder: Path, name: object) -> Path:
    """`folder / name` for a relative name that stays in the folder, links followed.

    A link may lead anywhere in the folder itself. Where the folder is a snapshot in the Hugging
    Face cache, it may also lead to the blobs of the same repository, which is where the cache keeps
    the files. Any other target is refused: otherwise a downloaded folder could have files of the
    user copied into an export. Raises ValueError that says what is wrong with the name.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise ValueError(f"{name!r} is no file name")
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts:
        raise ValueError(f"{name} is outside the folder")
    root = folder.resolve()
    try:
        fits = all(len(os.fsencode(part)) <= 255 for part in parts) and len(name) < 4096
        target = (root / name).resolve() if fits else root.parent
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, a lone surrogate
        raise ValueError(f"{name} cannot be resolved ({e})") from None
    if not fits:
        raise ValueError(f"{name[:80]}… is too long for a file name")
    inside = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        inside.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in inside):
        raise ValueError(
            f"{name} is a link to a file outside the folder; copy the file if you trust it"
        )
    return folder / name


@contextmanager
def third_party(
    what: str, error: type[VlmqError] = CheckpointError, keep: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into `error`: `what`, and the reason.

    Errors of our own, those named in `keep`, and running out of memory, which is no fault of the
    file, come through unchanged.
    """
    try:
        yield
    except (VlmqError, MemoryError, *keep):
        raise
    except Exception as e:
        if type(e).__name__ == "OutOfMemoryError":  # torch's, for a GPU
            raise
        # Lazy imports raise an ImportError of their own; the reason is at the end of its causes.
        root: BaseException = e
        while isinstance(e, ImportError) and root.__cause__ is not None:
            root = root.__cause__
        raise error(f"{what} ({type(root).__name__}: {one_line(root)[:300]})") from e
    except BaseException as e:
        # Rust libraries raise PanicException, which is no Exception, where they should have
        # returned an error.
        if type(e).__name__ != "PanicException":
            raise
        raise error(f"{what} ({one_line(e)[:300]})") from e
