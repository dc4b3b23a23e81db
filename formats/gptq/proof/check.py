"""The proof of a GPTQ folder: three decoders, every linear, and the whole model.

    L1  every weight by our reader, by AutoGPTQ's decoder, and by gptqmodel in the loaded model
    L2  each quantized linear alone in its kernel
    L3  logits and greedy answers of transformers with gptqmodel

The model is run in float32 with the kernel gptq_torch. The kernel that the loader picks by itself
computes in float16, and is reported without a gate.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.proof import autogptq, runtime
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.gptq.requirements import missing
from vlmq_export.formats.proof.answers import ANSWER
from vlmq_export.formats.proof.checks import (
    Check,
    CheckSettings,
    Steps,
    answers_row,
    compare_weights,
    relative_error,
)
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.sample import Sample

# Of logits, where both sides compute in float32 on the same weights. Measured was 5e-7.
LOGITS_GATE = 1e-5
# What the loader's own choice may lose in float16 or bfloat16. Measured was 1.5e-3.
KERNEL_GATE = 5e-3
# Of one product in float32 against float64, in parts of ‖w row‖·‖X‖ and per √K. A running sum of K
# terms of one sign, each rounding by half an eps at most, loses 0.29·eps·√K; kernels add in several
# sums. Measured were 0.03 of this gate at 512 columns, 0.04 at 4096 where all terms have one sign.
LINEAR_GATE_PER_SQRT_K = float(np.finfo(np.float32).eps) / 4
# This includes compiling GPTQModel's C++ kernel, about 100 s on 2 cores, once on a machine.
DEFAULT_KERNEL_SECONDS = 420.0

# The steps, and their shares of the time.
_PARTS = {"weights": 10, "reference": 45, "whole model": 30, "the loader's kernel": 15}

_DECODED = "weights decoded by gptqmodel in the loaded model"
_LINEARS = "one linear at a time, gptq_torch in float32"
_LOGITS = "logits, transformers + gptqmodel, gptq_torch in float32"
_ANSWERS = "greedy answers, transformers + gptqmodel, gptq_torch in float32"
_RUNTIME_ROWS = (("L1", _DECODED), ("L2", _LINEARS), ("L3", _LOGITS), ("L3", _ANSWERS))


def check(
    folder: Path, reference: Reference, options: FormatOptions, settings: CheckSettings
) -> list[Check]:
    """All rows. A check that fails or cannot run is a row too.

    Raises FormatError when the folder cannot be opened.
    """
    steps = Steps(settings.tell, _PARTS)
    steps.begin("weights")
    opened = GptqFolder(folder)
    rows = [own_decoder(opened, reference), autogptq_decoder(opened, reference)]
    if lacking := missing():
        why = f"{lacking} not installed; pip install 'vlmq-export[gptq]'"
    else:
        why = reference.too_large
    if why:
        return rows + [Check.not_run("gptq", level, name, why) for level, name in _RUNTIME_ROWS]
    with tempfile.TemporaryDirectory(prefix="vlmq-gptq-") as scratch:
        exact, picked = requests = _requests(opened, reference, settings, Path(scratch))
        with runtime.Worker(requests) as worker:
            steps.begin("reference")
            _prepare(reference, reference.prompts[: settings.images], steps)
            try:
                outcome = worker.outcome(tell=_teller(steps, "whole model", exact))
                rows += exact_rows(outcome, opened, reference)
            except runtime.RuntimeFailed as e:
                said = str(e)
                rows += [
                    Check("gptq", level, name, "failed", detail=said)
                    for level, name in _RUNTIME_ROWS
                ]
            rows.append(default_kernel(worker, picked, reference, steps))
    return rows


def _requests(
    folder: GptqFolder, reference: Reference, settings: CheckSettings, scratch: Path
) -> tuple[runtime.Request, runtime.Request]:
    """The exact run, and that of the kernel that the loader picks in float16."""
    exact = runtime.Request(
        folder=str(folder.path.resolve()),
        out=str(scratch / "exact"),
        bits=folder.bits,
        threads=settings.threads,
        prompts=runtime.save_prompts(reference.prompts[: settings.images], scratch),
        vocabulary=reference.vocabulary,
        limit=ANSWER,
        stop_ids=sorted(reference.stop_ids),
        backend="gptq_torch",
        exact=True,
    )
    out = str(scratch / "default")
    return exact, replace(exact, out=out, backend=None, exact=False, dtype="float16")


def _prepare(reference: Reference, prompts: list[Sample], steps: Steps) -> None:
    """Compute what the runtime's results are compared with, while the runtime works."""
    for done, prompt in enumerate(prompts):
        steps.begin("reference", done, 2 * len(prompts))
        reference.logits(prompt)
    count = len(prompts)
    reference.answer_all(prompts, lambda done: steps.begin("reference", count + done, 2 * count))


def _teller(steps: Steps, part: str, request: runtime.Request) -> runtime.Told:
    """Tells how many prompts a worker has done. Until the first is, the model is being loaded."""
    steps.begin(part)
    loading = len(request.prompts)  # loading the reference VLM takes as long as all its prompts
    # One share is left for the answers, which come after the last prompt's logits.
    return lambda done: steps.begin(part, done and loading + done, 2 * loading + 1)


# --- L1 without a runtime -------------------------------------------------------------------------


def own_decoder(folder: GptqFolder, reference: Reference) -> Check:
    """Every weight of the model by our reader. A tensor that the model does not have fails too."""
    name, weights = "weights read back by our decoder", reference.weights
    try:
        row = compare_weights("gptq", name, weights.items(), folder.array, count=weights.count)
    except FormatError as e:
        return Check("gptq", "L1", name, "failed", detail=str(e), unit="mismatches")
    if extra := sorted(set(folder.weight_names()) - set(weights.names())):
        row.status = "failed"
        wrong = [row.worst, *(f"{n} (not in the model)" for n in extra[:8])]
        row.worst = ", ".join(filter(None, wrong))
    return row


def autogptq_decoder(folder: GptqFolder, reference: Reference) -> Check:
    """Every quantized linear by AutoGPTQ's QuantLinear, which knows v1 only."""
    name, weights = "linears decoded by AutoGPTQ 0.7.1", reference.weights
    if folder.version != "v1":
        return Check("gptq", "L1", name, "info", detail="AutoGPTQ reads v1 only; this folder is v2")
    file = autogptq.source_file()
    if file is None and sys.version_info >= (3, 12):
        return Check("gptq", "L1", name, "info", detail="not run: its wheels end at Python 3.11")
    if file is None:
        why = "not installed; pip install --no-deps auto-gptq==0.7.1"
        return Check.not_run("gptq", "L1", name, why)
    module = autogptq.load(file)
    count = sum(weights.tensor(f"{n}.codes").numel() for n in weights.linears)
    expected = ((f"{n}.weight", weights.array(f"{n}.weight")) for n in weights.linears)

    def read(weight: str) -> np.ndarray | None:
        stored = folder.stored_name(weight.removesuffix(".weight"))
        if f"{stored}.qweight" not in folder.tensors:
            return None
        return autogptq.decode(module, folder, stored)

    # The last two are what its tensor code raises on damaged parts.
    try:
        return compare_weights("gptq", name, expected, read, count=count)
    except (FormatError, RuntimeError, IndexError) as e:
        return Check("gptq", "L1", name, "failed", detail=str(e).splitlines()[0], unit="mismatches")


# --- L1 to L3 in transformers with gptqmodel ------------------------------------------------------


def exact_rows(
    outcome: runtime.Outcome, folder: GptqFolder, reference: Reference
) -> Iterator[Check]:
    """The rows of _RUNTIME_ROWS, in that order."""
    module_name = folder.family.module_name
    yield compare_weights(
        "gptq",
        _DECODED,
        reference.weights.items(),
        lambda hub: outcome.weight(module_name(hub)),
        count=reference.weights.count,
        detail=f"{outcome.kernel}, scales upcast to float32",
    )
    yield linear_row(outcome, module_name, reference)
    yield logits_row(outcome, reference)
    prompts = reference.prompts[: len(outcome.answers)]
    verdicts = {
        p.id: reference.judge(p, got, LOGITS_GATE)
        for p, got in zip(prompts, outcome.answers, strict=True)
    }
    said = f"same tokens as the reference, at most {ANSWER}"
    yield answers_row("gptq", _ANSWERS, verdicts, unit="different", detail=said)


def linear_row(
    outcome: runtime.Outcome,
    module_name: Callable[[str], str],  # hub name → name in the module tree
    reference: Reference,
) -> Check:
    """Each linear in its kernel against a float64 product with the decoded weights.

    Its input is random rows, and rows that the first prompt brings. The worst output counts.
    """
    worst, worst_error, worst_ratio = "", 0.0, 0.0
    for name in reference.weights.linears:
        pair = outcome.linear(module_name(name))
        if pair is None:
            why = "not a quantized module in the runtime"
            return Check("gptq", "L2", _LINEARS, "failed", detail=why, worst=name)
        x, y = (a.astype(np.float64) for a in pair)
        error = _worst_output(x, y, name, reference)
        ratio = error / (LINEAR_GATE_PER_SQRT_K * np.sqrt(x.shape[1]))
        if not ratio <= worst_ratio:  # NaN is the worst
            worst, worst_error, worst_ratio = name, error, ratio
    return Check.at_most(
        "gptq",
        "L2",
        _LINEARS,
        worst_ratio,
        1.0,
        unit="eps·√K/4",
        compared=len(reference.weights.linears),
        detail=f"worst output {worst_error:.1e} of ‖w row‖·‖X‖;"
        " float32 sums of K products may lose eps·√K/4",
        worst=worst,
    )


def _worst_output(x: np.ndarray, y: np.ndarray, name: str, reference: Reference) -> float:
    """The largest error of an output of the linear `name`, relative to what its sum is made of.

    x: float64 [M, K]; y: float64 [M, N], what the kernel gave.
    It is not relative to the output itself: where the terms of a sum cancel, a right kernel loses
    any share of what is left. Nor is it over several outputs together, where the largest row of the
    weight would hide an error in all others.
    """
    weights = reference.weights
    weight = weights.array(f"{name}.weight").astype(np.float64)  # [N, K]
    bias = np.zeros(len(weight))
    if f"{name}.bias" in weights.floats:
        bias = weights.array(f"{name}.bias").astype(np.float64)
    lost = np.linalg.norm(y - (x @ weight.T + bias), axis=0)
    terms = np.linalg.norm(weight, axis=1) * np.linalg.norm(x) + np.abs(bias) * np.sqrt(len(x))
    return float((lost / np.maximum(terms, np.finfo(np.float64).tiny)).max())


def logits_row(outcome: runtime.Outcome, reference: Reference) -> Check:
    """The logits of every position of every prompt."""
    error, worst = worst_logits(outcome, reference)
    return Check.at_most(
        "gptq",
        "L3",
        _LOGITS,
        error,
        LOGITS_GATE,
        unit="rel",
        compared=len(outcome.answers),
        detail=f"{outcome.kernel}, scales upcast; worst image, all positions;"
        f" {outcome.seconds:.0f} s",
        worst=worst,
    )


def worst_logits(outcome: runtime.Outcome, reference: Reference) -> tuple[float, str]:
    """The largest relative error of a prompt's logits, and the id of that prompt."""
    prompts = reference.prompts[: len(outcome.answers)]
    errors = [relative_error(outcome.logits(i), reference.logits(p)) for i, p in enumerate(prompts)]
    at = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    return errors[at], prompts[at].id


def default_kernel(
    worker: runtime.Worker, request: runtime.Request, reference: Reference, steps: Steps
) -> Check:
    """The kernel that transformers picks by itself, in float16.

    It has no gate, because its precision is its own.
    """
    try:
        tell = _teller(steps, "the loader's kernel", request)
        outcome = worker.outcome(timeout=DEFAULT_KERNEL_SECONDS, tell=tell)
    except runtime.RuntimeFailed as e:
        name = f"logits, kernel that the loader picks: {e.kernel or 'none loaded'}"
        why = f'{e}; load with GPTQConfig(bits={request.bits}, backend="gptq_torch")'
        return Check("gptq", "L3", name, "info", detail=why)
    error, worst = worst_logits(outcome, reference)
    side = "under" if error <= KERNEL_GATE else "OVER"
    prompts = reference.prompts[: len(outcome.answers)]
    different = sum(got != reference.answer(p) for p, got in zip(prompts, outcome.answers))
    return Check(
        "gptq",
        "L3",
        f"logits, kernel that the loader picks: {outcome.kernel}",
        "info",
        error,
        unit="rel",
        compared=len(outcome.answers),
        detail=f"float16, {side} the {KERNEL_GATE:g} it should keep; {different} answers differ;"
        f" loading (and compiling, once) {outcome.load_seconds:.0f} s",
        worst=worst,
    )
