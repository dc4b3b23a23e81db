"""L3: the float32 twin of the shipped text model against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlmq_export.formats.gguf.proof import deviations
from vlmq_export.formats.gguf.proof.rows import Exported, error, gated, worst_of
from vlmq_export.formats.gguf.proof.twin_file import write_twin
from vlmq_export.formats.gguf.runtime import runner
from vlmq_export.formats.gguf.runtime.prompts import Prompts, text_only
from vlmq_export.formats.proof.answers import ANSWER
from vlmq_export.formats.proof.checks import Check, answers_row

TWIN = 5e-6  # most relative error of logits; a right file has 1e-6
TEXT_PROMPTS = 8


def float_twin(export: Exported, scratch: Path) -> Iterator[Check]:
    """Logits and greedy answers of the twin, on text and on the reference's vision features."""
    reference, layout, steps = export.reference, export.layout, export.steps
    steps.begin("float32 twin")
    twin, prompts = scratch / "twin.gguf", Prompts(reference, layout, scratch)
    write_twin(export.text, twin)
    images = export.pictured[: export.settings.images]
    texts = [text_only(reference, sample) for sample in images[:TEXT_PROMPTS]]
    samples = [*texts, *images]
    requests = [
        prompts.exact(s, f"p{i}", logits=True, answer=ANSWER) for i, s in enumerate(samples)
    ]

    def told(done: int) -> None:
        steps.begin("float32 twin", done, 2 * len(requests))

    run = runner.run(scratch, twin, None, requests, reference, export.threads, ANSWER, told)
    answers = {s.id: result["answer"] for s, result in zip(samples, run.prompts)}

    def errors() -> dict[str, float]:
        logits = (run.logits(i)[:, : reference.vocabulary] for i in range(len(samples)))
        return {s.id: error(got, reference.logits(s)) for s, got in zip(samples, logits)}

    with reference.language_norm_eps(run.eps):
        adjusted = errors()
        reference.answer_all(images)
        verdicts = {s.id: reference.judge(s, answers[s.id], TWIN) for s in images}
    said = f"reference with the RMS epsilon that llama.cpp's load log prints ({run.eps:g})"
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
    reference.answer_all(images)
    same = sum(answers[s.id] == reference.answer(s) for s in images)
    plain = deviations.rms_epsilon(layout, run.eps)
    name, value = worst_of(errors())
    yield Check(
        "gguf",
        "L3",
        "float32 twin against the unmodified reference",
        "info",
        value,
        None,
        "rel",
        len(samples),
        f"{plain}; {same} of {len(images)} greedy answers equal",
        name,
    )
