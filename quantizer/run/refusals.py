"""What a run refuses: recipes that cannot be solved on a model, and samples that are damaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from vlmq_export.errors import CalibrationError, UsageError
from vlmq_export.quantizer.config import (
    ACT_ORDERS,
    BITS,
    EMBEDDING_TYPES,
    VISION_GROUP,
    VISION_TYPES,
    QuantConfig,
)
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.samples.sample import Sample

MAX_LOST = 0.25  # share of the samples that may have activations that are not finite


class Shape(Protocol):
    """What is known from headers of a linear that is to be quantized."""

    @property
    def name(self) -> str: ...  # hub name

    @property
    def in_features(self) -> int: ...


def check_shapes(linears: Iterable[Shape], job: Job) -> None:
    """Raises UsageError for a recipe that cannot be solved on these linears.

    Headers alone are enough to know.
    """
    config, method = job.config, job.method
    if config.types and (method.affine_only):
        raise UsageError(
            f"method {config.method} fits the ranges of affine grids;"
            " choose another method for GGUF's block types"
        )
    _check_tuning(job)
    if unproven := experts_refusal(job):
        raise UsageError(unproven)
    if config.bits not in BITS:
        raise UsageError(
            f"bits {config.bits} is not supported; choose one of {', '.join(map(str, BITS))}"
        )
    if config.act_order not in ACT_ORDERS:
        raise UsageError(
            f"act order {config.act_order} is not known; choose one of {', '.join(ACT_ORDERS)}"
        )
    if config.group_size != -1 and config.group_size < 1:
        raise UsageError(
            f"group size {config.group_size} is not possible;"
            " give a number of columns, or -1 for per-channel"
        )
    _check_embedding(config)
    own = [x for x in linears if x.name not in config.types]
    odd = [x for x in own if x.in_features % config.of(x.name).group_columns(x.in_features)]
    if odd:
        size = config.of(odd[0].name).group_size
        raise UsageError(
            f"group size {size} does not divide the {odd[0].in_features} inputs of"
            f" {odd[0].name} ({len(odd)} linears); choose a divisor, or -1 for per-channel"
        )


def _check_embedding(config: QuantConfig) -> None:
    """Raises UsageError for a width that runtimes cannot look rows up in."""
    if config.embedding_bits not in (0, *EMBEDDING_TYPES):
        raise UsageError(
            f"embedding bits {config.embedding_bits} is not supported; choose"
            f" {' or '.join(map(str, EMBEDDING_TYPES))}, or 0 to leave the embedding as it is"
        )


def check_vision(tower: Sequence[str], samples: Sequence[Sample], job: Job) -> None:
    """Raises UsageError for a vision tower that cannot be quantized, CalibrationError for samples
    that say nothing of one.

    tower: hub names of its linears that the grid fits.
    """
    bits = job.config.vision_bits
    able = sorted(VISION_TYPES) if job.config.vision_type else BITS
    if bits not in able:
        raise UsageError(
            f"vision bits {bits} is not supported; choose one of {', '.join(map(str, able))}"
        )
    if not tower:
        raise UsageError(
            f"--vision-bits {bits}: no linear of this vision tower has inputs that {VISION_GROUP}"
            " divides; leave the option out"
        )
    calibrated = job.method.solves
    if calibrated and all(sample.pixel_values is None for sample in samples):
        raise CalibrationError(
            f"--vision-bits {bits}: no calibration sample has an image; give rows with images,"
            " or leave the option out"
        )


def _check_tuning(job: Job) -> None:
    """Raises UsageError where gradients cannot go on from what the recipe solves."""
    config = job.config
    if config.tune and not job.method.tunable:
        able = ", ".join(name for name, method in METHODS.items() if method.tunable)
        raise UsageError(f"--tune goes on from {able}; method {config.method} leaves it no target")
    if config.tune and config.types:
        raise UsageError("--tune moves codes and scales of affine grids, and no GGUF block types")
    if config.tune and config.act_order == "dynamic":
        raise UsageError("--tune needs groups of neighbouring columns; --act-order gar has them")


def experts_refusal(job: Job) -> str:
    """What the recipe asks of experts that is not proven for them, in one line; empty if nothing.

    Rotations are refused by the checkpoint, and costs of widths and types before they are measured.
    """
    if not job.family.sparse:
        return ""
    asked = {
        f"--method {job.config.method}": bool(job.method.scaling),
        "--tune": job.method.tuned,
    }
    if named := next((option for option, wanted in asked.items() if wanted), ""):
        return (
            f"{named} is not there for experts, which {job.family.model_type} has;"
            " leave it out, or choose a dense model of the family"
        )
    return ""


def refuse_many_lost(lost: int, samples: int) -> None:
    """Raises CalibrationError where too many samples have activations that are not finite.

    A few of them are left out and counted. More mean that something is broken. Where it is all of
    them, the walk says at which layer.
    """
    if 0 < lost < samples and lost > MAX_LOST * samples:
        raise CalibrationError(
            f"{lost} of {samples} samples have NaN or infinite activations;"
            " the model or these images are damaged"
        )
