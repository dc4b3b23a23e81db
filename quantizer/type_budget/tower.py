"""What a vision tower of fewer bits changes at the decoder's inputs.

A cost needs the slope of the output along an error (sensitivity.py). The error of a whole tower is
what its solution changes in the features of an image: at the input of the first layer, and in what
the model adds after further layers (DeepStack). So the gradients at these places do, and none is
passed back through the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from vlmq_export.quantizer.calibration.batches import Batch, decoder_inputs
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.vision.stage import put_tower, solved_tower, tower_names

# Samples that the tower is solved on at each width. A run solves it on up to four times as many.
PICTURES = 32
# Of one sample: what a tower changes, float32 [image tokens, hidden], before the first layer and in
# what is added after the next ones.
Shift = list[Callable[[], torch.Tensor]]


def shifts_of(
    model: StreamedModel,
    job: Job,
    widths: Iterable[int],
    fitted: Sequence[Sample],  # that the tower is solved on
    held: Sequence[Sample],  # that its changes are seen on
    singles: Sequence[Batch],  # the other samples, each alone, behind the source's tower
    shelf: Shelf,
) -> dict[int, list[Shift]]:
    """Width → what a tower of that width changes for each of the other samples.

    Raises CalibrationError where no sample has finite activations.
    """
    names = tower_names(model.checkpoint, short=job.config.vision_short)
    pictured = [sample for sample in fitted if sample.pixel_values is not None][:PICTURES]
    return {
        bits: _shifts(model, _seeing(job, bits), names, pictured, held, singles, shelf)
        for bits in widths
    }


def _seeing(job: Job, bits: int) -> Job:
    """The job with a vision tower of so many bits."""
    return replace(job, config=job.config.with_vision(bits))


def _shifts(
    model: StreamedModel,
    job: Job,
    names: Sequence[str],
    pictured: Sequence[Sample],
    held: Sequence[Sample],
    singles: Sequence[Batch],
    shelf: Shelf,
) -> list[Shift]:
    """The changes of one tower."""
    tower = [linear for linear, _ in solved_tower(model, names, pictured, job, shelf)]
    found = []
    with model.filled_prefix(torch.cat([sample.input_ids for sample in held])) as prefix:
        put_tower(prefix, tower, job)
        for sample, batch in zip(held, singles):
            (other,) = decoder_inputs(
                prefix, [sample], two_streams=False, device=model.device, added=job.family.added
            )
            pairs = zip(_features(other), _features(batch))
            found.append([batch.aside(after - before) for after, before in pairs])
    return found


def _features(batch: Batch) -> list[torch.Tensor]:
    """What the decoder sees of the images of one sample, [image tokens, hidden] at each place."""
    return [batch.quantized[batch.image], *batch.added]
