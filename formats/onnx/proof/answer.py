"""Greedy answers of an ONNX folder, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmq_export.errors import FormatError, MissingRuntime
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.onnx.requirements import missing
from vlmq_export.formats.proof.answers import Answerer, Told
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.storage.untrusted import third_party


def answerer(folder: Path, reference: Reference, options: FormatOptions, threads: int) -> Answerer:
    """The graphs are loaded once, at the accuracy level that the file has.

    Raises MissingRuntime. A call raises FormatError where ONNX Runtime refuses a graph.
    """
    if lacking := missing():
        raise MissingRuntime(f"{lacking} not installed; pip install 'vlmq-export[onnx]'")
    runner = OnnxRunner(folder, threads=threads, provider=options.onnx_provider)

    def answer(prompts: Sequence[Sample], limit: int, tell: Told) -> list[list[int]]:
        answers = []
        for done, prompt in enumerate(prompts):
            tell(done)
            with third_party(f"{prompt.id}: ONNX Runtime cannot answer", FormatError):
                positions = reference.position_ids(prompt)
                stop = reference.stop_ids
                answers.append(runner.answer(prompt, positions, stop=stop, limit=limit))
        return answers

    return answer
