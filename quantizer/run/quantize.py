"""The quantizer's entry point: a checkpoint and samples in, an artifact folder out.

The folder is written layer by layer, so that a run that was stopped can go on. The phases of
`quantize` follow each other as they stand there; everything that they share is a `_Run`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlmq_export._version import __version__
from vlmq_export.errors import CalibrationError, Interrupted, UsageError
from vlmq_export.quantizer.arithmetic import exact_arithmetic, pick_device
from vlmq_export.quantizer.artifact.manifest import (
    OUTER,
    SCHEMA,
    TIMING,
    VISION,
    Manifest,
    ModuleRecord,
    layer_file,
)
from vlmq_export.quantizer.artifact.read import read_changed, read_layer, read_layer_records
from vlmq_export.quantizer.artifact.write import (
    write_changed,
    write_floats,
    write_layer,
    write_manifest,
    write_source,
)
from vlmq_export.quantizer.calibration.answer_loss import answer_factors, modality_ratios
from vlmq_export.quantizer.calibration.batches import HELD_OUT, Batch
from vlmq_export.quantizer.calibration.collect import TokenFactors
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk, restore
from vlmq_export.quantizer.calibration.offload import Place, Shelf
from vlmq_export.quantizer.calibration.token_weights import image_shape
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.host import give_back, peak_host
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer, scale_layer
from vlmq_export.quantizer.layers.head import quantize_head
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import groups_of
from vlmq_export.quantizer.model.rotation import RotatedCheckpoint, rotate_inner, rotated
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.run.clock import Clock
from vlmq_export.quantizer.run.first_pass import first_pass
from vlmq_export.quantizer.run.outer import solve_outer
from vlmq_export.quantizer.run.refusals import check_shapes, check_vision, refuse_many_lost
from vlmq_export.quantizer.run.resume import WHOLE, claim, identity
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.storage.tensors import DTYPES
from vlmq_export.quantizer.storage.whole_files import write_json
from vlmq_export.quantizer.vision.stage import solve_vision, tower_names

log = logging.getLogger("vlmq_export")
# Folder of activations that rest on disk. Each rank has its own, because each numbers its files.
SCRATCH = ".activations-{rank}.tmp"
Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


def quantize(
    checkpoint: Checkpoint,
    samples: list[Sample],
    config: QuantConfig,
    folder: Path,
    *,
    name: str,
    hub: tuple[str, str] = ("", ""),
    calibration: dict,
    device: str = "auto",
    resume: bool = False,
    place: Place = "device",
    room: int = 0,
    ranks: Ranks = ALONE,
    drop_images: bool = False,
    progress: Progress = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write the artifact of `checkpoint` into `folder`. A folder with a manifest is whole.

    name, hub: of the model, for the manifest; its repository on the hub and the revision.
    calibration: what the manifest says of the samples.
    resume: layers that are on disk are not solved again. The folder ends with the bytes of a run
        that was never stopped, given the same device and the same number of threads and of ranks.
    place: where activations rest between two uses.
    room: bytes of memory for what enters the `out` of MLPs, which else is made again.
    ranks: each is given all samples and walks its share. The first one writes, and the others need
        to read what it wrote.
    drop_images: take the pixels out of the list `samples` once the first pass has seen them.

    Raises UsageError, CheckpointError and CalibrationError, before heavy work where it can;
    ArtifactError when the folder belongs to another run; Interrupted once `should_stop()` is true.
    """
    checkpoint = rotated(checkpoint, config.rotate, config.seed)
    job = Job.of(checkpoint.architecture, config)
    _refuse(checkpoint, job, samples, ranks)
    run = _begun(checkpoint, job, samples, folder, pick_device(device), ranks, room)
    done = _layers_done(run, samples, calibration, resume)
    if done == WHOLE:
        return
    with exact_arithmetic(), _shelf(run, place) as shelf:
        outside = _outside_the_layers(run, samples, shelf, progress, should_stop)
        batches, lost = _first_batches(run, samples, outside, shelf)
        del outside
        if drop_images:
            samples[:] = [replace(sample, pixel_values=None) for sample in samples]
        give_back()
        said = _answers_say(run, batches)
        for index in range(job.layers):
            progress("quantize", index, job.layers)
            lost += _pass_layer(run, index, batches, said, solved=index < done)
            refuse_many_lost(lost, len(samples))
            give_back()
            if index >= done:
                _stop_if_asked(run, index, should_stop)
        if job.head and done <= job.layers:
            _solve_head(run, batches)
    progress("quantize", job.layers, job.layers)
    if ranks.first:
        _publish(run, (name, *hub), _described(run, calibration, samples, lost))


@dataclass(frozen=True)
class _Run:
    """What the phases of one run share."""

    checkpoint: Checkpoint
    model: StreamedModel
    job: Job
    folder: Path
    ranks: Ranks
    clock: Clock
    room: int  # bytes of memory for what MLPs have made


@dataclass(frozen=True)
class _Outside:
    """The quantized matrices outside the decoder layers, the output head apart."""

    outer: Sequence[Linear]  # the embedding
    tower: Sequence[Linear]  # those of the vision tower and the projector


@dataclass(frozen=True)
class _AnswersSay:
    """What a method takes from the gradients of the answers' loss, if anything."""

    ratios: Sequence[dict[str, float]]  # MBQ's of the closing modules, one dict for each layer
    factors: Sequence[TokenFactors] = ()  # of the tokens, one for each layer


@dataclass(frozen=True)
class _LinearShape:
    """A `refusals.Shape`, from a header."""

    name: str
    in_features: int


def _refuse(checkpoint: Checkpoint, job: Job, samples: Sequence[Sample], ranks: Ranks) -> None:
    """Raises UsageError for a recipe that cannot be solved, CalibrationError without samples."""
    names = [*job.linears, *job.outer]
    shapes = [(n, checkpoint.info(f"{n}.weight").shape) for n in names]
    check_shapes([_LinearShape(n, shape[1]) for n, shape in shapes], job)
    if job.config.vision_bits:
        tower = tower_names(checkpoint, short=job.config.vision_short)
        check_vision(tower, samples, job)
    if job.method.tuned and ranks.size > 1:
        raise UsageError("--tune works in one process; start without torchrun, or leave --tune out")
    if job.family.sparse and ranks.size > 1:
        raise UsageError("experts are solved in one process; start without torchrun")
    if job.method.tuned and len(samples) <= HELD_OUT // 2:
        raise CalibrationError(
            f"--tune puts one sample of {HELD_OUT} aside, and {len(samples)} are too few;"
            f" give {HELD_OUT} or more"
        )
    if job.method.calibrated and not samples:
        raise CalibrationError(
            f"method {job.config.method} needs calibration samples; give some, or use --method rtn"
        )


def _begun(
    checkpoint: Checkpoint,
    job: Job,
    samples: Sequence[Sample],
    folder: Path,
    device: torch.device,
    ranks: Ranks,
    room: int,
) -> _Run:
    """The model without weights, and a clock that runs."""
    clock = Clock(device, tokens=sum(len(sample.input_ids) for sample in samples))
    with clock("load"):
        model = StreamedModel(checkpoint, device)
        if isinstance(checkpoint, RotatedCheckpoint) and checkpoint.online:
            layers = [model.layer(i) for i in range(job.layers)]
            rotate_inner(layers, job.family.every_block, checkpoint.inner_rotation())
    return _Run(checkpoint, model, job, folder, ranks, clock, room)


def _layers_done(run: _Run, samples: Sequence[Sample], calibration: dict, resume: bool) -> int:
    """How many layers an earlier run left, or WHOLE. The folder is this run's from now on."""
    done = 0
    if run.ranks.first:
        decides = identity(
            run.checkpoint,
            samples,
            run.job.config,
            calibration,
            run.model.device,
            run.ranks.size,
        )
        done = claim(run.folder, decides, resume)
    return run.ranks.same(done)


def _outside_the_layers(
    run: _Run,
    samples: Sequence[Sample],
    shelf: Shelf,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> _Outside:
    """Solve the matrices outside the decoder layers, and write all that is not quantized.

    Raises Interrupted behind the vision tower.
    """
    tower: list[Linear] = []
    with run.clock("floats"):
        outer = solve_outer(run.checkpoint, run.job, run.folder, run.model.device, run.ranks)
    if run.job.config.vision_bits:
        with run.clock("vision"):
            tower = solve_vision(
                run.model,
                tower_names(run.checkpoint, short=run.job.config.vision_short),
                samples,
                run.job,
                run.folder,
                shelf,
                run.ranks,
                lambda done, steps: progress("vision", done, steps),
            )
    outside = _Outside(outer, tower)
    _write_floats(run, outside)
    if tower and run.ranks.count(should_stop()):
        raise Interrupted("stopped after the vision tower; continue with --resume")
    return outside


def _write_floats(run: _Run, outside: _Outside) -> None:
    """Write the source's files, and every tensor that is not quantized."""
    if not run.ranks.first:
        return
    job, checkpoint = run.job, run.checkpoint
    solved = [*job.linears, *([job.head] if job.head else [])]
    solved += [q.name for q in (*outside.outer, *outside.tower)]
    for index in range(job.layers):
        blocks = [b for b in job.architecture.blocks(index) if job.scales(b)]
        solved += [job.prefix(index) + n for block in blocks for n in (block.norm, *block.kept)]
    if (
        job.architecture.tied and outside.outer
    ):  # a checkpoint may store the output matrix all the same
        solved.append(job.family.head)
    taken = {f"{name}.{part}" for name in solved for part in ("weight", "bias")}
    with run.clock("floats"):
        write_source(run.folder, checkpoint, own_head=bool(job.head))
        write_floats(run.folder, checkpoint, [n for n in checkpoint.tensors if n not in taken])


@contextmanager
def _shelf(run: _Run, place: Place) -> Iterator[Shelf]:
    """This rank's shelf, whose files, if it has any, are gone afterwards."""
    scratch = run.folder / SCRATCH.format(rank=run.ranks.rank)
    if place == "disk":
        scratch.mkdir()
    try:
        yield Shelf(run.model.device, place, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _first_batches(
    run: _Run,
    samples: Sequence[Sample],
    outside: _Outside,
    shelf: Shelf,
) -> tuple[list[Batch], int]:
    """The batches at the first layer, and how many samples are lost already."""
    if not run.job.method.calibrated:
        return [], 0
    with run.clock("prefix"):
        outer, tower = outside.outer, outside.tower
        batches = first_pass(run.model, samples, outer, tower, run.job, shelf, run.ranks)
        lost = run.ranks.count(sum(batch.drop_non_finite() for batch in batches))
        refuse_many_lost(lost, len(samples))
    return batches, lost


def _answers_say(run: _Run, batches: Sequence[Batch]) -> _AnswersSay:
    """What the gradients of the answers' loss are asked for; nothing for most methods."""
    model, method = run.model, run.job.method
    chains = [run.job.architecture.blocks(index) for index in range(run.job.layers)]
    if method.scaling == "mbq":
        with run.clock("gradients"):
            outs = [[block.out for block in blocks] for blocks in chains]
            return _AnswersSay(modality_ratios(model, batches, outs, run.ranks))
    if method.importance == "answers":
        with run.clock("gradients"):
            names = [[name for group in groups_of(blocks) for name in group] for blocks in chains]
            return _AnswersSay((), answer_factors(model, batches, names))
    return _AnswersSay(())


def _pass_layer(
    run: _Run, index: int, batches: list[Batch], said: _AnswersSay, *, solved: bool
) -> int:
    """Take the batches past a layer, which is solved and written unless it was before.

    Returns how many samples were lost there.
    """
    job = run.job
    if job.method.calibrated and not run.ranks.count(sum(int(b.valid.sum()) for b in batches)):
        raise CalibrationError(
            f"no sample has finite activations at layer {index};"
            " the model or the images are damaged"
        )
    with run.clock("layers", None if solved else index), run.model.filled_layer(index) as layer:
        blocks, two = job.architecture.blocks(index), job.method.two_streams
        walk = LayerWalk(layer, blocks, batches, two_streams=two, room=run.room)
        if not solved:
            _solve_layer(run, walk, index, said)
        else:
            walk.pass_full()
            if not job.method.scaling:  # such a method stays on the full-precision stream
                prefix, floats = job.prefix(index), read_changed(run.folder, index)
                restore(layer, prefix, read_layer(run.folder, index), floats)
        return run.ranks.count(walk.advance())


def _solve_layer(run: _Run, walk: LayerWalk, index: int, said: _AnswersSay) -> None:
    """Quantize a layer and write it.

    The decoded weights stay in the layer for what follows, unless the method scales.
    """
    prefix = run.job.prefix(index)

    def dtype(name: str) -> torch.dtype:
        return DTYPES[run.checkpoint.info(name).dtype]

    def stored(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype(prefix + name)).float()

    if run.job.method.scaling:
        own = [said.ratios[index][b.out] for b in walk.blocks] if said.ratios else None
        linears, changed = scale_layer(walk, prefix, run.job, own, stored, run.ranks)
    else:
        answers = said.factors[index] if said.factors else None
        linears, changed = quantize_layer(walk, prefix, run.job, run.ranks, answers, stored)
    if run.ranks.first:
        if changed:
            write_changed(run.folder, index, {n: v.to(dtype(n)) for n, v in changed.items()})
        records = [ModuleRecord.of(linear, index, metrics) for linear, metrics in linears]
        write_layer(run.folder, index, [linear for linear, _ in linears], records)


def _stop_if_asked(run: _Run, index: int, should_stop: Callable[[], bool]) -> None:
    """Raises Interrupted after a layer that was just solved, unless nothing is left to do."""
    layers, clock = run.job.layers, run.clock
    log.debug(
        "layer %d of %d: %.1f s, %.0f tokens/s, peak %.2f GB",
        index + 1,
        layers,
        clock.layers[index],
        clock.tokens_per_second(),
        peak_host() / 1e9,
    )
    if index + 1 < layers + bool(run.job.head) and run.ranks.count(should_stop()):
        raise Interrupted(f"stopped after layer {index + 1} of {layers}; continue with --resume")


def _solve_head(run: _Run, batches: Sequence[Batch]) -> None:
    """Quantize the output head and write it. Its number follows the last decoder layer's."""
    index = run.job.layers
    with run.clock("head"):
        linear, metrics = quantize_head(run.model, batches, run.job, run.ranks)
        if run.ranks.first:
            write_layer(run.folder, index, [linear], [ModuleRecord.of(linear, index, metrics)])


def _described(run: _Run, calibration: dict, samples: Sequence[Sample], lost: int) -> dict:
    """What the manifest says of the samples, with what was found on the way."""
    if run.job.method.calibrated:
        calibration = calibration | {"non_finite": lost}
    # With lost samples the image that is pictured might be another one, of another shape.
    if run.job.method.importance != "none" and not lost:
        calibration = calibration | image_shape(samples)
    if lost:
        log.warning(
            "%d of %d samples left out: their activations are not finite", lost, len(samples)
        )
    return calibration


def _publish(
    run: _Run,
    origin: tuple[str, str, str],  # name, repository and revision of the model
    calibration: dict,
) -> None:
    """Write the manifest, which makes the folder a whole artifact."""
    name, repository, revision = origin
    outside = [i for i in (VISION, OUTER) if (run.folder / layer_file(i)).is_file()]
    files = [*outside, *range(run.job.layers + bool(run.job.head))]
    modules = [record for i in files for record in read_layer_records(run.folder, i)]
    if fallen := [m.name for m in modules if m.metrics.get("fallback")]:
        log.warning(
            "%d linears rounded to nearest, their Hessian is not definite, first %s;"
            " use more samples",
            len(fallen),
            fallen[0],
        )
    # The first of an expert's linears speaks for it.
    routed = [m for m in modules if m.name.endswith(".gate_proj") and "routed" in m.metrics]
    if few := [m.metrics for m in routed if "few" in m.metrics]:
        log.warning(
            "%d of %d experts had fewer than %d tokens; use more samples",
            len(few),
            len(routed),
            few[0]["few"],
        )
    write_json(run.folder / TIMING, run.clock.to_dict())
    write_manifest(
        run.folder,
        Manifest(
            SCHEMA,
            __version__,
            name,
            run.checkpoint.model_type,
            run.checkpoint.fingerprint(),
            run.job.config.to_dict(),
            calibration,
            modules,
            repository=repository,
            revision=revision,
        ),
    )
