"""The rows of the parity table, and the comparisons that the proofs of all formats make.

L1  weights, as a reader decodes them from the file
L2  one linear at a time, in the runtime
L3  the whole model, in the runtime
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Tell = Callable[[str, int, int], None]  # what is running, shares of the work done, and in all


@dataclass(frozen=True)
class CheckSettings:
    """How much a check runs. The gates do not depend on it.

    tell: is called between the steps of a check, and while a child process computes. It may raise
        to stop.
    """

    images: int = 32  # prompts whose logits and greedy answers are compared
    questions: int = 256  # prompts for the share of equal answers of a file that rounds activations
    threads: int = 2
    tell: Tell = lambda *_: None


class Steps:
    """The steps of a format's proof, told as they come.

    parts: what each step does, in words, and its share of the time, as measured on the reference
        VLM. On another model the shares are others, so that the time left is an estimate.
    """

    def __init__(self, tell: Tell, parts: Mapping[str, int]):
        self.tell, self.parts = tell, parts

    def begin(self, part: str, done: int = 0, of: int = 1) -> None:
        """A step begins, or has done so many of its own steps."""
        names = list(self.parts)
        before = sum(self.parts[name] for name in names[: names.index(part)])
        share = int(self.parts[part] * min(done / max(of, 1), 1))
        self.tell(part, before + share, sum(self.parts.values()))


@dataclass
class Check:
    """One row of the parity table."""

    format: str  # one of formats.NAMES
    level: str  # L1, L2 or L3
    name: str  # what was compared, in words
    status: str  # passed, failed, not run, or info for a row that has no gate
    value: float | None = None  # the figure that the gate is about
    gate: float | None = None
    unit: str = ""  # of the value: "rel", "mismatches", "share", ...
    compared: int | None = None  # how many weights, linears, prompts or answers
    detail: str = ""  # where the gate comes from, or why the check was not run
    worst: str = ""  # the tensor, prompt or linear that is worst, or the first that are wrong

    def __post_init__(self) -> None:
        """Say what a figure is that JSON, and so parity.json, has no word for."""
        if self.value is not None and not math.isfinite(self.value):
            what = "not a number" if math.isnan(self.value) else "infinite"
            self.detail = "; ".join(filter(None, (f"the figure is {what}", self.detail)))

    @classmethod
    def at_most(
        cls, format: str, level: str, name: str, value: float, gate: float, **fields: Any
    ) -> Check:
        """A row that passed if value ≤ gate. A value that is not finite fails."""
        status = "passed" if math.isfinite(value) and value <= gate else "failed"
        return cls(format, level, name, status, value, gate, **fields)

    @classmethod
    def not_run(cls, format: str, level: str, name: str, why: str) -> Check:
        """The row of a check that could not be run."""
        return cls(format, level, name, "not run", detail=why)


def compare_weights(
    format: str,
    name: str,
    expected: Iterable[tuple[str, np.ndarray]],  # (hub name, array) of every weight
    read: Callable[[str], np.ndarray | None],  # hub name → what the reader decodes, if it finds it
    *,
    count: int,  # the model's own number of weights
    detail: str = "",
) -> Check:
    """L1: every expected weight against what a reader finds in the file.

    Both are compared as float32, bit for bit but for the sign of zero. A missing tensor, one of
    another shape, and fewer weights than `count` are failures.
    """
    compared = mismatched = 0
    bad: list[str] = []
    for tensor, want in expected:
        got = read(tensor)
        compared += want.size
        if got is None or got.shape != want.shape:
            wrong = want.size
        else:
            wrong = int((np.asarray(got, np.float32) != np.asarray(want, np.float32)).sum())
        if wrong:
            mismatched += wrong
            bad.append(f"{tensor} ({'missing' if got is None else wrong})")
    complete = compared == count
    return Check(
        format,
        "L1",
        name,
        "passed" if complete and not mismatched else "failed",
        value=float(mismatched),
        gate=0.0,
        unit="mismatches",
        compared=compared,
        detail=detail if complete else f"compared {compared} of the model's {count} weights",
        worst=", ".join(bad[:8]),
    )


def answers_row(
    format: str,
    name: str,
    verdicts: Mapping[str, str],  # prompt → verdict of Reference.judge
    allowed: float = 0.0,  # number of answers that may differ
    *,
    unit: str = "answers",
    detail: str = "",
) -> Check:
    """L3: the greedy answers that differ from the reference's.

    An answer that left the reference's at a tie is counted in the detail, and passes.
    """
    other, ties = ([p for p, said in verdicts.items() if said == kind] for kind in ("other", "tie"))
    tied = ""
    if ties:
        tied = f"{len(ties)} more part at a tie: two tokens that the logits' gate cannot tell apart"
    return Check.at_most(
        format,
        "L3",
        name,
        float(len(other)),
        allowed,
        unit=unit,
        compared=len(verdicts),
        detail="; ".join(filter(None, (detail, tied))),
        worst=", ".join([*other, *ties][:8]),
    )


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """‖got − want‖₂ / ‖want‖₂ over all elements, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
