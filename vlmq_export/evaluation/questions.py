"""Questions of a benchmark as lmms-eval asks them, and answers as lmms-eval scores them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from vlmq_export.errors import BenchmarkError, MissingRuntime, one_line
from vlmq_export.evaluation.benchmarks import BENCHMARKS
from vlmq_export.evaluation.data import first_row, opened, placed, split_of
from vlmq_export.evaluation.scienceqa import parsed_result

log = logging.getLogger("vlmq_export")
LIMIT = 128  # tokens of an answer where the task has no limit, as lmms-eval's Qwen2.5-VL has it


@dataclass(frozen=True)
class Question:
    """One question as a model is asked it."""

    id: str  # task and place of its row
    text: str
    pictures: Callable[[], list[Image.Image]]
    limit: int  # most tokens of the answer
    until: tuple[str, ...]  # texts that end the answer
    place: int = 0  # of its row
    key: str = ""  # SHA-256 of its row, its text and these settings

    def cut(self, answer: str) -> str:
        """The answer up to the first of the texts that end it."""
        for end in self.until:
            answer = answer.split(end)[0] if end else answer
        return answer.strip()


@dataclass(frozen=True)
class Task:
    """One benchmark with its rows, in lmms-eval's own code."""

    name: str
    task: Any  # lmms-eval's ConfigurableTask
    rows: Any  # datasets.Dataset, with images as bytes
    rows_in_all: int
    questions: list[Question]

    def score(self, question: Question, answer: str) -> float:
        """lmms-eval's score of one answer, from 0 to 1.

        Raises BenchmarkError for a row that its code cannot score.
        """
        row = self.task.eval_docs_no_media[question.place]
        metric = BENCHMARKS[self.name].metric
        own = self.task.config.process_results
        try:
            # lmms-eval tries a row five times where it fails. Its own code is called without that.
            found = own(row, [answer]) if own else self.task.process_results(row, [answer])
            value = found[metric]
            # OCRBench's own sum is over a global table and out of 1000 rows, whatever was asked.
            if isinstance(value, dict) and "score" in value:
                return float(value["score"])
            return float(self.task.aggregation()[metric]([value]))
        except Exception as e:  # of the task's own code, which is of many hands
            why = one_line(f"{type(e).__name__}: {e}")
            raise BenchmarkError(f"{question.id}: lmms-eval cannot score it ({why})") from None


def load_tasks(names: list[str], data: Path | None, limit: int | None) -> list[Task]:
    """The benchmarks of these names, each with its first `limit` questions, or all.

    Raises MissingRuntime without lmms-eval, and BenchmarkError for data that cannot be used.
    """
    lmms = _lmms_eval()
    found = []
    for name in names:
        log.info("reading the questions of %s", name)
        benchmark = BENCHMARKS[name]
        folder = Path(lmms.__file__).parent / benchmark.folder
        index = lmms.TaskManager(include_path=str(folder), include_defaults=False).task_index
        settings = lmms.utils.load_yaml_config(index[benchmark.task]["yaml_path"], mode="full")
        config = placed(settings, name, data)
        rows = opened(config, benchmark)
        first_row(rows, name)
        if benchmark.parser:
            config["process_results"] = parsed_result
        try:
            task = lmms.ConfigurableTask(config=config)
            task.build_all_requests(limit=limit)
        except Exception as e:  # as above
            why = one_line(f"{type(e).__name__}: {e}")
            raise BenchmarkError(f"{name}: lmms-eval cannot ask its questions ({why})") from None
        raw = _raw(rows)
        asked = list(_questions(name, task, raw, task.dataset[split_of(config)]))
        found.append(Task(name, task, raw, len(rows), asked))
    return found


def look_through(task: Task, questions: list[Question]) -> Iterator[int]:
    """Decode every image and score an empty answer, so that what is broken is known beforehand.

    Yields the number of questions that are done. Raises BenchmarkError, which names the first that
    is bad.
    """
    for done, question in enumerate(questions, start=1):
        try:
            question.pictures()
        except Exception as e:  # of Pillow's decoders
            why = one_line(str(e) or type(e).__name__)
            raise BenchmarkError(f"{question.id}: its image cannot be read ({why})") from None
        task.score(question, "")
        yield done


def question_of(name: str, request: Any, rows: Any) -> Question:
    """The question of a request of lmms-eval.

    rows: a datasets.Dataset, the split that is asked.
    """
    text, options, visuals, place, *_ = request.args
    return Question(
        f"{name} {place}",
        text,
        lambda: visuals(rows[place]) or [],
        int(options.get("max_new_tokens", LIMIT)),
        tuple(end for end in options.get("until") or () if end),
        place,
    )


def _questions(name: str, task: Any, raw: Any, rows: Any) -> Iterator[Question]:
    """The questions of a task whose requests are built, with their keys.

    raw, rows: the rows with images as bytes, and with images.
    """
    for request in task.instances:
        asked = question_of(name, request, rows)
        what = [_hashed(raw[asked.place]), asked.text, asked.limit, asked.until]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        yield replace(asked, key=key)


def _raw(rows: Any) -> Any:
    """The rows with images as bytes, which need not be decoded to be compared."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _hashed(value: Any) -> Any:
    """A value of a row as JSON can hold it: bytes by their SHA-256, images by their bytes."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            own = value["bytes"]
            return _hashed(Path(value["path"]).read_bytes() if own is None else own)
        return {str(k): _hashed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_hashed(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _lmms_eval() -> Any:
    """lmms_eval.tasks. Raises MissingRuntime where it cannot be imported."""
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    # The log of lmms-eval tells the rules of its own task files.
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    try:
        import lmms_eval.tasks as lmms  # pyright: ignore[reportMissingImports]
        from loguru import logger  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise MissingRuntime(
            f"lmms-eval cannot be imported ({one_line(e)}); docs/evaluation.md says how to install"
            " it"
        ) from None
    finally:
        # It has Pillow fill up a file that ends too early with grey, for the whole process.
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated
    logger.remove()
    return lmms
