"""Runs every format's checks against the reference. parity.json holds the result."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlmq_export._version import __version__
from vlmq_export.callbacks import Progress
from vlmq_export.errors import FormatError, Interrupted, VlmqError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.proof.checks import Check, CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.storage.untrusted import read_json, third_party
from vlmq_export.quantizer.storage.whole_files import write_json

log = logging.getLogger("vlmq_export")
PARITY_FILE = "parity.json"
LEVELS = ("L1", "L2", "L3")
REQUIRE = "VLMQ_REQUIRE"  # runtimes that this environment declares present: gptq,gguf
_PACKAGES = (  # whose versions parity.json records
    "torch",
    "transformers",
    "gptqmodel",
    "optimum",
    "compressed-tensors",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "mobius-onnx",
    "gguf",
    "xllamacpp",
)


@dataclass
class Parity:
    """What parity.json holds."""

    verified: bool  # nothing failed, and in every format each level passed at least one check
    checks: list[Check]
    reference: dict  # where the weights came from, how many, and how many prompts
    seconds: dict[str, float] = field(default_factory=dict)  # format → wall time of its checks
    environment: dict = field(default_factory=dict)
    version: str = __version__

    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [c for c in self.checks if c.status == "failed"]

    def not_run(self) -> list[Check]:
        """The checks that could not run."""
        return [c for c in self.checks if c.status == "not run"]

    def reasons(self) -> list[str]:
        """Why checks could not run, each reason once."""
        return list(dict.fromkeys(f"{c.format}: {c.detail}" for c in self.not_run()))

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Parity:
        """The contents of a file that `write` wrote. Raises FormatError for any other file."""
        try:
            raw = read_json(path, error=FormatError)
            raw["checks"] = [Check(**c) for c in raw["checks"]]
            return cls(**raw)
        except (KeyError, TypeError) as e:
            raise FormatError(
                f"{path}: cannot be read as a parity report ({e}); run verify again"
            ) from None


def check_formats(
    folders: dict[str, Path],  # by the name of the format
    reference: Reference,
    options: FormatOptions,
    settings: CheckSettings,
    progress: Progress = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Parity:
    """Run the checks of levels L1 to L3 of every format in `folders`.

    A runtime with a process of its own works while the other formats are checked, and is asked for
    what it found afterwards.

    progress: is given `verify gguf: what is running`, shares of the work done, and in all.

    A format whose checks break down counts as failed, by name. Raises Interrupted between two steps
    once `should_stop()` is true.
    """
    found: dict[str, list[Check]] = {}
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        begun = _begun(folders, reference, settings, stack)
        for name in sorted(folders, key=lambda name: name in begun):

            def tell(what: str, done: int, total: int, name: str = name) -> None:
                progress(f"verify {name}: {what}", done, total)
                if should_stop():
                    raise Interrupted(
                        f"stopped while verifying {name};"
                        " the files are written, --resume or verify proves them"
                    )

            tell("reading", 0, 100)
            start = time.perf_counter()
            given = (folders[name], reference, options, replace(settings, tell=tell))
            found[name] = _checked(name, reference, partial(FORMATS[name].check, *given), begun)
            seconds[name] = round(time.perf_counter() - start, 1)
            progress(f"verify {name}: done", 100, 100)
    checks = [row for name in folders for row in found[name]]
    passed = {(c.format, c.level) for c in checks if c.status == "passed"}
    complete = all((name, level) in passed for name in folders for level in LEVELS)
    verified = complete and not any(c.status == "failed" for c in checks)
    described = {
        "weights": reference.weights.count,
        "weights_from": "source checkpoint and artifact" if reference.source else "artifact",
        "images": min(settings.images, len(reference.rows)),
        "questions": min(settings.questions, len(reference.rows)),
    }
    return Parity(verified, checks, described, seconds, environment())


def _begun(
    folders: dict[str, Path], reference: Reference, settings: CheckSettings, stack: ExitStack
) -> dict[str, Any]:
    """The runtime that is at work from now on, by its format, as long as the stack stands.

    It is one, because memory is asked for one model more. There is none where there is nothing to
    do meanwhile, or where that model would not fit. What cannot begin is left to the check, which
    says why.
    """
    begun: dict[str, Any] = {}
    for name, folder in folders.items():
        if begun or len(folders) == 1 or FORMATS[name].missing() or not reference.fits_beside:
            continue
        with suppress(VlmqError), third_party("cannot begin", FormatError):
            if (context := FORMATS[name].at_work(folder, reference, settings)) is not None:
                begun[name] = stack.enter_context(context)
    return begun


def _checked(
    name: str,
    reference: Reference,
    check: Callable[..., list[Check]],
    begun: Mapping[str, Any],
) -> list[Check]:
    """The rows of one format.

    Where the environment declares its runtime present, a check that did not run is a failure,
    unless the model is too large to run at all.
    """
    try:
        with third_party("the check broke down", FormatError):
            rows = check(begun.get(name))
    except Interrupted:
        raise
    except VlmqError as e:
        log.debug("%s: %s", name, e, exc_info=e)
        rows = [Check(name, "L1", "files read back", "failed", detail=str(e))]
    if name in required_runtimes():
        for row in rows:
            if row.status == "not run" and row.detail != reference.too_large:
                row.status = "failed"
                row.detail = f"not run, but {REQUIRE} declares {name} present: {row.detail}"
    return rows


def required_runtimes() -> set[str]:
    """The formats whose runtimes the environment declares present."""
    return {name.strip() for name in os.environ.get(REQUIRE, "").split(",") if name.strip()}


def environment() -> dict:
    """Python, the machine, and the versions of packages; None for one that is not installed."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": packages,
    }


def forget_places(checks: list[Check], *folders: Path | None) -> None:
    """Take the paths of these folders, of the home folder and of the temporary one out of the rows.

    Rows quote error messages. A report that is passed on should not say where on this machine the
    files were.
    """
    for c in checks:
        c.detail, c.worst = (without_places(text, *folders) for text in (c.detail, c.worst))


def without_places(text: str, *folders: Path | None) -> str:
    """The text without the paths of these folders, of the home folder and of the temporary one."""
    known = [f for f in (*folders, Path(tempfile.gettempdir()), Path.home()) if f is not None]
    places = {str(p) for f in known for p in (f.absolute(), f.resolve())} - {"/"}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(f"{place}/", "").replace(place, "…")
    return text
