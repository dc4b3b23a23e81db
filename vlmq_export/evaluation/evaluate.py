"""One evaluation: data → questions → answers of each model → scores → report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import Interrupted, UsageError, VlmqError
from vlmq_export.evaluation.answers import ANSWERS, Known
from vlmq_export.evaluation.benchmarks import named
from vlmq_export.evaluation.questions import Question, Task, load_tasks, look_through
from vlmq_export.evaluation.subjects import Subject, open_subjects
from vlmq_export.formats.compressed_tensors.runtimes import vllm_loads
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.output.folder import claimed
from vlmq_export.planning.run_plan import plan_run
from vlmq_export.proving.fidelity import FIDELITY_FILE, Fidelity
from vlmq_export.proving.held_out import held_out_again
from vlmq_export.proving.parity import PARITY_FILE, Parity
from vlmq_export.proving.scores import EVAL_FILE, SOURCE, Evaluation, scored
from vlmq_export.proving.verify import describe
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.recipes.recipe_file import RECIPE_FILE, load_recipe
from vlmq_export.report.files import gptqmodel_loads, source_bytes
from vlmq_export.result import Result
from vlmq_export.sources.locate import same_source

log = logging.getLogger("vlmq_export")
AT_ONCE = 64  # most questions that are answered before the answers are kept


def evaluate_folder(
    out: Path,
    tasks: Sequence[str],
    *,
    on: Sequence[str] = (),
    baseline: bool = False,
    data: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    callbacks: Callbacks,
) -> Evaluation:
    """Ask the files of a run the questions of benchmarks, and score the answers by lmms-eval.

    tasks: names of benchmarks, or `papers`.
    on: artifact, or formats; empty: every format of the run.
    baseline: whether the source in full precision is asked too.
    data: folder of the benchmarks' rows; None: the hub.
    limit: questions of each benchmark; None: all.
    device: where source and artifact are run.

    Writes eval.json, report and card. Answers are kept as they come, by the hash of the files that
    gave them, so that the same call goes on after a stop. Raises a VlmqError before a model is
    loaded, where that can be known.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least one question of each benchmark")
    names = named(tasks)
    subjects = open_subjects(out, on, baseline, device)
    loaded = load_tasks(names, data, limit)
    with claimed(out, overwrite=False):
        known = {s.name: _known(out, s) for s in subjects}
        _look_at(loaded, list(known.values()), callbacks)
        seconds = {}
        for subject in subjects:
            start = time.perf_counter()
            _ask(subject, loaded, known[subject.name], callbacks)
            seconds[subject.name] = round(time.perf_counter() - start, 1)
        found = _scores(loaded, subjects, known)
        found.seconds = seconds
        found.write(out / EVAL_FILE)
        describe_again(out)
    return found


def _known(out: Path, subject: Subject) -> Known:
    """The answers of a model that are in the output folder."""
    return Known(out / ANSWERS / f"{subject.name}.jsonl", subject.files, subject.runtime)


def _look_at(tasks: Sequence[Task], known: Sequence[Known], callbacks: Callbacks) -> None:
    """Look through the questions that a model has not answered yet."""
    waiting = [
        (t, [q for q in t.questions if any(q.key not in each for each in known)]) for t in tasks
    ]
    total, before = sum(len(questions) for _, questions in waiting), 0
    for task, questions in waiting:
        for done in look_through(task, questions):
            callbacks.progress("questions", before + done, total)
            _stop_if_asked(callbacks)
        before += len(questions)


def _ask(subject: Subject, tasks: Sequence[Task], known: Known, callbacks: Callbacks) -> None:
    """Have a model answer what it has not answered yet."""
    every: dict[str, Question] = {}  # by key: two scorings of ScienceQA have the same questions
    for question in (q for t in tasks for q in t.questions):
        every.setdefault(question.key, question)
    waiting = [question for key, question in every.items() if key not in known]
    if len(waiting) < len(every):
        there = len(every) - len(waiting)
        log.info("%s: %d of %d answers are there already", subject.name, there, len(every))
    before = 0
    for part in _parts(waiting):

        def tell(done: int, before: int = before, what: str = part[0].id.split()[0]) -> None:
            if before + done < len(waiting):
                callbacks.progress(f"eval {subject.name}: {what}", before + done, len(waiting))
            _stop_if_asked(callbacks)

        tell(0)
        answers = subject.answer(part, tell)
        known.add({q.key: answer for q, answer in zip(part, answers)})
        before += len(part)
    if waiting:
        callbacks.progress(f"eval {subject.name}: done", len(waiting), len(waiting))
    subject.close()


def _parts(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Questions that are answered together: of one task, and of one limit."""
    for _, group in groupby(questions, key=lambda q: (q.id.split()[0], q.limit)):
        same = list(group)
        for start in range(0, len(same), AT_ONCE):
            yield same[start : start + AT_ONCE]


def _stop_if_asked(callbacks: Callbacks) -> None:
    if callbacks.should_stop():
        raise Interrupted("stopped; the answers so far are kept, and the same command goes on")


def _scores(
    tasks: Sequence[Task], subjects: Sequence[Subject], known: dict[str, Known]
) -> Evaluation:
    """lmms-eval's scores of all answers."""
    scores = []
    for task in tasks:
        full = None
        for subject in subjects:
            own = known[subject.name]
            answers = [(q.id, own[q.key], task.score(q, own[q.key])) for q in task.questions]
            full = answers if subject.name == SOURCE else full
            scores.append(scored(task.name, subject.name, task.rows_in_all, answers, full))
    return Evaluation(
        scores,
        {s.name: s.files for s in subjects},
        {s.name: s.runtime for s in subjects},
        version("lmms-eval"),
    )


def describe_again(out: Path) -> None:
    """Write report, card and checksums of a folder once more, with the scores in them."""
    recipe = load_recipe(out / RECIPE_FILE, {})
    artifact = Artifact(out / "artifact")
    result = Result(out, plan_run(artifact_plan(artifact), recipe))
    result.source_bytes = source_bytes(same_source(recipe.model, artifact))
    result.by_gptqmodel = gptqmodel_loads(result.plan.model, recipe.gptq_names)
    result.by_vllm = vllm_loads(result.plan.model)
    if (out / PARITY_FILE).is_file():
        result.parity = Parity.read(out / PARITY_FILE)
    if (out / FIDELITY_FILE).is_file():
        result.fidelity = Fidelity.read(out / FIDELITY_FILE)
    rows = []
    with suppress(VlmqError):  # the report shows answers without images where rows are gone
        rows = held_out_again(recipe, None, None, artifact.manifest.calibration.get("sha256"))
    describe(out, recipe, result, rows)
