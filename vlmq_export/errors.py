"""The kinds of error that a user can meet.

Every message is one line that says what is wrong, where, and what to do.
"""

from __future__ import annotations

_LONGEST = 2000  # characters: messages quote files, and a file may hold anything


def one_line(text: object) -> str:
    """`text` as one line of limited length that cannot drive a terminal.

    Messages quote names and libraries, and so what stands in files of others.
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


class VlmqError(Exception):
    """Something failed; the command ends with exit code 1."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(VlmqError):
    """An option, recipe key or combination that cannot work; exit code 2."""

    exit_code = 2


class CheckpointError(VlmqError):
    """The source model folder is incomplete, damaged or of a kind we do not support."""


class CalibrationError(VlmqError):
    """A calibration or held-out file, or an image that it names, cannot be used."""


class ArtifactError(VlmqError):
    """The artifact folder is incomplete, damaged, or belongs to another run."""


class FormatError(VlmqError):
    """An exported file cannot be written or read."""


class BenchmarkError(VlmqError):
    """The data of a benchmark cannot be had or used."""


class MissingRuntime(VlmqError):
    """A runtime that a check needs is not installed."""


class Interrupted(VlmqError):
    """Stopped by a signal, after what was whole was written; `--resume` continues.

    The exit code is 75, or 130 after Ctrl-C.
    """

    exit_code = 75


PARITY_FAILED = 3  # exit code where files were written but a parity gate failed
NOT_PROVEN = 4  # exit code where no gate failed, but not all that proves the files could run
CTRL_C = 130  # exit code of a command that was stopped from the keyboard, as shells have it

EXIT_CODES = {
    0: "fine",
    VlmqError.exit_code: "failed",
    UsageError.exit_code: "the command line or the recipe asks for what cannot be",
    PARITY_FAILED: "a parity gate failed; the files are kept and marked unverified",
    NOT_PROVEN: "written, but not proven: a runtime, or memory for it, is missing",
    Interrupted.exit_code: "stopped by SIGTERM, or out of memory; --resume continues",
    CTRL_C: "stopped by Ctrl-C; --resume continues",
}
