"""Runs of the pipeline in a child process that is killed, or refused a write, at its n-th operation on the output folder.

Python tells an audit hook of every file it opens, renames, removes and makes before it does so: a kill there leaves the
folder as it is between two operations. What happens in the middle of a write is left to RLIMIT_FSIZE, which ends the
process at a byte. The children are forked from a server that has imported everything, a second a run.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile", "shutil.rmtree")
# Times, and the folder's own name.
VARIES = {"timing.json", "SHA256SUMS", "recipe.yaml", "report.html", "README.md"}


@dataclass(frozen=True)
class Fault:
    """Nothing, or what goes wrong at which operation (`kill`, `full`) or byte of a file (`cut`)."""

    kind: str = "none"
    at: int = 0


def run(recipe: dict, *, resume: bool = False, fault: Fault = Fault()) -> tuple[int, str, int]:
    """(exit code, standard error, number of operations) of one run; a negative code is the signal that ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults_preload"])
    with tempfile.TemporaryDirectory() as aside:  # not beside the output: that disk may be full
        notes = Path(aside) / "notes"
        process = context.Process(target=_child, args=(recipe, resume, fault, notes))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{fault} hangs")
        error = notes.with_suffix(".err").read_text() if notes.with_suffix(".err").exists() else ""
        count = json.loads(notes.read_text()) if notes.exists() else -1
    return process.exitcode, error, count


def _child(recipe: dict, resume: bool, fault: Fault, notes: Path) -> None:
    import typer

    from vlmq_export import cli

    error = notes.with_suffix(".err").open("w")
    os.dup2(error.fileno(), 2)
    done, out = 0, Path(recipe["out"]).absolute()

    def hook(event: str, args: tuple) -> None:
        nonlocal done
        if event not in EVENTS or not args or not isinstance(args[0], (str, os.PathLike)):
            return
        if not Path(args[0]).is_relative_to(out):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        done += 1
        if done == fault.at and fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if done == fault.at and fault.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    sys.addaudithook(hook)
    if fault.kind == "cut":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, fault.at))
    code = 0
    try:
        values = cli.load_recipe(None, recipe)
        cli._run(lambda: cli._export(values, False, resume, False, False, True), False, True, 0)
    except typer.Exit as e:
        code = e.exit_code
    if fault.kind != "cut":
        notes.write_text(json.dumps(done))
    sys.stderr.flush()
    os._exit(code)


def contents(out: Path) -> dict[str, bytes]:
    """What of a finished run must not depend on how it came about; names of all files."""
    files = (p for p in sorted(out.rglob("*")) if p.is_file())
    return {str(p.relative_to(out)): b"" if p.name in VARIES else p.read_bytes() for p in files}
