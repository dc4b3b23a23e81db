"""The benchmarks of the papers as lmms-eval names them, and the columns that its code reads."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from vlmq_export.errors import UsageError

ALL = "papers"  # stands for the eight of both papers


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    task: lmms-eval's own name of it.
    folder: of lmms-eval's tasks, where its settings lie.
    metric: the figure that the papers report.
    columns: what lmms-eval's code reads of a row.
    parser: whether the letter is looked for in the whole answer (`scienceqa.py`).
    """

    task: str
    folder: str
    metric: str
    columns: tuple[str, ...]
    parser: bool = False


_REALWORLD = ("index", "question", "multi-choice options", "answer", "category", "l2-category")
_SCIENCE = ("question", "choices", "answer", "hint", "image")
_SEED = ("question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "question_id")
BENCHMARKS = {
    "chartqa": Benchmark(
        "chartqa", "chartqa", "relaxed_overall", ("type", "question", "answer", "image")
    ),
    "docvqa_val": Benchmark(
        "docvqa_val", "docvqa", "anls", ("questionId", "question", "answers", "image")
    ),
    "mmerealworld": Benchmark(
        "mmerealworld", "mme_realworld", "mme_realworld_score", (*_REALWORLD, "bytes")
    ),
    "mmerealworld_cn": Benchmark(
        "mmerealworld_cn", "mme_realworld", "mme_realworld_score", (*_REALWORLD, "bytes")
    ),
    "ocrbench": Benchmark(
        "ocrbench",
        "ocrbench",
        "ocrbench_accuracy",
        ("dataset", "question", "question_type", "answer", "image"),
    ),
    "scienceqa_parsed": Benchmark("scienceqa", "scienceqa", "exact_match", _SCIENCE, parser=True),
    "seedbench_2_plus": Benchmark(
        "seedbench_2_plus",
        "seedbench_2_plus",
        "seedbench_2_plus_all",
        (*_SEED, "question_image_type", "image"),
    ),
    "textvqa_val": Benchmark(
        "textvqa_val",
        "textvqa",
        "exact_match",
        ("question", "question_id", "answers", "image"),
    ),
    # Beside those of the papers: lmms-eval's own scoring of ScienceQA, and its rows with images.
    "scienceqa": Benchmark("scienceqa", "scienceqa", "exact_match", _SCIENCE),
    "scienceqa_img": Benchmark("scienceqa_img", "scienceqa", "exact_match", _SCIENCE),
    "scienceqa_img_parsed": Benchmark(
        "scienceqa_img", "scienceqa", "exact_match", _SCIENCE, parser=True
    ),
}
PAPERS = tuple(BENCHMARKS)[:8]


def named(tasks: Sequence[str]) -> list[str]:
    """The names of benchmarks, `papers` and lists with commas written out, each once.

    Raises UsageError for a name that is not known, and where there is none.
    """
    found: dict[str, None] = {}
    for given in (one.strip() for task in tasks for one in task.split(",")):
        if given == ALL:
            found |= dict.fromkeys(PAPERS)
        elif given in BENCHMARKS:
            found[given] = None
        else:
            close = difflib.get_close_matches(given, [ALL, *BENCHMARKS], n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"known: {', '.join([ALL, *BENCHMARKS])}"
            )
            raise UsageError(f"--task {given}: no such benchmark; {hint}")
    if not found:
        raise UsageError(f"no --task given; `--task {ALL}` is {', '.join(PAPERS)}")
    return list(found)
