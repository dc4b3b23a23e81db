"""Levels L1-L3 of a GPTQ folder: three decoders, every linear, the whole model."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.base import Check, CheckSettings, FormatOptions, answers_row, compare_weights, relative_error
from vlmq_export.formats.gptq import autogptq, runtime
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.reference import Reference

LOGITS_GATE = 1e-5  # both sides are float32 on the same weights: measured 5e-7, twenty times under it
KERNEL_GATE = 5e-3  # what the loader's own choice may lose in float16 or bfloat16: measured 1.5e-3
# One product in float32 against float64: rounding errors of the K terms add up as a random walk, eps·√K at most.
LINEAR_GATE_PER_SQRT_K = float(np.finfo(np.float32).eps)
TINY = np.finfo(np.float32).tiny  # a row of zeros has no relative error
ANSWER_TOKENS = 16
DEFAULT_KERNEL_SECONDS = 420.0  # includes compiling GPTQModel's C++ kernel once on a machine, about 100 s on 2 cores

missing = runtime.missing


def check(folder: Path, reference: Reference, options: FormatOptions, settings: CheckSettings) -> list[Check]:
    """Raises FormatError when the folder cannot be opened; every other failure is a row."""
    opened = GptqFolder(folder)
    rows = [own_decoder(opened, reference), autogptq_decoder(opened, reference)]
    if lacking := missing():
        why = f"{lacking} not installed; pip install 'vlmq-export[gptq]'"
        return rows + [Check.not_run("gptq", level, name, why) for level, name in _RUNTIME_ROWS]
    if reference.too_large:
        return rows + [Check.not_run("gptq", level, name, reference.too_large) for level, name in _RUNTIME_ROWS]
    prompts = reference.prompts[: settings.images]
    with tempfile.TemporaryDirectory(prefix="vlmq-gptq-") as scratch:
        request = runtime.Request(
            folder=str(folder.resolve()), out=f"{scratch}/exact", bits=opened.bits, threads=settings.threads,
            prompts=runtime.save_prompts(prompts, Path(scratch)), vocabulary=reference.vocabulary, limit=ANSWER_TOKENS,
            stop_ids=sorted(reference.stop_ids), backend="gptq_torch", exact=True,
        )  # fmt: skip
        try:
            outcome = runtime.run(request)
            rows += exact_rows(outcome, opened, reference)
        except runtime.RuntimeFailed as e:
            rows += [Check("gptq", level, name, "failed", detail=str(e)) for level, name in _RUNTIME_ROWS]
        rows.append(default_kernel(replace(request, out=f"{scratch}/default", backend=None, exact=False), reference))
    return rows


# --- L1: weights -------------------------------------------------------------------------------------------------------


def own_decoder(folder: GptqFolder, reference: Reference) -> Check:
    """Every weight of the model by our reader; a tensor that the model does not have is a fault too."""
    name = "weights read back by our decoder"
    try:
        row = compare_weights("gptq", name, reference.weights.items(), folder.array, count=reference.weights.count)
    except FormatError as e:
        return Check("gptq", "L1", name, "failed", detail=str(e), unit="mismatches")
    if extra := sorted(set(folder.weight_names()) - set(reference.weights.names())):
        row.status, row.worst = (
            "failed",
            ", ".join([*filter(None, [row.worst]), *(f"{n} (not in the model)" for n in extra[:8])]),
        )
    return row


def autogptq_decoder(folder: GptqFolder, reference: Reference) -> Check:
    """Every quantized linear by AutoGPTQ's QuantLinear. It knows v1 only."""
    name = "linears decoded by AutoGPTQ 0.7.1"
    if folder.version != "v1":
        return Check("gptq", "L1", name, "info", detail="AutoGPTQ reads v1 only; this folder is v2")
    file = autogptq.source_file()
    if file is None:
        if sys.version_info >= (3, 12):
            return Check("gptq", "L1", name, "info", detail="not run: its wheels end at Python 3.11")
        return Check.not_run("gptq", "L1", name, "not installed; pip install --no-deps auto-gptq==0.7.1")
    module = autogptq.load(file)
    names = reference.weights.linears
    count = sum(reference.weights.tensor(f"{n}.codes").numel() for n in names)
    expected = ((f"{n}.weight", reference.weights.array(f"{n}.weight")) for n in names)

    def read(weight: str) -> np.ndarray | None:
        stored = folder.stored_name(weight.removesuffix(".weight"))
        return autogptq.decode(module, folder, stored) if f"{stored}.qweight" in folder.tensors else None

    try:
        return compare_weights("gptq", name, expected, read, count=count)
    except (FormatError, RuntimeError, IndexError) as e:  # whatever its tensor code raises on a damaged file
        return Check("gptq", "L1", name, "failed", detail=str(e).splitlines()[0], unit="mismatches")


# --- L1 to L3 in transformers + gptqmodel ------------------------------------------------------------------------------

_RUNTIME_ROWS = (
    ("L1", "weights decoded by gptqmodel in the loaded model"),
    ("L2", "one linear at a time, gptq_torch in float32"),
    ("L3", "logits, transformers + gptqmodel, gptq_torch in float32"),
    ("L3", "greedy answers, transformers + gptqmodel, gptq_torch in float32"),
)


def exact_rows(outcome: runtime.Outcome, folder: GptqFolder, reference: Reference) -> Iterator[Check]:
    """The rows of _RUNTIME_ROWS, in that order."""
    module_name = folder.family.module_name
    yield compare_weights(
        "gptq", _RUNTIME_ROWS[0][1], reference.weights.items(), lambda hub: outcome.weight(module_name(hub)),
        count=reference.weights.count, detail=f"{outcome.kernel}, scales upcast to float32",
    )  # fmt: skip
    yield linear_row(outcome, module_name, reference)
    yield logits_row(outcome, reference)
    prompts = reference.prompts[: len(outcome.answers)]
    verdicts = {
        p.id: reference.judge(p, got, LOGITS_GATE, ANSWER_TOKENS)
        for p, got in zip(prompts, outcome.answers, strict=True)
    }
    said = f"same tokens as the reference, at most {ANSWER_TOKENS}"
    yield answers_row("gptq", _RUNTIME_ROWS[3][1], verdicts, unit="different", detail=said)


def linear_row(outcome: runtime.Outcome, module_name, reference: Reference) -> Check:
    """Each linear's worst row, of random ones and of those the first prompt brings, against float64 on decoded weights."""
    worst, worst_error, worst_ratio = "", 0.0, 0.0
    for name in reference.weights.linears:
        pair = outcome.linear(module_name(name))
        if pair is None:
            return Check(
                "gptq", "L2", _RUNTIME_ROWS[1][1], "failed", detail="not a quantized module in the runtime", worst=name
            )
        x, y = (a.astype(np.float64) for a in pair)
        want = x @ reference.weights.array(f"{name}.weight").astype(np.float64).T
        if f"{name}.bias" in reference.weights.floats:
            want += reference.weights.array(f"{name}.bias")
        error = float((np.linalg.norm(y - want, axis=1) / np.maximum(np.linalg.norm(want, axis=1), TINY)).max())
        ratio = error / (LINEAR_GATE_PER_SQRT_K * np.sqrt(x.shape[1]))
        if not ratio <= worst_ratio:  # NaN is the worst
            worst, worst_error, worst_ratio = name, error, ratio
    return Check.at_most(
        "gptq", "L2", _RUNTIME_ROWS[1][1], worst_ratio, 1.0, unit="eps·√K", compared=len(reference.weights.linears),
        detail=f"worst row {worst_error:.1e} relative; float32 sums of K products may lose eps·√K", worst=worst,
    )  # fmt: skip


def logits_row(outcome: runtime.Outcome, reference: Reference) -> Check:
    error, worst = worst_logits(outcome, reference)
    return Check.at_most(
        "gptq", "L3", _RUNTIME_ROWS[2][1], error, LOGITS_GATE, unit="rel", compared=len(outcome.answers),
        detail=f"{outcome.kernel}, scales upcast; worst image, all positions; {outcome.seconds:.0f} s", worst=worst,
    )  # fmt: skip


def worst_logits(outcome: runtime.Outcome, reference: Reference) -> tuple[float, str]:
    """The largest relative logit error of one prompt, and that prompt."""
    prompts = reference.prompts[: len(outcome.answers)]
    errors = [relative_error(outcome.logits(i), reference.logits(p)) for i, p in enumerate(prompts)]
    at = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    return errors[at], prompts[at].id


def default_kernel(request: runtime.Request, reference: Reference) -> Check:
    """The kernel that transformers picks when nobody says which, in float16. Its precision is its own: no gate."""
    request = replace(request, dtype="float16")
    try:
        outcome = runtime.run(request, timeout=DEFAULT_KERNEL_SECONDS)
    except runtime.RuntimeFailed as e:
        name = f"logits, kernel that the loader picks: {e.kernel or 'none loaded'}"
        return Check(
            "gptq", "L3", name, "info", detail=f'{e}; load with GPTQConfig(bits={request.bits}, backend="gptq_torch")'
        )
    error, worst = worst_logits(outcome, reference)
    side = "under" if error <= KERNEL_GATE else "OVER"
    different = sum(
        got != reference.answer(p, ANSWER_TOKENS)
        for p, got in zip(reference.prompts[: len(outcome.answers)], outcome.answers)
    )
    return Check(
        "gptq", "L3", f"logits, kernel that the loader picks: {outcome.kernel}", "info", error, unit="rel",
        compared=len(outcome.answers), worst=worst,
        detail=f"float16, {side} the {KERNEL_GATE:g} it should keep; {different} answers differ; "
        f"loading (and compiling, once) {outcome.load_seconds:.0f} s",
    )  # fmt: skip
