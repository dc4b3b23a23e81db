"""How well the files of a run do on benchmarks, as eval.json holds it.

A score is the mean over the questions of a benchmark, each from 0 to 1. Standard errors are over
questions. The difference to full precision is that of the same questions, and so is its error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlmq_export._version import __version__
from vlmq_export.proving.strict_json import read_strictly
from vlmq_export.quantizer.storage.whole_files import write_json

EVAL_FILE = "eval.json"
SOURCE = "source"  # the model in full precision, among what is evaluated


@dataclass
class Changed:
    """One question whose answer is not full precision's."""

    question: str  # task and place of its row
    before: str  # the answer of full precision
    after: str
    score_before: float
    score_after: float


@dataclass
class Score:
    """One file on one benchmark."""

    task: str
    of: str  # source, artifact, or a format
    questions: int
    of_all: int  # questions that the benchmark has
    score: float  # 0 to 1
    error: float | None  # one standard error; None for a single question
    difference: float | None = None  # to full precision, where that was evaluated too
    difference_error: float | None = None
    changed: list[Changed] | None = None  # None: there is no full precision to compare with


@dataclass
class Evaluation:
    """What eval.json holds."""

    scores: list[Score]  # by task, then by file
    files: dict[str, str]  # what was evaluated → SHA-256 over its files
    runtimes: dict[str, str]  # what was evaluated → the package that ran it, with its version
    lmms_eval: str  # version
    seconds: dict[str, float] = field(default_factory=dict)  # of answering, this time
    version: str = __version__

    def means(self) -> list[Score]:
        """The mean over the benchmarks of each file, as the papers give it; none for one task."""
        tasks = dict.fromkeys(s.task for s in self.scores)
        if len(tasks) < 2:
            return []
        every: dict[str, list[Score]] = {}
        for s in self.scores:
            every.setdefault(s.of, []).append(s)
        return [_mean(f"mean of {len(tasks)}", own) for own in every.values()]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The table: task, file, score, difference to full precision, changed answers.

        Scores are in percent, with one standard error.
        """
        found, last = [], ""
        for s in [*self.scores, *self.means()]:
            part = "" if s.questions == s.of_all else f" ({s.questions} of {s.of_all})"
            changed = "" if s.changed is None else f"{len(s.changed)} of {s.questions}"
            found.append(
                (
                    "" if s.task == last else f"{s.task}{part}",
                    s.of,
                    _percent(s.score, s.error),
                    _percent(s.difference, s.difference_error, sign="+"),
                    changed,
                )
            )
            last = s.task
        return found

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """The contents of a file that `write` wrote. Raises FormatError for any other file."""
        return read_strictly(path, cls, "scores", "eval")


def scored(
    task: str,
    of: str,
    of_all: int,
    answers: Sequence[tuple[str, str, float]],  # question, answer, score
    full: Sequence[tuple[str, str, float]] | None,  # those of full precision; None: not evaluated
) -> Score:
    """The score of one file on one benchmark."""
    values = [value for _, _, value in answers]
    found = Score(task, of, len(values), of_all, *mean_and_error(values))
    if full is not None and of != SOURCE:
        pairs = list(zip(full, answers, strict=True))
        found.difference, found.difference_error = mean_and_error(
            [new[2] - old[2] for old, new in pairs]
        )
        found.changed = [
            Changed(old[0], old[1], new[1], old[2], new[2])
            for old, new in pairs
            if old[1] != new[1]
        ]
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of questions that were drawn independently, and its standard error."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def _mean(task: str, scores: Sequence[Score]) -> Score:
    """The mean over benchmarks, each of the same weight."""
    compared = all(s.difference is not None for s in scores)
    questions = sum(s.questions for s in scores)
    return Score(
        task,
        scores[0].of,
        questions,
        questions,
        sum(s.score for s in scores) / len(scores),
        _together(s.error for s in scores),
        sum(s.difference or 0.0 for s in scores) / len(scores) if compared else None,
        _together(s.difference_error for s in scores) if compared else None,
        [c for s in scores for c in s.changed or ()] if compared else None,
    )


def _together(errors: Iterable[float | None]) -> float | None:
    """The standard error of a mean of independent figures."""
    each = list(errors)
    known = [e for e in each if e is not None]
    return math.sqrt(sum(e * e for e in known)) / len(each) if len(known) == len(each) else None


def _percent(value: float | None, error: float | None, sign: str = "") -> str:
    """A share in percent with its standard error."""
    if value is None:
        return ""
    return f"{100 * value:{sign}.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
