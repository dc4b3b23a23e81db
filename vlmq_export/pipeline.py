"""One run: recipe → calibrate → quantize → artifact → export → verify → report."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from vlmq_export import formats
from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import NOT_PROVEN, FormatError, Interrupted, UsageError
from vlmq_export.formats.compressed_tensors.runtimes import vllm_loads
from vlmq_export.formats.contract import FORMATS
from vlmq_export.output import hub
from vlmq_export.output.folder import claimed, publish, refuse_output
from vlmq_export.planning.proof_plan import not_provable
from vlmq_export.planning.run_plan import RunPlan, narrow_groups
from vlmq_export.proving.held_out import held_out
from vlmq_export.proving.verify import describe, prove
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.ranks import joined
from vlmq_export.quantizer.storage.untrusted import third_party
from vlmq_export.quantizer.storage.whole_files import write_atomic
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import RECIPE_FILE, placed
from vlmq_export.report.files import gptqmodel_loads, source_bytes
from vlmq_export.result import Result
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.locate import open_source
from vlmq_export.sources.source import Filling, Source

log = logging.getLogger("vlmq_export")


def run(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    push_to_hub: str | None = None,
    callbacks: Callbacks | None = None,
) -> Result:
    """The whole job. Everything that can be refused is refused before the first weight is read."""
    callbacks = callbacks or Callbacks()
    if not recipe.format:
        raise UsageError(f"no --format given; choose one or more of {', '.join(formats.NAMES)}")
    source = open_source(recipe.model)
    data = CalibrationRows(recipe)
    recipe = source.recipe_for(recipe, data)
    plan = _planned(source, recipe)
    _refuse(plan.refusals)
    _tell(plan)
    if push_to_hub:
        hub.refuse_push(push_to_hub, recipe)
    device = source.device(recipe)
    out = recipe.out or Path(f"vlmq-{plan.model.name}-{source.label(recipe)}")
    refuse_output(out, source.path, recipe, overwrite=overwrite, resume=resume)
    rows = held_out(data) if recipe.verify else []
    source.check_settings(verify=recipe.verify)
    plan = source.foreseen(plan, recipe, data)
    _refuse(plan.too_large)  # bad rows are refused with those of damaged pixels, as they are read
    calibration = source.calibration(data, callbacks)
    result = Result(
        out,
        plan,
        source_bytes=source_bytes(source.floats),
        by_gptqmodel=gptqmodel_loads(plan.model, recipe.gptq_names),
        by_vllm=vllm_loads(plan.model),
    )
    with joined(device) as ranks:
        filling = Filling(recipe, plan, calibration, ranks, resume, callbacks, result.timed)
        if not ranks.first:
            source.fill(out / "artifact", filling)
            return result
        with claimed(out, overwrite=overwrite):
            write_atomic(
                out / RECIPE_FILE, lambda t: t.write_text(placed(recipe).to_yaml(), "utf-8")
            )
            with result.timed("quantize"):
                result.plan = source.fill(out / "artifact", filling)
            _write_formats(recipe, result, callbacks)
            if recipe.verify:
                with result.timed("verify"):
                    result.parity, result.fidelity = prove(
                        out, recipe, rows, source.floats, callbacks
                    )
            describe(out, recipe, result, rows)
    if push_to_hub and result.verified:
        with result.timed("upload"):
            log.info("uploaded: %s", hub.push(out, push_to_hub, recipe.format))
    elif push_to_hub:
        log.error("%s: not uploaded, because its files are not verified", push_to_hub)
    return result


def _tell(plan: RunPlan) -> None:
    """Log what a user may not expect of the run."""
    if why := narrow_groups(plan.model):
        log.info("%s", why)
    for name, why in plan.not_provable.items():
        log.warning("%s will be written and not proven, exit code %d: %s", name, NOT_PROVEN, why)


def dry_run(recipe: Recipe, push_to_hub: str | None = None) -> RunPlan:
    """What `run` would do, from config and headers alone, and from the rows that it would take.

    What would be refused is in the plan, and not raised. Raises CalibrationError for rows that
    cannot be used, and UsageError for an upload that cannot be.
    """
    source = open_source(recipe.model)
    data = CalibrationRows(recipe)
    recipe = source.recipe_for(recipe, data)
    if push_to_hub:
        hub.refuse_push(push_to_hub, recipe)
    if recipe.calibration is not None or recipe.verify_data is not None:
        _ = held_out(data) if recipe.verify else data.taken
    plan = source.foreseen(_planned(source, recipe), recipe, data)
    return plan if plan.refusals else source.timed(plan, recipe, data)


def _refuse(lines: list[str]) -> None:
    """Raises UsageError with these lines, if there are any."""
    if lines:
        raise UsageError("; ".join(lines))


def _planned(source: Source, recipe: Recipe) -> RunPlan:
    """The source's plan, with what this machine lacks for writing and for proving."""
    plan = source.plan(recipe)
    return replace(
        plan, lacking=missing_packages(recipe), not_provable=not_provable(recipe, plan.model)
    )


def missing_packages(recipe: Recipe) -> list[str]:
    """A refusal for each format that packages are missing to write."""
    found = []
    for name in recipe.format:
        if lacking := [p for p in FORMATS[name].writes_with if find_spec(p) is None]:
            hint = f"pip install 'vlmq-export[{name}]'"
            found.append(f"--format {name} needs {', '.join(lacking)}; {hint}")
    return found


def _write_formats(recipe: Recipe, result: Result, callbacks: Callbacks) -> None:
    """Write every format that is not there yet. A folder is there only when it is whole."""
    out = result.out
    artifact = Artifact(out / "artifact")
    options = recipe.format_options(artifact.manifest.name)
    for done, name in enumerate(recipe.format):
        callbacks.progress("write", done, len(recipe.format))
        if callbacks.should_stop():
            raise Interrupted(f"stopped before writing {name}; continue with --resume")
        with result.timed(f"write {name}"):
            if (out / name).is_dir():
                continue
            package = FORMATS[name]
            # The settings of a source model are as its author wrote them, and each writer reads
            # others of them.
            with third_party(
                f"--format {name} cannot be written from this model", FormatError, keep=(OSError,)
            ):
                result.notes[name] = publish(
                    out / name, lambda folder, p=package: p.write(artifact, folder, options)
                )
    callbacks.progress("write", len(recipe.format), len(recipe.format))
    for name, notes in result.notes.items():
        for note in notes:
            log.info("%s: %s", name, note)
