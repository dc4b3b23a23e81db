"""L3: the float32 twin of the shipped text model against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlmq_export.formats.gguf.proof import deviations, gelu
from vlmq_export.formats.gguf.proof.rows import Exported, error, gated, worst_of
from vlmq_export.formats.gguf.proof.twin_file import copy_container, write_twin
from vlmq_export.formats.gguf.runtime import runner
from vlmq_export.formats.gguf.runtime.prompts import Prompts, text_only
from vlmq_export.formats.proof.answers import ANSWER
from vlmq_export.formats.proof.checks import Check, answers_row
from vlmq_export.quantizer.samples.sample import Sample

TWIN = 5e-6  # most relative error of logits; a right file has 1e-6
TEXT_PROMPTS = 8


@dataclass(frozen=True)
class Told:
    """What llama.cpp computes with a twin."""

    export: Exported
    samples: list[Sample]
    run: runner.Run

    @property
    def answers(self) -> dict[str, list[int]]:
        """The greedy answers: prompt → tokens."""
        return {s.id: result["answer"] for s, result in zip(self.samples, self.run.prompts)}

    def errors(self) -> dict[str, float]:
        """Prompt → relative error of the logits against the reference as it is now."""
        reference = self.export.reference
        logits = (self.run.logits(i)[:, : reference.vocabulary] for i in range(len(self.samples)))
        return {s.id: error(got, reference.logits(s)) for s, got in zip(self.samples, logits)}


def float_twin(export: Exported, scratch: Path) -> Iterator[Check]:
    """Logits and greedy answers of the twin, on text and on the reference's vision features."""
    layout, twin = export.layout, scratch / "twin.gguf"
    images = export.pictured[: export.settings.images]
    texts = [text_only(export.reference, sample) for sample in images[:TEXT_PROMPTS]]
    runs = 2 if layout.text_params.graph.gelu else 1
    run = partial(_run, export, scratch, twin, [*texts, *images], runs)
    if runs == 1:
        write_twin(export.text, twin)
        told = run(0)
        yield from _held(told, texts, images, "")
    else:
        copy_container(export.text, twin, change=gelu.beyond)
        yield from _held(run(0), texts, images, "; no input of GELU within reach of its table")
        write_twin(export.text, twin)
        told = run(1)
        yield _as_it_ships(told)
    yield _unmodified(told, images)


def _run(
    export: Exported, scratch: Path, twin: Path, samples: list[Sample], runs: int, i: int
) -> Told:
    """The i-th of some runs of llama.cpp with a twin."""
    prompts, steps = Prompts(export.reference, export.layout, scratch), export.steps
    steps.begin("float32 twin", i, runs)
    requests = [
        prompts.exact(s, f"p{n}", logits=True, answer=ANSWER) for n, s in enumerate(samples)
    ]

    def tell(done: int) -> None:
        steps.begin("float32 twin", i * len(requests) + done, (runs + 1) * len(requests))

    reference = export.reference
    run = runner.run(scratch, twin, None, requests, reference, export.threads, ANSWER, tell)
    return Told(export, samples, run)


def _held(told: Told, texts: list[Sample], images: list[Sample], said: str) -> Iterator[Check]:
    """The gated rows. `said` is what was done to twin and reference alike."""
    reference, eps, answers = told.export.reference, told.run.eps, told.answers
    adjusting = gelu.beyond_table(reference, told.export.layout) if said else nullcontext()
    with adjusting, reference.language_norm_eps(eps):
        adjusted = told.errors()
        reference.answer_all(images)
        verdicts = {s.id: reference.judge(s, answers[s.id], TWIN) for s in images}
    said = f"reference with the RMS epsilon that llama.cpp's load log prints ({eps:g}){said}"
    kinds = {"text prompts": texts, "image prompts, reference's vision features": images}
    for kind, some in kinds.items():
        name, value = worst_of({s.id: adjusted[s.id] for s in some})
        yield gated(
            "L3",
            f"float32 twin, {kind}",
            value,
            TWIN,
            unit="rel",
            compared=len(some),
            worst=name,
            detail=said,
        )
    yield answers_row("gguf", "greedy answers of the twin", verdicts, unit="different", detail=said)


def _as_it_ships(told: Told) -> Check:
    """That the activation of the MLPs is GELU."""
    with gelu.from_table(told.export.reference):
        name, value = worst_of(told.errors())
    return gated(
        "L3",
        "float32 twin with GELU from llama.cpp's table",
        value,
        gelu.TABLE,
        unit="rel",
        compared=len(told.samples),
        worst=name,
        detail="reference rounding as the table does; the last bits of an input say which entry"
        " it takes",
    )


def _unmodified(told: Told, images: list[Sample]) -> Check:
    """How far the twin is from the reference as transformers computes it."""
    reference, answers = told.export.reference, told.answers
    reference.answer_all(images)
    same = sum(answers[s.id] == reference.answer(s) for s in images)
    plain = deviations.rms_epsilon(told.export.layout, told.run.eps)
    name, value = worst_of(told.errors())
    return Check(
        "gguf",
        "L3",
        "float32 twin against the unmodified reference",
        "info",
        value,
        None,
        "rel",
        len(told.samples),
        f"{plain}; {same} of {len(images)} greedy answers equal",
        name,
    )
