"""The output folder: whose it is, that one process writes it, and that what has its name in it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vlmq_export.errors import FormatError, UsageError
from vlmq_export.quantizer.artifact import sync
from vlmq_export.recipe import RECIPE_FILE, Recipe, load_recipe

LOCK = ".lock"
_FREE = ("out", "max_memory")  # keys that change no byte of what is written


def refuse_output(out: Path, model: Path, recipe: Recipe, *, overwrite: bool, resume: bool) -> None:
    """An existing folder is continued or replaced only if asked, and only if an earlier run of ours wrote it."""
    if out.resolve() == model.resolve() or model.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"--out {out} holds the model itself; choose another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; choose another name")
    if not out.is_dir() or not any(p for p in out.iterdir() if p.name != LOCK and not _is_leftover(p)):
        return  # nothing there, or what a run left that was killed before it wrote anything
    if not (out / RECIPE_FILE).is_file():
        raise UsageError(f"--out {out} holds files that vlmq-export did not write; choose another folder")
    if not overwrite and not resume:
        raise UsageError(f"--out {out} exists; --resume continues it, --overwrite replaces it")
    if resume:
        _same_recipe(recipe, out)


@contextmanager
def claimed(out: Path, *, overwrite: bool):
    """The output folder with this process its only writer; emptied first if it is to be replaced."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"--out {out} is being written by another process") from None
    except OSError as e:
        raise UsageError(f"--out {out} cannot be written ({e.strerror})") from None
    try:
        # The recipe, which says whose it is, last.
        for path in sorted(out.iterdir(), key=lambda p: p.name == RECIPE_FILE):
            if path.name != LOCK and (overwrite or _is_leftover(path)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        lock.release()


def _is_leftover(path: Path) -> bool:
    """Whether a killed process left it: what it had not renamed yet."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _same_recipe(recipe: Recipe, out: Path) -> None:
    """Resuming under another recipe would mix two runs in one folder."""
    before = load_recipe(out / RECIPE_FILE, {}).model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    differ = [f"{k} was {before[k]}, now {now[k]}" for k in now if k not in _FREE and before[k] != now[k]]
    if differ:
        raise UsageError(f"--resume {out}: the recipe differs ({'; '.join(differ)}); use --overwrite or another --out")


def publish(target: Path, write: Callable[[Path], object]) -> object:
    """Call write(temporary sibling folder) and rename it to `target` when whole."""
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
        raise FormatError(f"{target}: cannot be written ({e.strerror}); free space or choose another --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
