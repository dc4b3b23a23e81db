"""The first pass: vision tower and embedding, up to the input of the first decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlmq_export.quantizer.calibration.batches import Batch, decoder_inputs
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.vision.stage import put_tower


def first_pass(
    model: StreamedModel,
    samples: Sequence[Sample],
    outer: Sequence[Linear],  # quantized matrices outside the decoder layers
    tower: Sequence[Linear],  # quantized linears of the vision tower and the projector
    job: Job,
    shelf: Shelf,
    ranks: Ranks,
) -> list[Batch]:
    """The batches of this rank, at the input of the first decoder layer.

    Where the embedding or the vision tower is quantized, the quantized stream begins with what
    ships, and the full-precision stream with the source's.
    """

    def inputs(prefix: Any, *, two_streams: bool) -> list[Batch]:
        return decoder_inputs(
            prefix,
            samples,
            two_streams=two_streams,
            device=model.device,
            added=job.family.added,
            shelf=shelf,
            ranks=ranks,
        )

    names = {job.family.module_name(q.name): q for q in outer}
    shipped = next((q for name, q in names.items() if name.endswith(".embed_tokens")), None)
    with model.filled_prefix(torch.cat([sample.input_ids for sample in samples])) as prefix:
        batches = inputs(prefix, two_streams=job.method.two_streams)
        if shipped is not None:
            _put_embedding(prefix, shipped)
        put_tower(prefix, tower, job)
        if tower or shipped is not None:
            for batch, start in zip(batches, inputs(prefix, two_streams=False)):
                batch.begin_as(start)
    return batches


def _put_embedding(prefix: Any, shipped: Linear) -> None:
    """Replace the embedding's rows that the model holds by what the shipped codes decode to."""
    embedding = prefix.get_input_embeddings()
    embedding.weight.copy_(shipped.at(embedding.ids.cpu()).decode())
