"""Progress of the stages of a run, on stderr."""

from __future__ import annotations

import time

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from vlmq_export.terminal.log import err

_STEPS = {"quantize": "layer", "write": "format"}  # stage → what one of its steps is
QUIET_SECONDS = 60  # between two lines of a stage that goes on, when piped


class Stages:
    """One progress bar per stage on a terminal; one line per finished stage when piped."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.bar: Progress | None = None
        if not quiet and err.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description:<14}"),
                BarColumn(16),
                TextColumn("{task.fields[count]:>7}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]:<12}"),
                TextColumn("{task.fields[what]}"),
                console=err,
                transient=True,
            )
        self.tasks: dict[str, TaskID] = {}
        self.stamps: dict[str, list[float]] = {}  # stage → when 0, 1, 2, … steps were done
        self.told = time.monotonic()
        self.last = ("", 0, 0)

    def __enter__(self) -> Stages:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A stage has done so many of its steps.

        What a stage is at stands behind a colon. Its steps are shares of the work then.
        """
        self.last = (stage, done, total)
        stage, _, what = stage.partition(": ")
        now = time.monotonic()
        stamps = self.stamps.setdefault(stage, [])
        stamps += [now] * (done + 1 - len(stamps))
        left = _duration(
            share_left(now - stamps[0], done, total) if what else time_left(stamps, total)
        )
        count = f"{100 * done // total if total else 100}%" if what else f"{done}/{total}"
        if self.bar:
            if stage not in self.tasks:
                self.tasks[stage] = self.bar.add_task(
                    stage, total=total, count="", left="", what=""
                )
            left = "" if done == total else left
            self.bar.update(
                self.tasks[stage], completed=done, total=total, count=count, left=left, what=what
            )
        elif not self.quiet and done == total and total:
            seconds = now - stamps[0]
            steps = "" if what else f"{total} in "
            err.print(f"{stage}: {steps}{seconds:.1f} s", highlight=False)
        elif not self.quiet and done and now - self.told >= QUIET_SECONDS:
            self.told = now
            said = f"{count}, {what}" if what else f"{done} of {total}"
            err.print(f"{stage}: {said}, {left}", highlight=False)

    def doing(self) -> str:
        """What is in hand, for someone who asks for a stop: `finishing layer 3 of 8`."""
        stage, done, total = self.last
        if stage in _STEPS and done < total:
            return f"finishing {_STEPS[stage]} {done + 1} of {total}"
        return f"finishing this step ({stage})" if stage else "finishing this step"


def time_left(stamps: list[float], total: int) -> float | None:
    """Seconds to go, from the moments at which 0, 1, 2, … of `total` steps were done.

    The last few steps count, because the first layers of a resumed run are walked and not solved.
    Before the first step is done, nothing is known.
    """
    recent = stamps[-5:]
    if len(recent) < 2:
        return None
    return (recent[-1] - recent[0]) / (len(recent) - 1) * (total - len(stamps) + 1)


def share_left(elapsed: float, done: int, total: int) -> float | None:
    """Seconds to go of a stage whose steps are shares of its work."""
    return elapsed / done * (total - done) if done else None


def _duration(seconds: float | None) -> str:
    """As one reads it: 40 s left, 12 min left, 3.5 h left."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 6000 else f"{seconds / 3600:.1f} h left"
