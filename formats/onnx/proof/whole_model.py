"""L3: the whole model in ONNX Runtime on held-out prompts, with the reference's own pixels.

A file may ask for an accuracy_level that rounds activations. It is run at level 0 first, which
computes in float32, and once more as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.proof.checks import (
    Check,
    CheckSettings,
    Steps,
    answers_row,
    relative_error,
)
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.sample import Sample

# Level 0 computes in float32, so that only the order of additions differs. Measured was 1.5e-6.
FORMAT_GATE = 1e-5
# float16 activations and cache, 11 bits each. Measured on the reference VLM was 6.0e-4.
HALF_GATE = 5e-3
HALF_ANSWERS = 0.05  # share of greedy answers that a float16 decoder may change
KERNEL_GATE = 5e-2  # level 4 rounds activations to 8 bits; measured was 1.8e-2


@dataclass
class _Compared:
    """What was compared, prompt by prompt."""

    features: list[tuple[float, str]] = field(default_factory=list)  # (error, prompt)
    logits: list[tuple[float, str]] = field(default_factory=list)  # (error, prompt)
    # Of each position, whether its most likely token is the reference's: bool [S].
    agree: list[np.ndarray] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)  # prompt → that of Reference.judge

    def add_logits(self, prompt: Sample, got: np.ndarray, want: np.ndarray) -> None:
        """Compare the logits of one prompt, [S, vocabulary]."""
        self.logits.append((relative_error(got, want), prompt.id))
        self.agree.append(got.argmax(-1) == want.argmax(-1))

    def agreement(self, level: int) -> Check:
        """The row of the most likely tokens."""
        name, same = f"argmax agreement at accuracy_level {level}", np.concatenate(self.agree)
        value = float(same.mean())
        return Check("onnx", "L3", name, "info", value, unit="share", compared=len(same))


def whole_model_rows(
    folder: Path,
    written: OnnxFolder,
    reference: Reference,
    settings: CheckSettings,
    provider: str,
    steps: Steps,
) -> list[Check]:
    """Image features, logits, cached decoding and greedy answers."""
    prompts = reference.prompts[: settings.images]
    if not prompts:
        return [Check.not_run("onnx", "L3", "logits at accuracy_level 0", "no held-out prompts")]
    level = max(written.accuracy_levels)
    # A file of level 0 is run as it lies. In another one the attribute is rewritten in memory.
    exact, threads = 0 if level else None, settings.threads
    runner = OnnxRunner(folder, accuracy_level=exact, threads=threads, provider=provider)
    gate, allowed, kind = FORMAT_GATE, 0, "float32 throughout"
    if written.half:
        gate, allowed = HALF_GATE, math.floor(HALF_ANSWERS * len(prompts))
        kind = "float16 activations and cache"
    compared = _compare(runner, reference, prompts, steps)
    rows = [
        _at_most("image features", compared.features, gate, "vision.onnx computes in float32"),
        _at_most("logits at accuracy_level 0", compared.logits, gate, kind),
        _cached_decode(runner, reference, prompts[0], gate),
        answers_row("onnx", "greedy answers that differ", compared.verdicts, float(allowed)),
    ]
    if written.half:
        rows.append(compared.agreement(0))
    if level:
        shipped = OnnxRunner(folder, threads=threads, provider=provider)
        rows += _shipped_rows(shipped, level, reference, prompts)
    return rows


def _compare(
    runner: OnnxRunner, reference: Reference, prompts: list[Sample], steps: Steps
) -> _Compared:
    """Run every prompt at level 0."""
    compared = _Compared()
    reference.answer_all(prompts)
    for done, p in enumerate(prompts):
        steps.begin("whole model", done, len(prompts))
        positions = reference.position_ids(p)
        if p.pixel_values is not None:
            parts = [reference.vision_features(p), *reference.added_features(p)]
            error = relative_error(runner.prompt_features(p), np.concatenate(parts, axis=-1))
            compared.features.append((error, p.id))
        got = runner.logits(p, positions)[:, : reference.vocabulary]
        compared.add_logits(p, got, reference.logits(p))
        answer = runner.answer(p, positions, stop=reference.stop_ids)
        compared.verdicts[p.id] = reference.judge(p, answer, FORMAT_GATE)
    return compared


def _cached_decode(runner: OnnxRunner, reference: Reference, prompt: Sample, gate: float) -> Check:
    """The second half of a prompt fed token by token through the cache.

    Image tokens that see both ways must come with the whole of their image, and so they do.
    """
    positions, split = reference.position_ids(prompt), len(prompt.input_ids) // 2
    if prompt.marks and prompt.vision.any():
        split = max(split, int(prompt.vision.nonzero().max()) + 1)
    got = runner.stepwise(prompt, positions, split)[:, : reference.vocabulary]
    return Check.at_most(
        "onnx",
        "L3",
        "cached decode against one forward",
        relative_error(got, reference.logits(prompt)),
        gate,
        unit="rel",
        compared=1,
        worst=prompt.id,
    )


def _shipped_rows(
    runner: OnnxRunner, level: int, reference: Reference, prompts: list[Sample]
) -> list[Check]:
    """The file as it is, where it asks for less than float32 activations."""
    compared = _Compared()
    for p in prompts:
        got = runner.logits(p, reference.position_ids(p))[:, : reference.vocabulary]
        compared.add_logits(p, got, reference.logits(p))
    name, detail = f"logits at accuracy_level {level}", "as shipped: int8 activations"
    return [_at_most(name, compared.logits, KERNEL_GATE, detail), compared.agreement(level)]


def _at_most(name: str, errors: list[tuple[float, str]], gate: float, detail: str) -> Check:
    """One L3 row over pairs of (error, prompt). It was not run if there is no pair."""
    if not errors:
        return Check.not_run("onnx", "L3", name, "no held-out prompt has an image")
    error, prompt = max(errors, key=lambda e: rank(e[0]))
    return Check.at_most(
        "onnx",
        "L3",
        name,
        error,
        gate,
        unit="rel",
        compared=len(errors),
        detail=detail,
        worst=prompt,
    )


def rank(error: float) -> float:
    """The order of errors, with NaN above every number. max() alone would pass over NaN."""
    return math.inf if math.isnan(error) else error
