"""Who may write the output folder, and how.

A folder that an earlier run wrote is continued or replaced only if asked. One process at a time
writes it. What appears in it under its own name is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from vlmq_export.errors import FormatError, UsageError
from vlmq_export.quantizer.artifact.manifest import MANIFEST
from vlmq_export.quantizer.storage.whole_files import sync
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import RECIPE_FILE, load_recipe, placed

LOCK = ".lock"
_FREE = ("out", "max_memory")  # keys of a recipe that change no byte of what is written
T = TypeVar("T")


def refuse_output(out: Path, model: Path, recipe: Recipe, *, overwrite: bool, resume: bool) -> None:
    """Raises UsageError for a folder that this run may not write.

    A folder that is there is continued or replaced only if asked, and only if an earlier run of
    ours wrote it. A folder with nothing in it but what a killed run left is as good as none.
    """
    if out.resolve() == model.resolve() or model.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"--out {out} holds the model itself; choose another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; choose another name")
    if resume and not out.exists():
        raise UsageError(
            f"--resume: there is no {out}; give the --out of the run that was stopped,"
            " or leave --resume out to begin one"
        )
    there = out.iterdir() if out.is_dir() else ()
    if all(p.name == LOCK or _is_leftover(p) for p in there):
        return
    if not (out / RECIPE_FILE).is_file():
        raise UsageError(
            f"--out {out} holds files that vlmq-export did not write; choose another folder"
        )
    if not overwrite and not resume:
        raise UsageError(
            f"--out {out} exists; --resume continues it, --overwrite replaces it{_reused(out)}"
        )
    if resume:
        _same_recipe(recipe, out)


@contextmanager
def claimed(out: Path, *, overwrite: bool) -> Iterator[None]:
    """Make this process the only writer of the folder, which is emptied first to be replaced.

    Raises UsageError where another process writes it, or where it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"--out {out} is being written by another process") from None
    except OSError as e:
        raise UsageError(f"--out {out} cannot be written ({e.strerror})") from None
    try:
        # The recipe says that the folder is ours, so that it goes last.
        for path in sorted(out.iterdir(), key=lambda p: p.name == RECIPE_FILE):
            if path.name != LOCK and (overwrite or _is_leftover(path)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        lock.release()


def _is_leftover(path: Path) -> bool:
    """Whether a killed process left it: a file or folder that it had not renamed yet."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _same_recipe(recipe: Recipe, out: Path) -> None:
    """Raises UsageError for another recipe: resuming would mix two runs in one folder."""
    before = placed(load_recipe(out / RECIPE_FILE, {})).model_dump(mode="json")
    now = placed(recipe).model_dump(mode="json")
    differ = [
        f"{k} was {before[k]}, now {now[k]}" for k in now if k not in _FREE and before[k] != now[k]
    ]
    if differ:
        raise UsageError(
            f"--resume {out}: the recipe differs ({'; '.join(differ)});"
            f" use --overwrite or another --out{_reused(out)}"
        )


def _reused(out: Path) -> str:
    """How a whole artifact in the folder is written in another format, for the end of an error."""
    artifact = out / "artifact"
    if not (artifact / MANIFEST).is_file():
        return ""
    return (
        f". To write another format without quantizing again, give {artifact} as MODEL,"
        " and another --out"
    )


def publish(target: Path, write: Callable[[Path], T]) -> T:
    """Call write(temporary sibling folder), and rename the folder to `target` when it is whole.

    Returns what `write` returned. Raises FormatError where the files cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        value = write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        temporary.rename(target)
        return value
    except OSError as e:
        raise FormatError(
            f"{target}: cannot be written ({e.strerror}); free space or choose another --out"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
