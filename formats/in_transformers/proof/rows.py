"""The rows that a folder gives in transformers.

    L1  every weight by our reader, and by the runtime in the loaded model
    L2  each quantized linear alone
    L3  logits and greedy answers

The model is run in float32. What a user of the defaults gets in float16 is reported without a gate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.in_transformers.proof import runtime
from vlmq_export.formats.in_transformers.read import QuantizedFolder
from vlmq_export.formats.proof.answers import ANSWER
from vlmq_export.formats.proof.checks import (
    Check,
    CheckSettings,
    Steps,
    answers_row,
    compare_weights,
    relative_error,
)
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.sample import Sample

# Of logits, where both sides compute in float32 on the same weights. Measured was 5e-7.
LOGITS_GATE = 1e-5
# What the loader's own choice may lose in float16 or bfloat16. Measured was 1.5e-3.
KERNEL_GATE = 5e-3
# Of one product in float32 against float64, in parts of ‖w row‖·‖X‖ and per √K. A running sum of K
# terms of one sign, each rounding by half an eps at most, loses 0.29·eps·√K; kernels add in several
# sums. Measured were 0.03 of this gate at 512 columns, 0.04 at 4096 where all terms have one sign.
LINEAR_GATE_PER_SQRT_K = float(np.finfo(np.float32).eps) / 4

# The steps, and their shares of the time.
PARTS = {"weights": 10, "reference": 45, "whole model": 30, "the loader's kernel": 15}


@dataclass(frozen=True)
class Program:
    """A library with which transformers runs the folders of a format."""

    format: str
    worker: str  # module of the process that runs it
    library: str
    exact: str  # what the exact run multiplies with, in words
    widened: str  # how its scales become float32, in words
    exact_loading: Mapping[str, Any]  # `Request.loading` of the exact run
    usual_loading: Mapping[str, Any]  # and of the one with the loader's own defaults
    advice: str  # how to load where the defaults fail
    usual_seconds: float  # for these, with what the library compiles once on a machine

    @property
    def rows(self) -> tuple[tuple[str, str], ...]:
        """Level and name of what the exact run gives, in this order."""
        return (
            ("L1", f"weights decoded by {self.library} in the loaded model"),
            ("L2", f"one linear at a time, {self.exact}"),
            ("L3", f"logits, transformers + {self.library}, {self.exact}"),
            ("L3", f"greedy answers, transformers + {self.library}, {self.exact}"),
        )

    def not_run(self, why: str) -> list[Check]:
        """These rows where they could not be run."""
        return [Check.not_run(self.format, level, name, why) for level, name in self.rows]


@dataclass(frozen=True)
class AtWork:
    """A program in a process of its own, which works on two requests one after the other."""

    worker: runtime.Worker
    exact: runtime.Request
    usual: runtime.Request  # with what the loader picks in float16


@contextmanager
def at_work(
    program: Program, folder: Path, reference: Reference, settings: CheckSettings
) -> Iterator[AtWork]:
    """A program at work on a folder until the context ends. `rows_of` takes what it leaves."""
    with tempfile.TemporaryDirectory(prefix=f"vlmq-{program.format}-") as scratch:
        requests = _requests(program, folder, reference, settings, Path(scratch))
        with runtime.Worker(requests) as worker:
            yield AtWork(worker, *requests)


def rows_of(
    program: Program,
    folder: QuantizedFolder,
    reference: Reference,
    settings: CheckSettings,
    steps: Steps,
    begun: AtWork | None = None,
) -> list[Check]:
    """All rows of a program that is installed. A check that fails is a row too.

    begun: where it is at work already, because other formats were checked meanwhile.
    """
    rows: list[Check] = []
    with ExitStack() as stack:
        begin = at_work(program, folder.path, reference, settings)
        now = begun or stack.enter_context(begin)
        steps.begin("reference")
        _prepare(reference, reference.prompts[: settings.images], steps)
        try:
            outcome = now.worker.outcome(tell=_teller(steps, "whole model", now.exact))
            rows += exact_rows(program, outcome, folder, reference)
        except runtime.RuntimeFailed as e:
            rows += [
                Check(program.format, level, name, "failed", detail=str(e))
                for level, name in program.rows
            ]
        rows.append(usual_row(program, now.worker, now.usual, reference, steps))
    return rows


def _requests(
    program: Program,
    folder: Path,
    reference: Reference,
    settings: CheckSettings,
    scratch: Path,
) -> tuple[runtime.Request, runtime.Request]:
    """The exact run, and that of the loader's own defaults in float16."""
    exact = runtime.Request(
        worker=program.worker,
        folder=str(folder.resolve()),
        out=str(scratch / "exact"),
        threads=settings.threads,
        prompts=runtime.save_prompts(reference.prompts[: settings.images], scratch),
        vocabulary=reference.vocabulary,
        limit=ANSWER,
        stop_ids=sorted(reference.stop_ids),
        loading=dict(program.exact_loading),
        exact=True,
    )
    usual = dict(program.usual_loading)
    out = str(scratch / "default")
    return exact, replace(exact, out=out, loading=usual, exact=False, dtype="float16")


def _prepare(reference: Reference, prompts: list[Sample], steps: Steps) -> None:
    """Compute what the runtime's results are compared with, while the runtime works."""
    for done, prompt in enumerate(prompts):
        steps.begin("reference", done, 2 * len(prompts))
        reference.logits(prompt)
    count = len(prompts)
    reference.answer_all(prompts, lambda done: steps.begin("reference", count + done, 2 * count))


def _teller(steps: Steps, part: str, request: runtime.Request) -> runtime.Told:
    """Tells how many prompts a worker has done. Until the first is, the model is being loaded."""
    steps.begin(part)
    loading = len(request.prompts)  # loading the reference VLM takes as long as all its prompts
    # One share is left for the answers, which come after the last prompt's logits.
    return lambda done: steps.begin(part, done and loading + done, 2 * loading + 1)


def own_decoder(folder: QuantizedFolder, reference: Reference) -> Check:
    """Every weight of the model by our reader. A tensor that the model does not have fails too."""
    name, weights = "weights read back by our decoder", reference.weights
    try:
        row = compare_weights(
            folder.format, name, weights.items(), folder.array, count=weights.count
        )
    except FormatError as e:
        return Check(folder.format, "L1", name, "failed", detail=str(e), unit="mismatches")
    if extra := sorted(set(folder.weight_names()) - set(weights.names())):
        row.status = "failed"
        wrong = [row.worst, *(f"{n} (not in the model)" for n in extra[:8])]
        row.worst = ", ".join(filter(None, wrong))
    return row


def exact_rows(
    program: Program, outcome: runtime.Outcome, folder: QuantizedFolder, reference: Reference
) -> Iterator[Check]:
    """The rows of `program.rows`, in that order."""
    module_name = folder.family.module_name
    (_, decoded), _, (_, logits), (_, answers) = program.rows
    yield compare_weights(
        program.format,
        decoded,
        reference.weights.items(),
        lambda hub: outcome.weight(module_name(hub)),
        count=reference.weights.count,
        detail=f"{outcome.kernel}, {program.widened}",
    )
    yield linear_row(program, outcome, module_name, reference)
    error, worst = worst_logits(outcome, reference)
    yield Check.at_most(
        program.format,
        "L3",
        logits,
        error,
        LOGITS_GATE,
        unit="rel",
        compared=len(outcome.answers),
        detail=f"{outcome.kernel}, {program.widened}; worst image, all positions;"
        f" {outcome.seconds:.0f} s",
        worst=worst,
    )
    prompts = reference.prompts[: len(outcome.answers)]
    verdicts = {
        p.id: reference.judge(p, got, LOGITS_GATE)
        for p, got in zip(prompts, outcome.answers, strict=True)
    }
    said = f"same tokens as the reference, at most {ANSWER}"
    yield answers_row(program.format, answers, verdicts, unit="different", detail=said)


def linear_row(
    program: Program,
    outcome: runtime.Outcome,
    module_name: Callable[[str], str],  # hub name → name in the module tree
    reference: Reference,
) -> Check:
    """Each linear in its kernel against a float64 product with the decoded weights.

    Its input is random rows, and rows that the first prompt brings. The worst output counts.
    """
    level, name_of_row = program.rows[1]
    worst, worst_error, worst_ratio = "", 0.0, 0.0
    for name in reference.weights.linears:
        pair = outcome.linear(module_name(name))
        if pair is None:
            why = "not a quantized module in the runtime"
            return Check(program.format, level, name_of_row, "failed", detail=why, worst=name)
        x, y = (a.astype(np.float64) for a in pair)
        error = _worst_output(x, y, name, reference)
        ratio = error / (LINEAR_GATE_PER_SQRT_K * np.sqrt(x.shape[1]))
        if not ratio <= worst_ratio:  # NaN is the worst
            worst, worst_error, worst_ratio = name, error, ratio
    return Check.at_most(
        program.format,
        level,
        name_of_row,
        worst_ratio,
        1.0,
        unit="eps·√K/4",
        compared=len(reference.weights.linears),
        detail=f"worst output {worst_error:.1e} of ‖w row‖·‖X‖;"
        " float32 sums of K products may lose eps·√K/4",
        worst=worst,
    )


def _worst_output(x: np.ndarray, y: np.ndarray, name: str, reference: Reference) -> float:
    """The largest error of an output of the linear `name`, relative to what its sum is made of.

    x: float64 [M, K]; y: float64 [M, N], what the kernel gave.
    It is not relative to the output itself: where the terms of a sum cancel, a right kernel loses
    any share of what is left. Nor is it over several outputs together, where the largest row of the
    weight would hide an error in all others.
    """
    weights = reference.weights
    weight = weights.array(f"{name}.weight").astype(np.float64)  # [N, K]
    bias = np.zeros(len(weight))
    if f"{name}.bias" in weights.floats:
        bias = weights.array(f"{name}.bias").astype(np.float64)
    lost = np.linalg.norm(y - (x @ weight.T + bias), axis=0)
    terms = np.linalg.norm(weight, axis=1) * np.linalg.norm(x) + np.abs(bias) * np.sqrt(len(x))
    return float((lost / np.maximum(terms, np.finfo(np.float64).tiny)).max())


def worst_logits(outcome: runtime.Outcome, reference: Reference) -> tuple[float, str]:
    """The largest relative error of a prompt's logits, and the id of that prompt."""
    prompts = reference.prompts[: len(outcome.answers)]
    errors = [relative_error(outcome.logits(i), reference.logits(p)) for i, p in enumerate(prompts)]
    at = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    return errors[at], prompts[at].id


def usual_row(
    program: Program,
    worker: runtime.Worker,
    request: runtime.Request,
    reference: Reference,
    steps: Steps,
) -> Check:
    """What transformers picks by itself, in float16.

    It has no gate, because its precision is its own.
    """
    try:
        tell = _teller(steps, "the loader's kernel", request)
        outcome = worker.outcome(timeout=program.usual_seconds, tell=tell)
    except runtime.RuntimeFailed as e:
        name = f"logits, kernel that the loader picks: {e.kernel or 'none loaded'}"
        return Check(program.format, "L3", name, "info", detail=f"{e}; {program.advice}")
    error, worst = worst_logits(outcome, reference)
    side = "under" if error <= KERNEL_GATE else "OVER"
    prompts = reference.prompts[: len(outcome.answers)]
    different = sum(got != reference.answer(p) for p, got in zip(prompts, outcome.answers))
    return Check(
        program.format,
        "L3",
        f"logits, kernel that the loader picks: {outcome.kernel}",
        "info",
        error,
        unit="rel",
        compared=len(outcome.answers),
        detail=f"float16, {side} the {KERNEL_GATE:g} it should keep; {different} answers differ;"
        f" loading (and compiling, once) {outcome.load_seconds:.0f} s",
        worst=worst,
    )
