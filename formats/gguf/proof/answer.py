"""Greedy answers of the two GGUF files, in llama.cpp, with images that it prepares itself."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlmq_export.errors import MissingRuntime
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.proof.rows import Exported
from vlmq_export.formats.gguf.requirements import missing
from vlmq_export.formats.gguf.runtime import runner
from vlmq_export.formats.gguf.runtime.prompts import Prompts
from vlmq_export.formats.proof.answers import Answerer, Told
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.images import load_image
from vlmq_export.quantizer.samples.sample import Sample

_MORE = 2  # as many times the tokens that transformers makes of an image, mtmd may make of it


def answerer(folder: Path, reference: Reference, options: FormatOptions, threads: int) -> Answerer:
    """Each call is a process of its own, which loads both files.

    mtmd is given the pixels of the image file, and resizes and cuts them as for any application.
    Raises MissingRuntime, and FormatError for a folder whose files cannot be read.
    """
    if lacking := missing():
        raise MissingRuntime(f"{lacking} not installed; pip install 'vlmq-export[gguf]'")
    export = Exported.open(folder, reference, CheckSettings(threads=threads))

    def answer(prompts: Sequence[Sample], limit: int, tell: Told) -> list[list[int]]:
        with tempfile.TemporaryDirectory(prefix="vlmq-gguf-") as scratch:
            place = Prompts(reference, export.layout, Path(scratch))
            asked = [_request(place, p, f"prompt-{i}", limit) for i, p in enumerate(prompts)]
            run = runner.run(
                Path(scratch),
                export.text,
                export.mmproj,
                asked,
                reference,
                export.threads,
                limit,
                tell,
                timeout=math.inf,
            )
            return [found["answer"] for found in run.prompts]

    return answer


def _request(place: Prompts, prompt: Sample, tag: str, limit: int) -> dict:
    """A prompt as the child takes it; one without images as tokens."""
    if not prompt.images:
        return place.exact(prompt, tag, answer=limit)
    assert prompt.row is not None, "the prompts come from rows"
    whole = tuple(load_image(image) for image in prompt.row.images)
    asked = place.mtmd(replace(prompt, images=whole), tag, answer=limit)
    return asked | {"length": _MORE * asked["length"]}
