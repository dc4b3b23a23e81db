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
    Manifest,
    ModuleRecord,
)
from vlmq_export.quantizer.artifact.read import read_layer, read_layer_records
from vlmq_export.quantizer.artifact.write import (
    write_changed,
    write_floats,
    write_layer,
    write_manifest,
    write_source,
)
from vlmq_export.quantizer.calibration.answer_loss import MBQ_TYPES, modality_ratios
from vlmq_export.quantizer.calibration.batches import HELD_OUT, Batch
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk, restore
from vlmq_export.quantizer.calibration.offload import Place, Shelf
from vlmq_export.quantizer.calibration.token_weights import image_shape
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.linears import BlockLinear
from vlmq_export.quantizer.host import give_back, peak_host
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer, scale_layer
from vlmq_export.quantizer.layers.head import quantize_head
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.rotation import RotatedCheckpoint, rotate_inner, rotated
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.run.clock import Clock
from vlmq_export.quantizer.run.first_pass import first_pass
from vlmq_export.quantizer.run.outer import solve_outer
from vlmq_export.quantizer.run.refusals import check_shapes, refuse_many_lost
from vlmq_export.quantizer.run.resume import WHOLE, claim, identity
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.storage.whole_files import write_json

log = logging.getLogger("vlmq_export")
# Folder of activations that rest on disk. Each rank has its own, because each numbers its files.
SCRATCH = ".activations-{rank}.tmp"
Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all
Ratios = dict[str, list[float]]  # MBQ's, by module: one figure a layer


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
    ranks: each is given all samples and walks its share. The first one writes, and the others need
        to read what it wrote.
    drop_images: take the pixels out of the list `samples` once the first pass has seen them. They
        are often more than the activations.

    Raises UsageError, CheckpointError and CalibrationError, before heavy work where it can;
    ArtifactError when the folder belongs to another run; Interrupted after a layer was published
    and `should_stop()` is true.
    """
    checkpoint = rotated(checkpoint, config.rotate, config.seed)
    job = Job.of(checkpoint.architecture, config)
    _refuse(checkpoint, job, samples, ranks)
    run = _begun(checkpoint, job, samples, folder, pick_device(device), ranks)
    done = _layers_done(run, samples, calibration, resume)
    if done == WHOLE:
        return
    outer = _outside_the_layers(run)
    with exact_arithmetic(), _shelf(run, place) as shelf:
        batches, lost = _first_batches(run, samples, outer, shelf)
        if drop_images:
            samples[:] = [replace(sample, pixel_values=None) for sample in samples]
        give_back()
        ratios = _modality_ratios(run, batches)
        for index in range(job.layers):
            progress("quantize", index, job.layers)
            lost += _pass_layer(run, index, batches, ratios, solved=index < done)
            refuse_many_lost(lost, len(samples))
            give_back()
            if index >= done:
                _stop_if_asked(run, index, should_stop)
        if job.head and done <= job.layers:
            _solve_head(run, batches)
    progress("quantize", job.layers, job.layers)
    if ranks.first:
        _publish(run, (name, *hub), _described(run, calibration, samples, lost), outer)


@dataclass(frozen=True)
class _Run:
    """What the phases of one run share."""

    checkpoint: Checkpoint
    model: StreamedModel
    job: Job
    folder: Path
    ranks: Ranks
    clock: Clock


@dataclass(frozen=True)
class _LinearShape:
    """A `refusals.Shape`, from a header."""

    name: str
    in_features: int


def _refuse(checkpoint: Checkpoint, job: Job, samples: Sequence[Sample], ranks: Ranks) -> None:
    """Raises UsageError for a recipe that cannot be solved, CalibrationError without samples."""
    shapes = [(n, checkpoint.info(f"{n}.weight").shape) for n in job.linears]
    check_shapes([_LinearShape(n, shape[1]) for n, shape in shapes], job)
    if job.method.tuned and ranks.size > 1:
        raise UsageError("--tune works in one process; start without torchrun, or leave --tune out")
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
) -> _Run:
    """The model without weights, and a clock that runs."""
    clock = Clock(device, tokens=sum(len(sample.input_ids) for sample in samples))
    with clock("load"):
        model = StreamedModel(checkpoint, device)
        if isinstance(checkpoint, RotatedCheckpoint) and checkpoint.online:
            layers = [model.layer(i) for i in range(job.layers)]
            rotate_inner(layers, checkpoint.inner_rotation())
    return _Run(checkpoint, model, job, folder, ranks, clock)


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


def _outside_the_layers(run: _Run) -> list[BlockLinear]:
    """Solve the matrices outside the decoder layers, and write all that is not quantized."""
    with run.clock("floats"):
        outer = solve_outer(run.checkpoint, run.job, run.folder, run.model.device, run.ranks)
    _write_floats(run, outer)
    return outer


def _write_floats(run: _Run, outer: Sequence[BlockLinear]) -> None:
    """Write the source's files, and every tensor that is not quantized."""
    if not run.ranks.first:
        return
    job, checkpoint = run.job, run.checkpoint
    solved = [*job.linears, *([job.head] if job.head else []), *(q.name for q in outer)]
    norms = [norm for norm, _ in job.family.norms] if job.method.scaling else []
    solved += [job.prefix(i) + norm for i in range(job.layers) for norm in norms]
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
    run: _Run, samples: Sequence[Sample], outer: Sequence[BlockLinear], shelf: Shelf
) -> tuple[list[Batch], int]:
    """The batches at the first layer, and how many samples are lost already."""
    if not run.job.method.calibrated:
        return [], 0
    with run.clock("prefix"):
        batches = first_pass(run.model, samples, outer, run.job, shelf, run.ranks)
        lost = run.ranks.count(sum(batch.drop_non_finite() for batch in batches))
        refuse_many_lost(lost, len(samples))
    return batches, lost


def _modality_ratios(run: _Run, batches: Sequence[Batch]) -> Ratios:
    """MBQ's ratios of image and answer tokens; nothing for any other method."""
    if run.job.method.scaling != "mbq":
        return {}
    with run.clock("gradients"):
        return modality_ratios(run.model, run.job.layers, batches, MBQ_TYPES, run.ranks)


def _pass_layer(
    run: _Run, index: int, batches: list[Batch], ratios: Ratios, *, solved: bool
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
        walk = LayerWalk(layer, batches, two_streams=job.method.two_streams)
        if not solved:
            _solve_layer(run, walk, index, ratios)
        else:
            walk.pass_full()
            if not job.method.scaling:  # such a method stays on the full-precision stream
                restore(layer, job.prefix(index), read_layer(run.folder, index))
        return run.ranks.count(walk.advance())


def _solve_layer(run: _Run, walk: LayerWalk, index: int, ratios: Ratios) -> None:
    """Quantize a layer and write it.

    The decoded weights stay in the layer for what follows, unless the method scales.
    """
    prefix, checkpoint = run.job.prefix(index), run.checkpoint
    if run.job.method.scaling:
        attention, mlp = MBQ_TYPES
        own = (ratios[attention][index], ratios[mlp][index]) if ratios else None
        linears, changed = scale_layer(
            walk,
            prefix,
            run.job,
            own,
            lambda name, value: value.to(checkpoint.tensor(name).dtype).float(),
            run.ranks,
        )
        if run.ranks.first:
            stored = {n: v.to(checkpoint.tensor(n).dtype) for n, v in changed.items()}
            write_changed(run.folder, index, stored)
    else:
        linears = quantize_layer(walk, prefix, run.job, run.ranks)
    if run.ranks.first:
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
    outer: Sequence[BlockLinear],
) -> None:
    """Write the manifest, which makes the folder a whole artifact."""
    name, repository, revision = origin
    files = [*([OUTER] if outer else []), *range(run.job.layers + bool(run.job.head))]
    modules = [record for i in files for record in read_layer_records(run.folder, i)]
    if fallen := [m.name for m in modules if m.metrics.get("fallback")]:
        log.warning(
            "%d linears rounded to nearest, their Hessian is not definite, first %s;"
            " use more samples",
            len(fallen),
            fallen[0],
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
