"""Proves the files in an output folder, and writes what is said of them afterwards."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import ArtifactError, UsageError, VlmqError
from vlmq_export.formats.compressed_tensors.runtimes import vllm_loads
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.proof.checks import Check, CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.output import checksums
from vlmq_export.planning.run_plan import plan_run
from vlmq_export.proving.beside_source import float_source, measure
from vlmq_export.proving.fidelity import FIDELITY_FILE, Fidelity
from vlmq_export.proving.held_out import held_out_again
from vlmq_export.proving.parity import PARITY_FILE, Parity, check_formats, forget_places
from vlmq_export.proving.scores import EVAL_FILE, Evaluation
from vlmq_export.quantizer.arithmetic import pick_device, threads
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.host import free_memory
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.storage.untrusted import third_party
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import RECIPE_FILE, load_recipe
from vlmq_export.report import page
from vlmq_export.report.files import gptqmodel_loads, source_bytes
from vlmq_export.result import Result
from vlmq_export.sources.locate import same_source

log = logging.getLogger("vlmq_export")
SCRATCH = ".fidelity.tmp"  # folder of activations that rest on disk


def verify_folder(
    out: Path, verify_data: Path | None, image_root: Path | None, callbacks: Callbacks
) -> Result:
    """Run the parity checks again on what an earlier run wrote, and measure fidelity again.

    Raises UsageError for a folder that no run of ours wrote.
    """
    if not (out / RECIPE_FILE).is_file():
        raise UsageError(f"{out}: no {RECIPE_FILE} here; give the --out folder of an earlier run")
    recipe = load_recipe(out / RECIPE_FILE, {})
    artifact = Artifact(out / "artifact")
    result = Result(out, plan_run(artifact_plan(artifact), recipe))
    calibrated = artifact.manifest.calibration.get("sha256")
    rows = held_out_again(recipe, verify_data, image_root, calibrated)
    floats = same_source(recipe.model, artifact)
    result.source_bytes = source_bytes(floats)
    result.by_gptqmodel = gptqmodel_loads(result.plan.model, recipe.gptq_names)
    result.by_vllm = vllm_loads(result.plan.model)
    changed = checksums.changed_files(out)
    with result.timed("verify"):
        result.parity, result.fidelity = prove(out, recipe, rows, floats, callbacks, changed)
    describe(out, recipe, result, rows)
    return result


def prove(
    out: Path,
    recipe: Recipe,
    rows: list[Row],  # held-out
    floats: Path | None,  # the source's own float weights
    callbacks: Callbacks,
    changed: list[str] | None = None,  # files that are not as they were written; None: not known
) -> tuple[Parity, Fidelity]:
    """Compare every format with the reference, and the reference with the source.

    Writes parity.json and fidelity.json.
    """
    artifact = Artifact(out / "artifact")
    options = recipe.format_options(artifact.manifest.name)
    settings = CheckSettings()
    memory, _ = free_memory(pick_device("cpu"), recipe.max_memory)
    rows = rows[: max(settings.images, settings.questions)]
    with third_party(
        "the reference cannot be built from this artifact", ArtifactError, keep=(OSError,)
    ):
        seq_len = recipe.seq_len or artifact.architecture.family.seq_len
        reference = Reference(artifact.path, rows, floats, memory, seq_len)
    settings = replace(settings, threads=reference.threads)
    with threads(reference.threads):
        parity = check_formats(
            {name: out / name for name in recipe.format},
            reference,
            options,
            settings,
            callbacks.progress,
            callbacks.should_stop,
        )
        if changed is not None:
            parity.checks.insert(0, _checksum_row(changed))
            parity.verified &= not changed
        forget_places(parity.checks, out, floats)
        parity.write(out / PARITY_FILE)
        fidelity = _fidelity(out, recipe, reference, floats, callbacks, changed)
    fidelity.write(out / FIDELITY_FILE)
    return parity, fidelity


def _fidelity(
    out: Path,
    recipe: Recipe,
    reference: Reference,
    floats: Path | None,
    callbacks: Callbacks,
    changed: list[str] | None,
) -> Fidelity:
    """How much worse the reference is than the source.

    Where the source is not at hand any more, the figures of an earlier measurement stay, as long as
    the checksums say that they are of this artifact.
    """
    folder, why = float_source(recipe.model, floats, Artifact(out / "artifact"))
    device = pick_device("cpu" if recipe.device == "cpu" else "auto")
    found = measure(reference, folder, why, device, out / SCRATCH, callbacks)
    about = ("artifact/", FIDELITY_FILE)
    if found.measured or changed is None or any(name.startswith(about) for name in changed):
        return found
    with suppress(VlmqError):
        earlier = Fidelity.read(out / FIDELITY_FILE)
        if earlier.measured:
            return replace(earlier, not_again=found.not_measured)
    return found


def describe(out: Path, recipe: Recipe, result: Result, rows: list[Row]) -> None:
    """Write report and card, and the checksums of everything in the folder.

    rows: the held-out rows, whose images the report shows. Scores of an earlier evaluation stay.
    """
    if (out / EVAL_FILE).is_file():
        try:
            result.evaluation = Evaluation.read(out / EVAL_FILE)
        except VlmqError as e:
            log.warning("report and card are without benchmarks: %s", e)
    page.write(out, recipe, Artifact(out / "artifact"), result, rows)
    checksums.write_sums(out)


def _checksum_row(changed: list[str]) -> Check:
    """The row for files that are not as they were written; it passes where there are none."""
    return Check(
        "all",
        "L0",
        "files as written (SHA-256)",
        "failed" if changed else "passed",
        float(len(changed)),
        0.0,
        "files",
        worst=", ".join(changed[:8]),
    )
