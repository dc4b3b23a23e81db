"""How much worse the quantized model is than its source, as fidelity.json holds it.

Parity says that a file computes what its integers say. Fidelity says what these integers cost: the
source in full precision and the model with the decoded integers are given the same held-out rows.

    KL          divergence of the quantized model's next token from full precision's, in nats, mean
                over the answers' tokens, each after the tokens of the row's own answer
    agreement   share of these tokens where both models find the same token most probable
    changed     greedy answers that are not full precision's, token by token

Standard errors are over rows, because the tokens of one answer are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlmq_export._version import __version__
from vlmq_export.proving.strict_json import read_strictly
from vlmq_export.quantizer.storage.whole_files import write_json

FIDELITY_FILE = "fidelity.json"
# Least agreement and least share of equal answers of each verdict. docs/verification.md has the
# measurements that they come from.
CLOSE = 0.97, 0.9
WORSE = 0.9, 0.7
WORDS = {
    "close": "close to the source",
    "worse": "worse than the source",
    "far": "far from the source",
    "unknown": "fidelity not measured",
}


@dataclass
class Example:
    """One held-out row with what both models answer."""

    row: int  # its place among the held-out rows
    id: str
    question: str
    expected: str  # the row's own answer; empty where it has none
    kl: float | None  # mean over the row's answer tokens
    full: str | None = None  # the greedy answer of full precision; None: not run
    quantized: str | None = None
    changed: bool | None = None  # whether these are other tokens


@dataclass
class Fidelity:
    """What fidelity.json holds. A figure that was not measured is None."""

    rows: int = 0  # held-out rows that both models were given
    left_out: int = 0  # rows that are too long to be compared at small cost
    tokens: int = 0  # answer tokens in these rows
    kl: float | None = None
    kl_error: float | None = None  # one standard error
    agreement: float | None = None
    agreement_error: float | None = None
    answers: int | None = None  # greedy answers that were compared
    changed: int | None = None  # of these, how many are not full precision's
    answer_tokens: int = 16  # the longest that an answer may get
    verdict: str = "unknown"  # a key of WORDS
    not_measured: str = ""  # why there is no figure
    answers_not_run: str = ""  # why there are no greedy answers
    not_again: str = ""  # why these are the figures of an earlier measurement
    examples: list[Example] = field(default_factory=list)  # the worst ones first
    seconds: float = 0.0  # wall time
    version: str = __version__

    @property
    def measured(self) -> bool:
        """Whether there is any figure."""
        return self.agreement is not None or bool(self.answers)

    @property
    def words(self) -> str:
        """The verdict as a person reads it."""
        return WORDS.get(self.verdict, WORDS["unknown"])

    def sentence(self) -> str:
        """The figures with their standard errors in one line; without any, why there are none."""
        if not self.measured:
            return self.not_measured
        parts = []
        if self.agreement is not None and self.kl is not None:
            same = f"{100 * self.agreement:.1f} %{_error(self.agreement_error, 100, '.1f')}"
            kl = f"{self.kl:.2g}{_error(self.kl_error, 1, '.1g')}"
            parts.append(f"{same} of {self.tokens} answer tokens agree, KL {kl} nats")
        return "; ".join([*parts, self._of_answers()])

    def short(self) -> str:
        """The figures alone, for a narrow terminal."""
        if not self.measured:
            return self.not_measured
        parts = []
        if self.agreement is not None and self.kl is not None:
            parts = [f"agreement {100 * self.agreement:.1f} %", f"KL {self.kl:.2g}"]
        return ", ".join([*parts, self._of_answers()])

    def _of_answers(self) -> str:
        if self.answers:
            return f"{self.changed} of {self.answers} answers changed"
        return f"answers not run: {self.answers_not_run}"

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Fidelity:
        """The contents of a file that `write` wrote. Raises FormatError for any other file."""
        return read_strictly(path, cls, "a fidelity report", "verify")


def _error(value: float | None, factor: int, style: str) -> str:
    """A standard error behind its figure; empty where one row gives none."""
    return "" if value is None else f" ± {factor * value:{style}}"


def verdict(agreement: float | None, equal: float | None) -> str:
    """The key of WORDS for an agreement and a share of equal answers; None: not measured.

    The worse of the two counts.
    """
    known = [
        (value, close, worse)
        for value, close, worse in zip((agreement, equal), CLOSE, WORSE)
        if value is not None
    ]
    if not known:
        return "unknown"
    if all(value >= close for value, close, _ in known):
        return "close"
    return "worse" if all(value >= worse for value, _, worse in known) else "far"


def mean_over_tokens(
    sums: Sequence[float], counts: Sequence[int]
) -> tuple[float | None, float | None]:
    """(mean, standard error) over tokens of rows, from each row's sum and number of tokens.

    The error is that of a ratio of two means over rows. It is None for a single row, and both are
    None without tokens.
    """
    tokens, rows = sum(counts), sum(count > 0 for count in counts)
    if not tokens:
        return None, None
    mean = sum(sums) / tokens
    if rows < 2:
        return mean, None
    spread = sum((s - mean * n) ** 2 for s, n in zip(sums, counts))
    return mean, (rows / (rows - 1) * spread) ** 0.5 / tokens
