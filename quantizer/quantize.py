"""The stage's entry point: a checkpoint and samples in, an artifact folder out, layer by layer and resumable."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from vlmq_export._version import __version__
from vlmq_export.errors import CalibrationError, Interrupted, UsageError
from vlmq_export.quantizer.artifact import (
    OUTER,
    SCHEMA,
    TIMING,
    BlockLinear,
    Manifest,
    ModuleRecord,
    read_layer,
    read_layer_records,
    write_changed,
    write_floats,
    write_json,
    write_layer,
    write_manifest,
    write_source,
)  # fmt: skip
from vlmq_export.quantizer.calibration import Sample
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import ACT_ORDERS, BITS, QuantConfig
from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.endloss import MBQ_TYPES, modality_ratios
from vlmq_export.quantizer.families import Family, family_of, is_tied, layer_count
from vlmq_export.quantizer.head import quantize_head
from vlmq_export.quantizer.kquants import GRIDS, Params
from vlmq_export.quantizer.layer import quantize_layer, scale_layer
from vlmq_export.quantizer.memory import give_back, peak_host
from vlmq_export.quantizer.methods import Method, method_named
from vlmq_export.quantizer.model import StreamedModel, exact_arithmetic, pick_device
from vlmq_export.quantizer.pictured import image_shape
from vlmq_export.quantizer.resuming import WHOLE, claim, identity
from vlmq_export.quantizer.rotation import rotate_inner, rotated
from vlmq_export.quantizer.shelf import Place, Shelf
from vlmq_export.quantizer.solver import nearest_in_blocks
from vlmq_export.quantizer.streams import Batch, decoder_inputs, put
from vlmq_export.quantizer.timing import Clock
from vlmq_export.quantizer.walk import LayerWalk

log = logging.getLogger("vlmq_export")
SCRATCH = ".activations.tmp"
_ROWS = 4096  # of an embedding, solved at once
MAX_LOST = 0.25  # share of the samples that may have activations that are not finite
Progress = Callable[[str, int, int], None]


class Shape(Protocol):
    """Of a linear to quantize."""

    name: str
    in_features: int


def check_shapes(linears: Iterable[Shape], config: QuantConfig) -> None:
    """Raises UsageError for a recipe that cannot be solved on these linears; from headers alone."""
    method = method_named(config.method)
    if config.types and (method.scaling or method.ranges != "minmax"):
        raise UsageError(
            f"method {config.method} fits the ranges of affine grids; choose another method for GGUF's block types"
        )
    if config.bits not in BITS:
        raise UsageError(f"bits {config.bits} is not supported; choose one of {', '.join(map(str, BITS))}")
    if config.act_order not in ACT_ORDERS:
        raise UsageError(f"act order {config.act_order} is not known; choose one of {', '.join(ACT_ORDERS)}")
    if config.group_size != -1 and config.group_size < 1:
        raise UsageError(
            f"group size {config.group_size} is not possible; give a number of columns, or -1 for per-channel"
        )
    odd = [l for l in linears if l.name not in config.types and l.in_features % config.group_columns(l.in_features)]
    if odd:
        raise UsageError(
            f"group size {config.group_size} does not divide the {odd[0].in_features} inputs of {odd[0].name}"
            f" ({len(odd)} linears); choose a divisor, or -1 for per-channel"
        )


def quantize(
    checkpoint: Checkpoint,
    samples: list[Sample],
    config: QuantConfig,
    folder: Path,
    *,
    name: str,
    calibration: dict,
    device: str = "auto",
    resume: bool = False,
    place: Place = "device",
    ranks: Ranks = ALONE,
    drop_images: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Write the artifact of `checkpoint` into `folder`; a folder with a manifest is whole.

    `calibration` is what the manifest says of the samples. With `resume`, layers that are on disk are not solved again
    and the folder ends with the bytes of a run that was never stopped (same device, number of threads and of ranks). Of
    several ranks each is given all samples and walks its share; the first writes, the others need to read what it wrote.
    `drop_images` takes the pixels out of the list `samples` once the first pass has seen them: often more than the activations.

    Raises UsageError, CheckpointError and CalibrationError before heavy work where it can; ArtifactError when the folder
    belongs to another run; Interrupted after a layer was published and `should_stop()` is true.
    """
    progress = progress or (lambda *_: None)
    should_stop = should_stop or (lambda: False)
    checkpoint = rotated(checkpoint, config.rotate, config.seed)
    method, family, target = method_named(config.method), family_of(checkpoint.config), pick_device(device)
    count = layer_count(checkpoint.config)
    check_shapes([_Shape(n, checkpoint.info(f"{n}.weight").shape[1]) for n in family.linear_names(count)], config)
    head = head_to_solve(checkpoint.config, config)
    if method.calibrated and not samples:
        raise CalibrationError(f"method {config.method} needs calibration samples; give some, or use --method rtn")
    clock = Clock(target)
    clock.tokens = sum(len(sample.input_ids) for sample in samples)
    with clock("load"):
        model = StreamedModel(checkpoint, target)
        if config.rotate == "online":
            rotate_inner([model.layer(i) for i in range(count)], checkpoint.inner_rotation())
    done = 0
    if ranks.first:
        done = claim(folder, identity(checkpoint, samples, config, calibration, target, ranks.size), resume)
    if (done := ranks.same(done)) == WHOLE:
        return
    linears = [*family.linear_names(count), *([head] if head else [])]
    outer = _solve_outer(checkpoint, config, linears)
    if ranks.first:
        with clock("floats"):
            write_source(folder, checkpoint, own_head=bool(head))
            scaled = [f"{family.layers}{i}.{norm}" for i in range(count) for norm, _ in family.norms if method.scaling]
            write_floats(folder, checkpoint, _untouched(checkpoint, [*linears, *(q.name for q in outer), *scaled]))
            if outer:
                write_layer(folder, OUTER, outer, [ModuleRecord.of(q, OUTER, {}) for q in outer])
    batches: list[Batch] = []
    lost = 0
    with exact_arithmetic(), _shelf(target, place, folder) as shelf:
        if method.calibrated:
            with clock("prefix"):
                batches = _first_pass(model, samples, outer, method, family, shelf, ranks)
                lost = ranks.count(sum(batch.drop_non_finite() for batch in batches))
                refuse_many_lost(lost, len(samples))
            if drop_images:
                samples[:] = [replace(sample, pixel_values=None) for sample in samples]
            give_back()
        ratios: dict[str, list[float]] = {}
        if method.scaling == "mbq":
            with clock("gradients"):
                ratios = modality_ratios(model, count, batches, MBQ_TYPES, ranks)
        for i in range(count):
            progress("quantize", i, count)
            if method.calibrated and not ranks.count(sum(int(b.valid.sum()) for b in batches)):
                raise CalibrationError(
                    f"no sample has finite activations at layer {i}; the model or the images are damaged"
                )
            solved = i < done
            with clock("layers", None if solved else i), model.filled_layer(i) as layer:
                walk = LayerWalk(layer, batches, two_streams=method.two_streams)
                if not solved:
                    rho = tuple(ratios[kind][i] for kind in MBQ_TYPES) if ratios else None
                    _solve_layer(walk, i, folder, checkpoint, family, config, rho, ranks)
                else:
                    walk.pass_full()
                    if not method.scaling:  # which stays on the full-precision stream
                        _restore(layer, folder, i, f"{family.layers}{i}.")
                lost += ranks.count(walk.advance())
                del walk
                refuse_many_lost(lost, len(samples))
            give_back()
            if not solved:
                log.debug(
                    "layer %d of %d: %.1f s, %.0f tokens/s, peak %.2f GB",
                    i + 1, count, clock.layers[i], clock.tokens_per_second(), peak_host() / 1e9,
                )  # fmt: skip
                if i + 1 < count + bool(head) and ranks.count(should_stop()):
                    raise Interrupted(f"stopped after layer {i + 1} of {count}; continue with --resume")
        if head and done <= count:
            with clock("head"):
                linear, metrics = quantize_head(model, head, batches, config, ranks)
                if ranks.first:
                    write_layer(folder, count, [linear], [ModuleRecord.of(linear, count, metrics)])
    progress("quantize", count, count)
    if not ranks.first:
        return
    if method.calibrated:
        calibration = calibration | {"non_finite": lost}
    if method.importance != "none" and not lost:  # or the image pictured might be another's, of another shape
        calibration = calibration | image_shape(samples)
    if lost:
        log.warning("%d of %d samples left out: their activations are not finite", lost, len(samples))
    files = [*([OUTER] if outer else []), *range(count + bool(head))]
    modules = [record for i in files for record in read_layer_records(folder, i)]
    _warn_of_fallbacks(modules)
    write_json(folder / TIMING, clock.to_dict())
    manifest = Manifest(
        SCHEMA, __version__, name, checkpoint.model_type, checkpoint.fingerprint(), config.to_dict(), calibration, modules
    )  # fmt: skip
    write_manifest(folder, manifest)


@contextmanager
def _shelf(device: torch.device, place: Place, folder: Path):
    """A shelf whose files, if it has any, are gone afterwards."""
    scratch = folder / SCRATCH
    if place == "disk":
        scratch.mkdir()
    try:
        yield Shelf(device, place, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_many_lost(lost: int, samples: int) -> None:
    """A few samples with NaN or infinite activations are left out and counted; more mean that something is broken.

    Raises CalibrationError.
    """
    if 0 < lost < samples and lost > MAX_LOST * samples:  # all of them: the walk says at which layer
        raise CalibrationError(
            f"{lost} of {samples} samples have NaN or infinite activations; the model or these images are damaged"
        )


def head_to_solve(source: dict, config: QuantConfig) -> str:
    """Hub name of the output matrix where the recipe quantizes one that is the model's own; else nothing.

    A mix may name a type for it; where it is the embedding too, one tensor serves both and nothing calibrates it.
    """
    name = family_of(source).head
    return name if config.head_bits or (name in config.types and not is_tied(source)) else ""


@dataclass(frozen=True)
class _Shape:
    name: str
    in_features: int


def _solve_outer(checkpoint: Checkpoint, config: QuantConfig, linears: Sequence[str]) -> list[BlockLinear]:
    """The embedding on the block type that the recipe names for it, rounded to nearest: nothing calibrates it."""
    solved = []
    for name in [n for n in config.types if n not in set(linears)]:
        weight, kind = checkpoint.tensor(f"{name}.weight"), config.types[name]
        parts = [nearest_in_blocks(some, GRIDS[kind]) for some in weight.split(_ROWS)]  # in float32 a part at a time
        params = Params.joined([part.params for part in parts], 0)
        solved.append(BlockLinear(name, torch.cat([part.codes for part in parts]), params, None, kind))
    return solved


def _first_pass(
    model: StreamedModel,
    samples: Sequence[Sample],
    outer: Sequence[BlockLinear],
    method: Method,
    family: Family,
    shelf: Shelf,
    ranks: Ranks,
) -> list[Batch]:
    """What enters the first decoder layer, of each rank its share."""
    ids = torch.cat([sample.input_ids for sample in samples])
    with model.filled_prefix(ids) as prefix:
        batches = decoder_inputs(
            prefix, model.layer(0), samples, two_streams=method.two_streams, device=model.device,
            added=family.added, shelf=shelf, ranks=ranks,
        )  # fmt: skip
        _start_from(prefix, outer, batches, samples, family, shelf, ranks)
    return batches


def _start_from(
    prefix: nn.Module,
    outer: Sequence[BlockLinear],
    batches: Sequence[Batch],
    samples: Sequence[Sample],
    family: Family,
    shelf: Shelf,
    ranks: Ranks,
) -> None:
    """Let the quantized stream begin with the embedding that ships, where that is quantized."""
    embedding = prefix.get_input_embeddings()
    shipped = next((q for q in outer if family.module_name(q.name).endswith(".embed_tokens")), None)
    if shipped is None:
        return
    embedding.weight.copy_(shipped.at(embedding.ids.cpu()).decode())
    again = decoder_inputs(
        prefix, prefix.get_submodule(family.module_name(f"{family.layers}0")), samples, two_streams=False,
        device=embedding.ids.device, added=family.added, shelf=shelf, ranks=ranks,
    )  # fmt: skip
    for batch, start in zip(batches, again):
        batch.quantized = start.quantized


def _solve_layer(
    walk: LayerWalk,
    index: int,
    folder: Path,
    checkpoint: Checkpoint,
    family: Family,
    config: QuantConfig,
    ratios: tuple[float, float] | None,  # MBQ's, of this layer
    ranks: Ranks,
) -> None:
    """Quantize a layer and write it; the decoded weights stay in it for what follows, unless the method scales."""
    prefix = f"{family.layers}{index}."
    if method_named(config.method).scaling:
        linears, changed = scale_layer(walk, prefix, family, config, ratios, _storing(checkpoint), ranks)
        if ranks.first:
            write_changed(folder, index, {n: v.to(checkpoint.tensor(n).dtype) for n, v in changed.items()})
    else:
        linears = quantize_layer(walk, prefix, family.groups, config, ranks)
    if ranks.first:
        write_layer(folder, index, [q for q, _ in linears], [ModuleRecord.of(q, index, m) for q, m in linears])


def _storing(checkpoint: Checkpoint) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Rounds a new value of a float tensor to what the source stores it in."""
    return lambda name, value: value.to(checkpoint.tensor(name).dtype).float()


def _untouched(checkpoint: Checkpoint, modules: Sequence[str]) -> list[str]:
    """Tensors that are copied as they are: all but those of these modules."""
    taken = {f"{n}.{part}" for n in modules for part in ("weight", "bias")}
    return [name for name in checkpoint.tensors if name not in taken]


def _restore(layer: nn.Module, folder: Path, index: int, prefix: str) -> None:
    """Give a layer what an earlier run solved."""
    for linear in read_layer(folder, index):
        put(layer, linear.name.removeprefix(prefix), linear)


def _warn_of_fallbacks(modules: Sequence[ModuleRecord]) -> None:
    fallen = [m.name for m in modules if m.metrics.get("fallback")]
    if fallen:
        log.warning(
            "%d linears rounded to nearest, their Hessian is not definite, first %s; use more samples",
            len(fallen),
            fallen[0],
        )
