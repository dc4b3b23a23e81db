"""Greedy answers of a folder in transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vlmq_export.formats.in_transformers.proof import runtime
from vlmq_export.formats.in_transformers.proof.rows import Program
from vlmq_export.formats.proof.answers import Answerer, Told
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.sample import Sample


def answerer(program: Program, folder: Path, reference: Reference, threads: int) -> Answerer:
    """Each call is a process of its own, which loads the folder as the proof does.

    That is in float32 on the CPU, with the scales widened to float32.
    """

    def answer(prompts: Sequence[Sample], limit: int, tell: Told) -> list[list[int]]:
        with tempfile.TemporaryDirectory(prefix=f"vlmq-{program.format}-") as scratch:
            request = runtime.Request(
                worker=program.worker,
                folder=str(folder.resolve()),
                out=str(Path(scratch) / "out"),
                prompts=runtime.save_prompts(list(prompts), Path(scratch)),
                vocabulary=reference.vocabulary,
                limit=limit,
                stop_ids=sorted(reference.stop_ids),
                threads=threads,
                loading=dict(program.exact_loading),
                exact=True,
                logits=False,
            )
            return runtime.run(request, tell=tell).answers

    return answer
