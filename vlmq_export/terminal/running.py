"""Running one command: errors of one line, and exit codes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from vlmq_export.errors import CTRL_C, Interrupted, VlmqError, one_line
from vlmq_export.terminal.log import err, set_up_logging


def speaks() -> bool:
    """Whether this process prints: of those that torchrun started, one does."""
    return os.environ.get("RANK", "0") == "0"


def run(job: Callable[[], int], as_json: bool, quiet: bool, verbose: int) -> None:
    """Call `job` and end with its exit code.

    What a user can meet becomes one line and an exit code of its own.
    """
    set_up_logging(verbose, quiet or not speaks())
    try:
        code = _in_memory(job)
    except (VlmqError, OSError) as e:
        code = getattr(e, "exit_code", VlmqError.exit_code)
        known = isinstance(e, VlmqError)
        message = one_line(e if known else f"{e.filename or 'a file'}: {e.strerror or e}")
        if e.__cause__ is not None:
            logging.getLogger("vlmq_export").debug("where it came from", exc_info=e.__cause__)
        print_error(message)
        if as_json:
            print_json({"error": message, "exit_code": code})
    except KeyboardInterrupt:
        err.print("stopped; --resume continues", highlight=False)
        code = CTRL_C
    raise typer.Exit(code)


def print_error(message: str) -> None:
    """One line on stderr."""
    err.print(f"error: {message}", style="bold red", highlight=False, markup=False, soft_wrap=True)


def _in_memory(job: Callable[[], int]) -> int:
    """job(), with running out of memory turned into a stop that can be resumed.

    Whole layers that are on disk are kept.
    """
    try:
        return job()
    except MemoryError:
        where = "memory"
    except RuntimeError as e:
        if type(e).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            where = "GPU memory"
        elif "can't allocate memory" in str(e):  # torch's allocator on the CPU
            where = "memory"
        else:
            raise
    raise Interrupted(
        f"out of {where}; free some, lower --samples or --seq-len, or --resume on a larger machine"
    )


def print_json(value: Any) -> None:
    """`value` on stdout; dataclasses as objects, everything else that JSON lacks as text.

    Numbers that are not finite are null.
    """

    def plain(x: Any) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.asdict(x)
        return str(x)

    finite = json.loads(json.dumps(value, default=plain), parse_constant=lambda _: None)
    json.dump(finite, sys.stdout, indent=1)
    sys.stdout.write("\n")
