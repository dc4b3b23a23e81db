"""A file of a run as a model of lmms-eval's own command, for the tasks that `eval` does not know.

    lmms_eval --model vlmq_export --model_args out=small,on=gguf --tasks mmmu_val

The entry point in pyproject.toml names it. This module imports lmms-eval, and is imported by
lmms-eval alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from vlmq_export.evaluation.questions import Question, question_of
from vlmq_export.evaluation.subjects import open_subjects
from vlmq_export.proving.scores import SOURCE

MANIFEST = ModelManifest("vlmq_export", f"{__name__}.VlmqExport")


class VlmqExport(lmms):
    """out: an output folder. on: source, artifact, or a format."""

    def __init__(self, out: str, on: str = "artifact", device: str = "auto", **_: Any):
        super().__init__()
        full = on == SOURCE
        subjects = open_subjects(Path(out), ["artifact" if full else on], full, device or "auto")
        self.subject = subjects[0]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests. Those of one limit are answered together."""
        questions = [self._question(request) for request in requests]
        answers: dict[int, str] = {}
        for limit in dict.fromkeys(question.limit for question in questions):
            places = [i for i, question in enumerate(questions) if question.limit == limit]
            found = self.subject.answer([questions[i] for i in places], lambda _: None)
            answers |= dict(zip(places, found))
        return [answers[i] for i in range(len(questions))]

    def _question(self, request: Any) -> Question:
        name, split = request.args[4:6]
        return question_of(name, request, self.task_dict[name][split])

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not answered: llama.cpp and ONNX Runtime are asked for text alone."""
        raise NotImplementedError("vlmq_export answers generate_until alone")

    generate_until_multi_round = loglikelihood
