"""Everything that is to be known of a GPU, in at most nine minutes.

    tools/gpu_first_contact.sh OUT                          # on a machine with an NVIDIA GPU
    tools/gpu_first_contact.sh OUT --device cpu --small     # a rehearsal

Each step is a process of its own with its own limit of time, so that none stops the others. What a
step finds is printed, and appended to OUT/results.txt and OUT/results.jsonl, as soon as it is
known. Nothing is installed. Exit code 0: all steps passed; 1: not all; 2: no CUDA device here.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from tools.checks.first_contact.card import card
from tools.checks.first_contact.check import check
from tools.checks.first_contact.layers import layers
from tools.checks.first_contact.profiled import profiled
from tools.checks.first_contact.reference import answers, one_rank, reference
from tools.checks.first_contact.report import Report, Setting
from tools.checks.first_contact.solvers import solvers

# What is imported here is there in every step: the processes are forked.
CONTEXT = multiprocessing.get_context("fork")
ALL = 540.0  # seconds for everything
SLOW = 10  # times as long may a rehearsal take, on a machine that does other work too
NO_DEVICE = 2  # exit code
Run = Callable[[Report, Setting], None]


class Step(NamedTuple):
    """A part of the first contact."""

    name: str
    run: Run
    limit: float  # seconds


# The most valuable first.
STEPS = (
    Step("card", card, 45),
    Step("check", check, 90),
    Step("vlmq-paper", partial(layers, "vlmq-paper", 3, "device"), 60),
    Step("vlmq", partial(layers, "vlmq", 2, "device"), 75),
    Step("gptaq", partial(layers, "gptaq", 3, "device"), 50),
    Step("exact", partial(layers, "exact", 2, "device"), 65),
    Step("host", partial(layers, "vlmq-paper", 2, "host"), 50),
    Step("solvers", solvers, 45),
    Step("profile", profiled, 45),
    Step("reference", reference, 60),
    Step("ranks", one_rank, 30),
)


def main() -> int:
    """Run the steps. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder that is empty or not there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes for a rehearsal")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; name another folder")
    at = Setting(args.out, torch.device(args.device), args.small)
    failed = run(STEPS, at)
    if failed is None:
        return NO_DEVICE
    print(f"failed: {', '.join(failed)}" if failed else "all steps passed")
    return 1 if failed else 0


def run(steps: Sequence[Step], at: Setting) -> list[str] | None:
    """The names of the steps that failed, or None where there is no device."""
    patience = SLOW if at.small else 1
    end = time.monotonic() + ALL * patience
    beside = _started(Step("answers", answers, ALL * patience), at)
    failed: list[str] = []
    try:
        for step in steps:
            limit = min(step.limit * patience, end - time.monotonic())
            code = _finished(step._replace(limit=limit), at)
            if code == NO_DEVICE:
                return None
            failed += [step.name] if code else []
        return failed
    finally:
        beside.kill()
        beside.join()


def _started(step: Step, at: Setting) -> BaseProcess:
    process = CONTEXT.Process(target=_inside, args=(step, at), name=step.name)
    process.start()
    return process


def _finished(step: Step, at: Setting) -> int:
    """Run a step to its end or to its limit. Returns its exit code, 0 where it passed."""
    report = Report(at.out, step.name)
    if step.limit <= 0:
        report.tell("not begun: the time for all steps is over", ok=False)
        return 1
    process = _started(step, at)
    process.join(step.limit)
    if process.is_alive():
        process.kill()
        process.join()
        report.tell(f"stopped after {step.limit:.0f} s", ok=False)
    elif process.exitcode not in (0, 1, NO_DEVICE):
        report.tell(f"died with exit code {process.exitcode}", ok=False)
    return 1 if process.exitcode is None else abs(process.exitcode)


def _inside(step: Step, at: Setting) -> None:
    """What runs in a step's own process."""
    report = Report(at.out, step.name)
    if at.device.type == "cuda" and not torch.cuda.is_available():
        report.tell("no CUDA device: PyTorch sees none here; --device cpu rehearses", ok=False)
        sys.exit(NO_DEVICE)
    if step.name == "answers":
        os.nice(10)
    log = (at.out / f"{step.name}.log").open("w")
    # Where a step hangs is known a second before it is killed.
    faulthandler.dump_traceback_later(max(1.0, step.limit - 1), file=log)
    try:
        step.run(report, at)
    except Exception as e:
        traceback.print_exc(file=log)
        report.tell(f"{type(e).__name__}: {e}"[:300].replace("\n", " "), ok=False)
    log.flush()
    # Without the interpreter's own end, which waits for threads that a device left behind.
    sys.stdout.flush()
    os._exit(1 if report.failed else 0)


if __name__ == "__main__":
    sys.exit(main())
