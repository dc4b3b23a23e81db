"""L2 and L3 of the files that ship, from one run of llama.cpp with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vlmq_export.formats.gguf.proof import deviations, emulate
from vlmq_export.formats.gguf.proof.products import products
from vlmq_export.formats.gguf.proof.rows import Exported, error, gated, image_error, worst_of
from vlmq_export.formats.gguf.proof.twin_file import decoded_tower, write_twin
from vlmq_export.formats.gguf.runtime import runner
from vlmq_export.formats.gguf.runtime.prompts import Prompts, as_rows, text_only
from vlmq_export.formats.proof.answers import ANSWER
from vlmq_export.formats.proof.checks import Check
from vlmq_export.quantizer.samples.sample import Sample

# Most relative error of mtmd's image embeddings, by the type of the mmproj's linears. A right file
# has 6e-4 in f32. f16 adds up to 5e-4, and q8_0 gives 2e-2.
EMBEDDING = {"f32": 2e-3, "f16": 2.5e-3, "q8_0": 5e-2}
EMBEDDING_WHY = {
    "f32": "llama.cpp rounds pixels to fp16 and takes GELU from a table",
    "f16": "llama.cpp rounds pixels to fp16 and takes GELU from a table; f16 weights add 5e-4",
    "q8_0": "sanity only: activations are rounded to 8 bits; L1 and L2 hold the weights",
}
SHIPPED = 5e-2  # most median error of logits; activations of 8 bits alone give 2e-2 to 3e-2
# A model whose activations cost more may be off by this multiple of the cost in emulation.
# Measured were 0.96 to 1.13.
ROUNDED = 1.25


def shipped(export: Exported, scratch: Path) -> Iterator[Check]:
    """Products, image embeddings, logits, answers, and where this build deviates."""
    reference, settings = export.reference, export.settings
    prompts = Prompts(reference, export.layout, scratch)
    asked_of = export.pictured[: max(settings.questions, settings.images)]
    if deviations.many_tiles(export):
        asked_of = asked_of[: deviations.CUT]
    samples = [deviations.as_mtmd_cuts(export, sample) for sample in asked_of]
    compared = samples[: settings.images]
    first, oblong = samples[0], deviations.oblong(export, samples[0])
    watched = [
        prompts.exact(text_only(reference, first), "watched-text", logits=True, capture=True),
        prompts.exact(first, "watched-image", logits=True, capture=True),
        prompts.mtmd(first, "watched-mtmd", logits=True, capture=True),
    ]
    asked = [
        prompts.mtmd(s, f"image-{i}", logits=i < len(compared), answer=ANSWER)
        for i, s in enumerate(samples)
    ]
    last = prompts.mtmd(oblong, "oblong")
    last["length"] *= 2  # it may take more tokens there
    requests = [*watched, *asked, last]
    steps = export.steps
    steps.begin("shipped files")
    run = runner.run(
        scratch,
        export.text,
        export.mmproj,
        requests,
        reference,
        export.threads,
        ANSWER,
        lambda done: steps.begin("shipped files", done, len(requests)),
    )
    steps.begin("products")
    yield from products(export, run)
    steps.begin("reference")
    yield from _mtmd(export, run, samples, compared, offset=len(watched))
    yield from deviations.seen_twice(export, asked_of[0], first)
    yield from deviations.line_breaks(export, first)
    yield deviations.resizing(reference, export.layout, oblong, run.array(run.prompts[-1]["image"]))
    if export.tower_rounding == "q8_0":
        yield _mmproj_twin(export, compared, scratch)
    embeddings = run.array(run.prompts[len(watched)]["image"])
    plain = image_error(export, first, embeddings)
    yield from deviations.class_row(export, first, plain, scratch)


def _mtmd(
    export: Exported,
    run: runner.Run,
    samples: Sequence[Sample],
    compared: Sequence[Sample],
    offset: int,  # of the first sample among the run's prompts
) -> Iterator[Check]:
    reference = export.reference
    results = run.prompts[offset : offset + len(samples)]
    rows = [as_rows(reference, export.layout, s) for s in samples]
    ids = [np.where(r, -1, s.input_ids.numpy()).tolist() for r, s in zip(rows, samples)]
    wrong = [s.id for s, r, want in zip(samples, results, ids) if r["ids"] != want]
    yield gated(
        "L3",
        "prompts tokenized by llama.cpp",
        len(wrong),
        0,
        unit="different",
        compared=len(samples),
        worst=", ".join(wrong[:4]),
        detail="token ids and number of image tokens, through mtmd",
    )
    images = {s.id: run.array(r["image"]) for s, r in zip(compared, results)}
    yield from _embeddings(export, compared, images)
    logits: dict[str, float] = {}
    for i, sample in enumerate(compared):
        got = run.logits(offset + i)[:, : reference.vocabulary]
        logits[sample.id] = error(got, reference.logits(sample)[~rows[i]])
    yield shipped_row(export, compared, logits)
    answers = [(s, r["answer"]) for s, r in zip(samples, results)]
    reference.answer_all(samples)
    different = [s.id for s, answer in answers if answer != reference.answer(s)]
    yield Check(
        "gguf",
        "L3",
        "greedy answers of the shipped file equal",
        "info",
        1 - len(different) / len(samples),
        None,
        "share",
        len(samples),
        f"{len(samples) - len(different)} of {len(samples)} equal",
        ", ".join(different[:4]),
    )


def _embeddings(
    export: Exported,
    samples: Sequence[Sample],
    got: dict[str, np.ndarray],  # sample → mtmd's embeddings, [image tokens, width]
) -> Iterator[Check]:
    name, value = worst_of({s.id: image_error(export, s, got[s.id]) for s in samples})
    yield gated(
        "L3",
        "image embeddings of mtmd",
        value,
        EMBEDDING[export.tower_rounding],
        unit="rel",
        compared=len(samples),
        worst=name,
        detail=EMBEDDING_WHY[export.tower_rounding],
    )
    if np.isfinite(value) and export.tower_rounding != "q8_0":
        yield deviations.half_precision(export, samples, got, value)


def shipped_row(export: Exported, samples: Sequence[Sample], errors: dict[str, float]) -> Check:
    """The logits of the shipped file, which can show no more than that it is the right model.

    A model whom rounded activations cost more than usual is held to its own cost.
    """
    (name, value), gate = worst_of(errors), SHIPPED
    median = float(np.median(list(errors.values())))
    detail = "sanity only: activations are rounded to 8 bits"
    if not median <= SHIPPED:
        costs = emulate.cost(export.reference, export.layout, export.types, samples)
        cost = float(np.median(list(costs.values())))
        gate = max(SHIPPED, ROUNDED * cost)
        detail += f", which in the reference costs this model {cost:.2g}"
    return gated(
        "L3",
        "shipped file through mtmd, median logits",
        median,
        gate,
        unit="rel",
        compared=len(samples),
        worst=f"{name} ({value:.1e})",
        detail=detail,
    )


def _mmproj_twin(export: Exported, samples: Sequence[Sample], scratch: Path) -> Check:
    """The mmproj as the float32 numbers that it decodes to, so that no activation is rounded."""
    reference, layout = export.reference, export.layout
    scratch = scratch / "mmproj-twin"  # arrays of the other run are still to be read
    scratch.mkdir()
    twin, prompts = scratch / "mmproj-twin.gguf", Prompts(reference, layout, scratch)
    write_twin(export.mmproj, twin)
    requests = [prompts.mtmd(sample, f"twin-{i}") for i, sample in enumerate(samples)]
    run = runner.run(scratch, export.text, twin, requests, reference, export.threads, ANSWER)
    with decoded_tower(reference, layout, twin):
        got = {s.id: run.array(result["image"]) for s, result in zip(samples, run.prompts)}
        name, value = worst_of({s.id: image_error(export, s, got[s.id]) for s in samples})
    return gated(
        "L3",
        "image embeddings of the mmproj's float32 twin",
        value,
        EMBEDDING["f32"],
        unit="rel",
        compared=len(samples),
        worst=name,
        detail="reference with the same weights in its vision tower",
    )
