"""Run every format's checks against the reference; the result is what parity.json holds."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlmq_export import __version__, formats
from vlmq_export.errors import FormatError, Interrupted, VlmqError
from vlmq_export.formats.base import Check, CheckSettings, FormatOptions
from vlmq_export.quantizer.artifact import write_json
from vlmq_export.quantizer.untrusted import read_json, third_party
from vlmq_export.reference import Reference

log = logging.getLogger("vlmq_export")
PARITY_FILE = "parity.json"
LEVELS = ("L1", "L2", "L3")
REQUIRE = "VLMQ_REQUIRE"  # runtimes that this environment declares present: gptq,onnx,gguf
_PACKAGES = (
    "torch",
    "transformers",
    "gptqmodel",
    "optimum",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "mobius-onnx",
    "gguf",
    "xllamacpp",
)


@dataclass
class Parity:
    """What parity.json holds. `verified`: nothing failed, and in every format each level passed at least one check."""

    verified: bool
    checks: list[Check]
    reference: dict  # where the weights came from, how many, which prompts
    seconds: dict[str, float] = field(default_factory=dict)  # a format
    environment: dict = field(default_factory=dict)
    version: str = __version__

    def failures(self) -> list[Check]:
        return [c for c in self.checks if c.status == "failed"]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Parity:
        try:
            raw = read_json(path, error=FormatError)
            return cls(**(raw | {"checks": [Check(**c) for c in raw["checks"]]}))
        except (KeyError, TypeError) as e:
            raise FormatError(f"{path}: cannot be read as a parity report ({e}); run verify again") from None


def forget_places(checks: list[Check], *folders: Path | None) -> None:
    """Rows quote error messages; a report that is passed on should not say where on this machine the files were."""
    known = [f for f in (*folders, Path(tempfile.gettempdir()), Path.home()) if f is not None]
    places = {str(p) for f in known for p in (f.absolute(), f.resolve())} - {"/"}
    for c in checks:
        for place in sorted(places, key=len, reverse=True):
            c.detail, c.worst = (text.replace(f"{place}/", "").replace(place, "…") for text in (c.detail, c.worst))


def environment() -> dict:
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {"python": platform.python_version(), "machine": platform.machine(), "packages": packages}


def required_runtimes() -> set[str]:
    return {name.strip() for name in os.environ.get(REQUIRE, "").split(",") if name.strip()}


def check_formats(
    folders: dict[str, Path],
    reference: Reference,
    options: FormatOptions,
    settings: CheckSettings,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Parity:
    """Levels L1-L3 of every format in `folders`. A format whose check breaks down counts as failed, by name."""
    checks: list[Check] = []
    seconds: dict[str, float] = {}
    required = required_runtimes()
    for done, (name, folder) in enumerate(folders.items()):
        progress("verify", done, len(folders))
        if should_stop():
            raise Interrupted(f"stopped before verifying {name}; the files are written, --resume or verify proves them")
        start = time.perf_counter()
        try:
            with third_party("the check broke down", FormatError):
                rows = formats.get(name).check(folder, reference, options, settings)
        except VlmqError as e:
            log.debug("%s: %s", name, e, exc_info=e)
            rows = [Check(name, "L1", "files read back", "failed", detail=str(e))]
        if name in required:  # the environment says that this runtime is here: not running it is a failure
            for row in rows:
                if row.status == "not run" and row.detail != reference.too_large:
                    row.status, row.detail = "failed", f"not run, but {REQUIRE} declares {name} present: {row.detail}"
        checks += rows
        seconds[name] = round(time.perf_counter() - start, 1)
    progress("verify", len(folders), len(folders))
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
