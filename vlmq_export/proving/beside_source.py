"""Measures fidelity: the source in full precision beside the reference, on held-out rows.

KL and agreement are measured part by part, so that a model of any size can be. Greedy answers need
both models whole. The reference has its answers already, from the parity checks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import FormatError, Interrupted, VlmqError
from vlmq_export.formats.gptq.imports.scheme import quantization_of
from vlmq_export.formats.proof.answers import greedy_answers
from vlmq_export.formats.proof.decoded import DecodedCheckpoint
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.proving.fidelity import Example, Fidelity, mean_over_tokens, verdict
from vlmq_export.proving.parity import without_places
from vlmq_export.quantizer.artifact.manifest import MANIFEST
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.batches import BATCH_TOKENS
from vlmq_export.quantizer.calibration.divergence import Distance
from vlmq_export.quantizer.calibration.offload import Place, Shelf
from vlmq_export.quantizer.host import give_back
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.run.side_by_side import answer_distances, steps
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.storage.untrusted import third_party
from vlmq_export.recipes.recipe_file import RECIPE_FILE, load_recipe
from vlmq_export.sources.locate import same_source

ROWS = 32  # held-out rows that are compared, at most
LONGEST = BATCH_TOKENS  # tokens of a row: as many as the memory plan of a run allows a batch
TOKENS = 8 * BATCH_TOKENS  # in all rows
EXAMPLES = 6  # rows whose answers the report shows
WORST = 3  # of these, the worst ones; the others go down to the best in equal steps
_SHARE = 0.05  # of the memory that activations may take before they rest on disk
_SHOWN = 600  # characters of a question or an answer that are kept


def float_source(
    model: str | None, floats: Path | None, artifact: Artifact
) -> tuple[Path | None, str]:
    """The folder of the source's own float weights, or None and why it is not at hand.

    model: MODEL of the recipe. Where it is an artifact of ours, the recipe beside that artifact
        says what it was made from.
    floats: the folder of MODEL, where it is known to be what was quantized.
    """
    place = None if model is None else Path(model).expanduser()
    if floats is None and place is not None and (place / MANIFEST).is_file():
        with suppress(VlmqError):
            floats = same_source(load_recipe(place.parent / RECIPE_FILE, {}).model, artifact)
        if floats is None:
            return None, "MODEL is an artifact, and the model that it was made from is not at hand"
    if floats is None:
        return None, "the model that was quantized is not at hand any more, or has changed since"
    if quantization_of(floats) is not None:
        return None, "the source is a GPTQ checkpoint, and the model behind it is not at hand"
    return floats, ""


def measure(
    reference: Reference,
    floats: Path | None,  # the source's float weights
    why: str,  # why they are not at hand
    device: torch.device,  # where models are streamed
    scratch: Path,  # a folder for activations that do not fit in memory; removed afterwards
    callbacks: Callbacks,
) -> Fidelity:
    """How much worse the reference is than the source.

    Nothing is raised for what cannot be measured: the reason takes the place of the figures. Raises
    Interrupted once `should_stop()` is true.
    """
    start = time.perf_counter()
    if floats is None:
        return Fidelity(not_measured=why)
    try:
        with third_party("the models cannot be compared", FormatError, keep=(OSError,)):
            found = _measured(reference, floats, device, scratch, callbacks)
    except Interrupted:
        raise
    except (VlmqError, OSError) as e:
        told = without_places(str(e), floats, reference.artifact, scratch)
        found = Fidelity(not_measured=f"the comparison broke down: {told}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        give_back()
    found.seconds = round(time.perf_counter() - start, 1)
    return found


def _measured(
    reference: Reference, floats: Path, device: torch.device, scratch: Path, callbacks: Callbacks
) -> Fidelity:
    """The figures. Raises VlmqError for what cannot be measured."""
    samples, left_out = _samples(reference)
    if not samples:
        return Fidelity(left_out=left_out, not_measured=f"every row is over {LONGEST} tokens long")
    source = Checkpoint(floats)
    whole = not reference.too_large
    walk = steps(source.architecture.layers)
    count = _Steps(callbacks, walk + whole * len(samples))
    places = list(samples)
    distances = dict(
        zip(places, _distances(reference, source, list(samples.values()), device, scratch, count))
    )
    answers = _answers(reference, source, places, count) if whole else {}
    found = _figures(distances, answers)
    found.left_out, found.answers_not_run = left_out, reference.too_large
    found.examples = _examples(reference, distances, answers)
    return found


@dataclass
class _Steps:
    """Tells the progress of one measurement, and stops it where that is asked for."""

    callbacks: Callbacks
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        self.callbacks.progress("fidelity", self.done, self.total)
        if self.done < self.total and self.callbacks.should_stop():
            raise Interrupted(
                "stopped before fidelity was measured;"
                " the files are written, --resume or verify measures it"
            )


def _samples(reference: Reference) -> tuple[dict[int, Sample], int]:
    """Place among the rows → sample with its answer, and how many of the first rows are left out.

    Rows of more than LONGEST tokens are left out, and those that would bring all of them over
    TOKENS, so that the comparison stays within the memory of the run that came before.
    """
    kept: dict[int, Sample] = {}
    total = 0
    rows = reference.rows[:ROWS]
    for place, row in enumerate(rows):
        sample = reference.preprocessor.sample(row)
        length = len(sample.input_ids)
        if length <= LONGEST and total + length <= TOKENS:
            kept[place] = sample
            total += length
    return kept, len(rows) - len(kept)


def _distances(
    reference: Reference,
    source: Checkpoint,
    samples: list[Sample],
    device: torch.device,
    scratch: Path,
    step: Callable[[], None],
) -> list[Distance]:
    """The distance of reference and source at each sample's answer tokens.

    Raises FormatError for activations that are not finite.
    """
    decoded = DecodedCheckpoint(reference.weights, reference.folder)
    models = StreamedModel(source, device), StreamedModel(decoded, device)
    hidden = int(source.architecture.text["hidden_size"])
    held = 4 * hidden * sum(len(sample.input_ids) for sample in samples)  # bytes
    roomy = reference.memory is None or held <= _SHARE * reference.memory
    place: Place = "device" if roomy else "disk"
    if place == "disk":
        scratch.mkdir(parents=True, exist_ok=True)
    found = answer_distances(*models, samples, Shelf(device, place, scratch), step)
    if not all(bool(torch.isfinite(each.kl).all()) for each in found):
        raise FormatError("activations of the source or of the quantized model are not finite")
    return found


def _answers(
    reference: Reference, source: Checkpoint, places: Sequence[int], step: Callable[[], None]
) -> dict[int, tuple[list[int], list[int]]]:
    """Place of a row → the greedy answers of full precision and of the reference, as token ids."""
    # The reference comes first: its weights are decoded before those of the source are there.
    asked = [reference.prompts[i] for i in places]
    reference.answer_all(asked)
    model = load_model(source, torch.device("cpu"))
    # A repetition penalty in the source's own settings would hold for one of the two alone.
    model.generation_config = reference.model.generation_config
    found = {}
    inputs = [prompt.model_inputs() for prompt in asked]
    for place, full in greedy_answers(model, inputs, reference.stop_ids):
        found[places[place]] = full, reference.answer(asked[place])
        step()
    return found


def _figures(
    distances: dict[int, Distance], answers: dict[int, tuple[list[int], list[int]]]
) -> Fidelity:
    """Means over the answer tokens with their standard errors, and the verdict."""
    each = list(distances.values())
    counts = [len(d.kl) for d in each]
    kl, kl_error = mean_over_tokens([float(d.kl.sum()) for d in each], counts)
    same, same_error = mean_over_tokens([float(d.same.sum()) for d in each], counts)
    changed = sum(full != own for full, own in answers.values()) if answers else None
    equal = None if changed is None else 1 - changed / len(answers)
    return Fidelity(
        rows=len(distances),
        tokens=sum(counts),
        kl=kl,
        kl_error=kl_error,
        agreement=same,
        agreement_error=same_error,
        answers=len(answers) or None,
        changed=changed,
        verdict=verdict(same, equal),
        not_measured="" if sum(counts) or answers else "no held-out row has an answer",
    )


def _examples(
    reference: Reference,
    distances: dict[int, Distance],
    answers: dict[int, tuple[list[int], list[int]]],
) -> list[Example]:
    """A few rows with both answers, the worst ones first, whatever they are.

    Of the others, rows with images are preferred.
    """
    every = [_example(reference, i, d, answers.get(i)) for i, d in distances.items()]
    ranked = sorted(every, key=lambda e: (not e.changed, -(e.kl or 0.0)))
    worst, others = ranked[:WORST], ranked[WORST:]
    pictured = [e for e in others if reference.rows[e.row].images]
    others = pictured if len(pictured) >= EXAMPLES - WORST else others
    return worst + [others[place] for place in shown(len(others), EXAMPLES - WORST)]


def shown(count: int, most: int) -> list[int]:
    """Which of `count` ranked rows are shown: at most `most`, in equal steps down to the last."""
    if count <= most:
        return list(range(count))
    return [round((count - 1) * (n + 1) / most) for n in range(most)]


def _example(
    reference: Reference, place: int, distance: Distance, both: tuple[list[int], list[int]] | None
) -> Example:
    """One row as the report shows it."""
    row = reference.rows[place]
    example = Example(
        place,
        row.id,
        _question(row),
        row.answer[:_SHOWN],
        float(distance.kl.mean()) if len(distance.kl) else None,
    )
    if both is not None:
        decode = reference.preprocessor.tokenizer.decode
        full, own = (decode(ids, skip_special_tokens=True).strip()[:_SHOWN] for ids in both)
        example.full, example.quantized, example.changed = full, own, both[0] != both[1]
    return example


def _question(row: Row) -> str:
    """The text of the last turn that is the user's."""
    turns = [turn for turn in row.messages if turn["role"] == "user"]
    content = turns[-1]["content"] if turns else []
    return " ".join(part["text"].strip() for part in content if "text" in part)[:_SHOWN]
