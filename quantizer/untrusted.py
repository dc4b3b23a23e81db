"""What every reader does with files that somebody else wrote: JSON with limits, and names that must stay in their folder.

Nothing here trusts a count, a name or a link: docs/security.md lists the attacks and the tests that show them refused.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from vlmq_export.errors import CheckpointError, VlmqError, one_line

MAX_JSON = 100 * 2**20  # bytes: the safetensors format's own cap on its header, far above any config or index


def read_json(path: Path, *, error: type[VlmqError] = CheckpointError, limit: int = MAX_JSON) -> dict:
    """The JSON object in a file. Raises `error` for anything else: one line that names the file."""
    try:
        with path.open("rb") as f:
            raw = f.read(limit + 1)
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror or e})") from None
    if len(raw) > limit:
        raise error(f"{path}: over {limit} bytes, which is no file of this kind")
    return parse_object(raw, str(path), error=error)


def parse_object(raw: bytes, where: str, *, error: type[VlmqError] = CheckpointError) -> dict:
    """A JSON object in UTF-8 without a byte-order mark, no key twice, whatever the depth of what is in it."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:  # bad UTF-8, bad JSON, a number of 5000 digits, a key twice
        raise error(f"{where}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise error(f"{where}: a JSON object is expected, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """Readers differ in which of two equal keys they keep, so that a file with both is two files."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"key {twice!r} appears twice")
    return value


def contained(folder: Path, name: object) -> Path:
    """`folder / name` for a relative name that stays inside, links followed. Raises ValueError that says why not.

    A link may lead anywhere in the folder itself, and from a snapshot of the Hugging Face cache to the blobs of the
    same repository, where its files really lie. Any other target is refused: a downloaded folder could otherwise have
    files of whoever runs us copied into an export.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise ValueError(f"{name!r} is no file name")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name} is outside the folder")
    root = folder.resolve()
    try:
        fits = all(len(os.fsencode(part)) <= 255 for part in PurePosixPath(name).parts) and len(name) < 4096
        target = (root / name).resolve() if fits else root.parent
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, a lone surrogate
        raise ValueError(f"{name} cannot be resolved ({e})") from None
    if not fits:
        raise ValueError(f"{name[:80]}… is too long for a file name")
    inside = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        inside.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in inside):
        raise ValueError(f"{name} is a link to a file outside the folder; copy the file if you trust it")
    return folder / name


@contextmanager
def third_party(what: str, error: type[VlmqError] = CheckpointError, keep: tuple[type[Exception], ...] = ()):
    """Libraries raise whatever they like on a damaged file; the user gets one line: `what`, and the library's reason.

    Running out of memory is no fault of the file and comes through, as does what is in `keep`.
    """
    try:
        yield
    except (VlmqError, MemoryError, *keep):
        raise
    except Exception as e:
        if type(e).__name__ == "OutOfMemoryError":  # torch's
            raise
        root: BaseException = e  # lazy imports hide the reason behind errors of their own
        while isinstance(e, ImportError) and root.__cause__ is not None:
            root = root.__cause__
        raise error(f"{what} ({type(root).__name__}: {one_line(root)[:300]})") from e
    except BaseException as e:
        if type(e).__name__ != "PanicException":  # what a Rust library raises where it should have returned an error
            raise
        raise error(f"{what} ({one_line(e)[:300]})") from e
