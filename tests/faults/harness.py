"""Runs of the pipeline in a child process with a fault at the n-th operation on the output folder.

The fault is a kill or a write that is refused. Python tells an audit hook of every file that it
opens, renames, removes or makes, before it does so. A kill in the hook leaves the folder as it is
between two operations. For a kill in the middle of a write there is RLIMIT_FSIZE, which ends the
process at a certain byte of a file. The children are forked from a server that has imported
everything, so that a run takes about a second.
"""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "shutil.copyfile",
    "shutil.rmtree",
)
# Files that hold times, or the name of the output folder.
VARIES = {"timing.json", "SHA256SUMS", "recipe.yaml", "report.html", "README.md"}


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run, and where.

    `kill` ends the process before an operation, `full` lets the operation fail with ENOSPC, and
    `cut` ends the process in the middle of a file.
    """

    kind: str = "none"  # none, kill, full or cut
    at: int = 0  # number of the operation, from 1; for `cut` the byte of a file


def run(recipe: dict, *, resume: bool = False, fault: Fault = Fault()) -> tuple[int, str, int]:
    """One run: (exit code, standard error, number of operations on the output folder).

    A negative exit code is the signal that ended the process. The number is −1 where the process
    was ended before it could tell.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    # The notes are not beside the output, because that disk may be full.
    with tempfile.TemporaryDirectory() as aside:
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
    """The child process: run the recipe with the fault, and write the number of operations."""
    import typer

    from vlmq_export import cli
    from vlmq_export.terminal import running

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
        job = functools.partial(cli._export, values, False, resume, None, False, True, 0)
        running.run(job, False, True, 0)
    except typer.Exit as e:
        code = e.exit_code
    if fault.kind != "cut":
        notes.write_text(json.dumps(done))
    sys.stderr.flush()
    os._exit(code)


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by its name. Those of files that vary are left out.

    A run that was resumed must leave the same contents as one that was never disturbed.
    """
    files = (p for p in sorted(out.rglob("*")) if p.is_file())
    return {str(p.relative_to(out)): b"" if p.name in VARIES else p.read_bytes() for p in files}
