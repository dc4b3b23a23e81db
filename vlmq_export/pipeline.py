"""recipe → calibrate → quantize → artifact → export → verify → report: the stages of one run, in that order."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from vlmq_export import bundled, checksums, formats, report
from vlmq_export.budget import chosen_types, planned_types
from vlmq_export.errors import ArtifactError, CheckpointError, FormatError, Interrupted, UsageError, VlmqError
from vlmq_export.formats.base import Check, CheckSettings
from vlmq_export.formats.gguf.mix import mix_named, module_types
from vlmq_export.formats.gptq.imported import GptqCheckpoint, quantization_of, write_artifact
from vlmq_export.output import claimed, publish, refuse_output
from vlmq_export.parity import PARITY_FILE, Parity, check_formats, forget_places
from vlmq_export.plan import RunPlan, artifact_plan, model_plan, plan_memory, plan_run, with_types
from vlmq_export.quantizer.artifact import MANIFEST, Artifact, write_atomic
from vlmq_export.quantizer.calibration import Preprocessor, Row, Sample, read_rows, refuse_unreadable
from vlmq_export.quantizer.checkpoint import Checkpoint, sha256_file
from vlmq_export.quantizer.distributed import Ranks, joined
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.loading import read_samples
from vlmq_export.quantizer.memory import MemoryPlan, free_memory
from vlmq_export.quantizer.model import pick_device
from vlmq_export.quantizer.quantize import quantize
from vlmq_export.quantizer.resuming import RUN
from vlmq_export.quantizer.rotation import rotated
from vlmq_export.quantizer.untrusted import read_json, third_party
from vlmq_export.recipe import RECIPE_FILE, ActOrder, Method, Recipe, Rotate, load_recipe
from vlmq_export.reference import Reference

log = logging.getLogger("vlmq_export")
Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass
class Hooks:
    """How a run talks to whoever started it."""

    progress: Progress = lambda *_: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class Result:
    """What a run left behind."""

    out: Path
    plan: RunPlan
    parity: Parity | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)  # format → lines for log and card
    seconds: dict[str, float] = field(default_factory=dict)  # stage → wall time

    @contextmanager
    def timed(self, stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - start, 1)


def run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False, hooks: Hooks | None = None) -> Result:
    """The whole job. Everything that can be refused is refused before the first weight is read."""
    hooks = hooks or Hooks()
    if not recipe.format:
        raise UsageError("no --format given; choose one or more of gptq, onnx, gguf")
    model = locate_model(recipe.model)
    artifact = Artifact(model) if (model / MANIFEST).is_file() else None
    checkpoint = None if artifact else open_checkpoint(model)
    recipe = recipe_of(recipe, artifact, checkpoint)
    imported = isinstance(checkpoint, GptqCheckpoint)
    plan = plan_of(recipe, checkpoint, artifact)
    if plan.refusals:
        raise UsageError("; ".join(plan.refusals))
    refuse_missing_packages(recipe)
    unquantized = None if imported else checkpoint
    if unquantized is not None:
        pick_device(recipe.device.value)  # raises where it is not there
    out = recipe.out or Path(f"vlmq-{plan.model.name}-{'export' if imported or artifact else recipe.label()}")
    refuse_output(out, model, recipe, overwrite=overwrite, resume=resume)
    rows = held_out(recipe.verify_data, recipe.image_root) if recipe.verify else []
    for file in checkpoint.companions if checkpoint else artifact.companions:
        if file.suffix == ".json":
            read_json(file)  # every writer reads some of them: better known before the work
    if recipe.verify:
        Preprocessor(artifact.source if artifact else model)  # raises for what the proof would miss after all the work
    samples, described = ([], {}) if unquantized is None else calibration_samples(recipe, unquantized, hooks)
    result = Result(out, plan)
    with joined(pick_device(recipe.device.value if unquantized else "cpu")) as ranks:
        if not ranks.first:
            if unquantized is not None:
                _quantize(recipe, unquantized, samples, described, result, hooks, ranks, resume=resume)
            return result
        with claimed(out, overwrite=overwrite):
            write_atomic(out / RECIPE_FILE, lambda t: t.write_text(recipe.to_yaml(), "utf-8"))
            with result.timed("quantize"):
                if unquantized is not None:
                    _quantize(recipe, unquantized, samples, described, result, hooks, ranks, resume=resume)
                elif not (out / "artifact").exists():
                    publish(out / "artifact", lambda folder: _take_over(folder, artifact, checkpoint, plan.model.name))
            _export(recipe, out, result, hooks)
            finish(out, recipe, result, rows, model if checkpoint else None, hooks)
    return result


def _quantize(
    recipe, checkpoint, samples, described, result: Result, hooks: Hooks, ranks: Ranks, *, resume: bool
) -> None:
    memory = result.plan.memory
    if recipe.target_bpw is not None:
        begun = result.out / "artifact" / RUN if resume else None
        with result.timed("choose types"):
            types = chosen_types(
                result.plan.model, recipe, checkpoint, samples, memory.host_free, ranks, begun, hooks.progress
            )
        result.plan = replace(result.plan, model=with_types(result.plan.model, types))
    tokens = sum(len(s.input_ids) for s in samples) // ranks.size
    memory = plan_memory(result.plan.model, recipe, memory.host_free, memory.device_free, tokens)
    _tell_memory(memory)
    quantize(
        checkpoint, samples, result.plan.model.config, result.out / "artifact", name=result.plan.model.name,
        calibration=described, device=recipe.device.value, resume=resume, place=memory.place, ranks=ranks,
        drop_images=True, progress=hooks.progress, should_stop=hooks.should_stop,
    )  # fmt: skip


def _take_over(folder: Path, artifact: Artifact | None, checkpoint: Checkpoint | None, name: str) -> None:
    """The artifact of a model that is quantized already: a copy, or what a GPTQ checkpoint holds."""
    if artifact is not None:
        shutil.copytree(artifact.path, folder, dirs_exist_ok=True)
    elif isinstance(checkpoint, GptqCheckpoint):
        write_artifact(checkpoint, folder, name)


def dry_run(recipe: Recipe) -> RunPlan:
    """What `run` would do, from config and headers alone; refusals are in the plan, not raised."""
    model = locate_model(recipe.model)
    if (model / MANIFEST).is_file():
        artifact = Artifact(model)
        return plan_of(recipe_of(recipe, artifact, None), None, artifact)
    checkpoint = open_checkpoint(model)
    return plan_of(recipe_of(recipe, None, checkpoint), checkpoint, None)


def verify(
    out: Path, *, verify_data: Path | None = None, image_root: Path | None = None, hooks: Hooks | None = None
) -> Result:
    """Run the parity checks again on what an earlier run wrote."""
    hooks = hooks or Hooks()
    if not (out / RECIPE_FILE).is_file():
        raise UsageError(f"{out}: no {RECIPE_FILE} here; give the --out folder of an earlier run")
    recipe = load_recipe(out / RECIPE_FILE, {})
    artifact = Artifact(out / "artifact")
    result = Result(out, plan_run(artifact_plan(artifact), recipe))
    rows = held_out(verify_data or recipe.verify_data, image_root or recipe.image_root)
    source = same_source(recipe.model, artifact)
    finish(out, recipe, result, rows, source, hooks, changed=checksums.changed_files(out), verify=True)
    return result


def locate_model(model: str | None, *, download: bool = True) -> Path:
    """A local folder, the bundled model, or a snapshot of a hub id: from the cache, or where the network allows."""
    if model is None:
        return bundled.REFERENCE_VLM
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kinds = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(model, allow_patterns=kinds, local_files_only=not download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        first = str(e).strip().splitlines()[0]
        raise CheckpointError(f"{model}: neither a local folder nor to be had from the hub ({first})") from None


def open_checkpoint(model: Path) -> Checkpoint:
    """A float checkpoint, or one that others quantized with GPTQ, which then shows its float model's shapes."""
    return Checkpoint(model) if quantization_of(model) is None else GptqCheckpoint(model)


def plan_of(recipe: Recipe, checkpoint: Checkpoint | None, artifact: Artifact | None) -> RunPlan:
    if artifact is not None:
        return plan_run(artifact_plan(artifact), recipe)
    assert checkpoint is not None
    name = "reference-vlm" if recipe.model is None else checkpoint.path.resolve().name
    if not isinstance(checkpoint, GptqCheckpoint):
        checkpoint = rotated(checkpoint, recipe.rotate.value, recipe.seed)
    model = model_plan(checkpoint, recipe.quant_config(), name)
    if recipe.gguf_type is not None:
        mix = mix_named(recipe.gguf_type)
        types = module_types(model, mix, recipe.tensor_type)
        model = with_types(model, types, mix)
    elif recipe.target_bpw is not None:
        model = with_types(model, planned_types(model, recipe))
    if isinstance(checkpoint, GptqCheckpoint):
        return plan_run(model, recipe)
    memory = plan_memory(model, recipe, *free_memory(pick_device(recipe.device.value), recipe.max_memory))
    return plan_run(model, recipe, memory)


def _tell_memory(memory: MemoryPlan) -> None:
    where = {"device": "with the layer", "host": "in host memory", "disk": "on disk"}[memory.place]
    log.debug("about %.1f GB of memory, activations of %.2f GB %s", memory.host / 1e9, memory.activations / 1e9, where)
    if not memory.fits:
        log.warning(
            "needs about %.1f GB of memory and %.1f GB on the GPU where %.1f and %.1f are free; it may be killed",
            *(n / 1e9 for n in (memory.host, memory.device, memory.host_free, memory.device_free)),
        )


def recipe_of(recipe: Recipe, artifact: Artifact | None, checkpoint: Checkpoint | None) -> Recipe:
    """The recipe with the grid that a quantized model has; a flag that asks for another is refused, not ignored."""
    if artifact is not None:
        c, what = artifact.config, "artifact"
        if c.types:
            if recipe.gguf_type is not None and mix_named(recipe.gguf_type) != c.gguf_type:
                raise UsageError(
                    f"--gguf-type {recipe.gguf_type}: the artifact has {c.gguf_type} already; quantize the model again"
                )
            if recipe.target_bpw is not None and c.gguf_type:
                raise UsageError(
                    f"{recipe.block_types}: the artifact has {c.gguf_type} already; quantize the model again"
                )
            recipe = recipe.model_copy(update={"gguf_type": c.gguf_type or None})
    elif isinstance(checkpoint, GptqCheckpoint):
        c, what = checkpoint.quant_config, "checkpoint"
    else:
        return recipe
    fixed = {"bits": c.bits, "group_size": c.group_size, "sym": c.symmetric, "act_order": ActOrder(c.act_order),
             "rotate": Rotate(c.rotate), "head_bits": c.head_bits or None}  # fmt: skip
    for key, value in fixed.items():
        if key in recipe.model_fields_set and getattr(recipe, key) not in (None, value):
            flag = "--" + key.replace("_", "-")
            raise UsageError(
                f"{flag} {getattr(recipe, key)}: the {what} has {'none' if value is None else value} already; "
                "quantize the float model again"
            )
    return recipe.model_copy(update=fixed | {"method": Method(c.method), "seed": c.seed})


def refuse_missing_packages(recipe: Recipe) -> None:
    """What writing needs must be here; what only proving needs is missed with a warning, before any work."""
    for name in (f.value for f in recipe.format):
        module = formats.get(name)
        hint = f"pip install 'vlmq-export[{name}]'"
        if lacking := [package for package in module.WRITES_WITH if find_spec(package) is None]:
            raise UsageError(f"--format {name} needs {', '.join(lacking)}; {hint}")
        if recipe.verify and (lacking := module.missing()):
            log.warning("%s will be written but not proven: %s not installed; %s", name, lacking, hint)


def held_out(path: Path | None, image_root: Path | None) -> list[Row]:
    """As many rows as the checks use. Raises CalibrationError for one of them that they could not use."""
    settings = CheckSettings()
    rows = read_rows(path or bundled.HELDOUT, image_root)[: max(settings.images, settings.questions)]
    refuse_unreadable(path or bundled.HELDOUT, rows)
    return rows


def calibration_samples(recipe: Recipe, checkpoint: Checkpoint, hooks: Hooks) -> tuple[list[Sample], dict]:
    """The samples of the recipe, and what the manifest says of them."""
    if recipe.method.value == "rtn":
        return [], {"rows": 0}
    path = recipe.calibration or bundled.CALIBRATION
    if recipe.calibration is None and recipe.model is not None:
        log.warning("calibrating on the bundled drawn images; give --calibration for images like those of your users")
    rows = draw(read_rows(path, recipe.image_root), recipe.samples, recipe.seed)
    seq_len = recipe.seq_len or family_of(checkpoint.config).seq_len

    def progress(done: int) -> None:
        hooks.progress("read samples", done, len(rows))
        if hooks.should_stop():
            raise Interrupted("stopped while reading samples; nothing was written")

    samples, dropped = read_samples(checkpoint.path, rows, seq_len, progress=progress)
    if not samples:
        raise UsageError(f"--seq-len {seq_len} would cut the vision tokens of all {len(rows)} samples; raise it")
    if dropped:
        log.warning("%d of %d samples dropped: --seq-len %d would cut their vision tokens", dropped, len(rows), seq_len)
    if all(s.pixel_values is None for s in samples):
        log.warning("%s: no sample has an image; the model is calibrated on text alone", path.name)
    tokens = sum(len(s.input_ids) for s in samples)
    vision = sum(int(s.vision.sum()) for s in samples)
    described = {
        "file": path.name, "sha256": sha256_file(path), "rows": len(samples), "dropped": dropped, "seq_len": seq_len,
        "tokens": tokens, "vision_tokens": vision,
    }  # fmt: skip
    return samples, described


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` rows drawn by `seed`, in the file's order; all of them if there are no more."""
    if count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _export(recipe: Recipe, out: Path, result: Result, hooks: Hooks) -> None:
    artifact = Artifact(out / "artifact")
    options = recipe.format_options(artifact.manifest.name)
    names = [f.value for f in recipe.format]
    for done, name in enumerate(names):
        hooks.progress("write", done, len(names))
        if hooks.should_stop():
            raise Interrupted(f"stopped before writing {name}; continue with --resume")
        with result.timed(f"write {name}"):
            if (out / name).is_dir():
                continue  # resumed: renamed only when whole
            module = formats.get(name)
            # The settings of a source model are as its author wrote them, and each writer reads others.
            with third_party(f"--format {name} cannot be written from this model", FormatError, keep=(OSError,)):
                result.notes[name] = publish(out / name, lambda folder, m=module: m.write(artifact, folder, options))
    hooks.progress("write", len(names), len(names))
    for name, notes in result.notes.items():
        for note in notes:
            log.info("%s: %s", name, note)


def same_source(model: str | None, artifact: Artifact) -> Path | None:
    """The source folder if it is still at hand and still what was quantized; else None."""
    try:
        path = locate_model(model, download=False)  # the recipe beside an artifact may be anybody's
        checkpoint = open_checkpoint(path)
        return path if checkpoint.fingerprint() == artifact.manifest.source else None
    except VlmqError:
        return None


def finish(
    out: Path, recipe: Recipe, result: Result, rows, source, hooks, *, changed=None, verify: bool | None = None
) -> None:
    """Verify if asked, then write parity.json, report, card and checksums."""
    artifact = Artifact(out / "artifact")
    options = recipe.format_options(artifact.manifest.name)
    folders = {f.value: out / f.value for f in recipe.format}
    if verify if verify is not None else recipe.verify:
        settings = CheckSettings(threads=os.cpu_count() or 1)
        with result.timed("verify"):
            memory, _ = free_memory(pick_device("cpu"), recipe.max_memory)
            with third_party("the reference cannot be built from this artifact", ArtifactError, keep=(OSError,)):
                reference = Reference(artifact.path, rows[: max(settings.images, settings.questions)], source, memory)
            result.parity = check_formats(folders, reference, options, settings, hooks.progress, hooks.should_stop)
        if changed is not None:
            result.parity.checks.insert(0, _checksum_row(changed))
            result.parity.verified &= not changed
        forget_places(result.parity.checks, out, source)
        result.parity.write(out / PARITY_FILE)
    report.write(out, recipe, artifact, result)
    checksums.write_sums(out)


def _checksum_row(changed: list[str]) -> Check:
    status = "failed" if changed else "passed"
    return Check(
        "all",
        "L0",
        "files as written (SHA-256)",
        status,
        float(len(changed)),
        0.0,
        "files",
        worst=", ".join(changed[:8]),
    )
