"""A full-precision model and a quantized one on the same samples, each streamed layer by layer.

    samples → vision tower and embedding → decoder layers → norm → output matrix, in slabs

One model after the other is taken up to its last norm, and only what predicts the answers' tokens
is kept of it. Then both output matrices are read in slabs of the vocabulary. At any time one part
of one model has its weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vlmq_export.quantizer.arithmetic import exact_arithmetic
from vlmq_export.quantizer.calibration.answer_loss import layer_output
from vlmq_export.quantizer.calibration.batches import decoder_inputs
from vlmq_export.quantizer.calibration.divergence import Distance, Divergence
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.host import give_back
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.samples.sample import Sample

SLAB = 2**12  # rows of the vocabulary that are in memory at once
TOKENS = 2**10  # tokens whose logits of a slab are in memory at once


def nothing() -> None:
    """What is called after a step unless something else is given."""


@torch.no_grad()
@exact_arithmetic()
def answer_distances(
    full: StreamedModel,
    quantized: StreamedModel,
    samples: Sequence[Sample],
    shelf: Shelf | None = None,  # where activations rest between two layers
    step: Callable[[], None] = nothing,  # called after each of `steps` parts
) -> list[Distance]:
    """The distance of two models at each sample's answer tokens, teacher-forced.

    A sample without an answer has a distance of no tokens.
    """
    states = [answer_states(model, samples, shelf, step) for model in (full, quantized)]
    counts = [len(state) for state in states[0]]
    z, y = (torch.cat(each) for each in states)  # [answer tokens of all samples, hidden]
    found = Divergence(len(z), full.device)
    rows = full.head_shape[0] if len(z) else 0
    for start in range(0, rows, SLAB):
        heads = [model.head_rows(start, start + SLAB).T for model in (full, quantized)]
        for first in range(0, len(z), TOKENS):
            at = slice(first, first + TOKENS)
            found.add(at, start, z[at] @ heads[0], y[at] @ heads[1])
    whole = found.distance()
    parts = (each.cpu().split(counts) for each in (whole.kl, whole.same, whole.best))
    return [Distance(*each) for each in zip(*parts)]


def steps(layers: int) -> int:
    """How often `answer_distances` calls `step` for models of so many layers."""
    return 2 * (layers + 1)


@torch.no_grad()
def answer_states(
    model: StreamedModel,
    samples: Sequence[Sample],
    shelf: Shelf | None = None,
    step: Callable[[], None] = nothing,
) -> list[torch.Tensor]:
    """What enters the output matrix where each sample's answer tokens are predicted.

    One float32 tensor [answer tokens, hidden] for each sample, in the order of `samples`.
    """
    architecture = model.checkpoint.architecture
    # The batches hold the samples in this order.
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))
    with model.filled_prefix(torch.cat([sample.input_ids for sample in samples])) as prefix:
        batches = decoder_inputs(
            prefix,
            [samples[i] for i in order],
            two_streams=False,
            device=model.device,
            added=architecture.family.added,
            shelf=shelf,
        )
    step()
    for index in range(architecture.layers):
        with model.filled_layer(index) as layer:
            for batch in batches:
                batch.pass_layer(layer_output(layer, batch.quantized, batch), None)
        give_back()
        step()
    found: dict[int, torch.Tensor] = {}
    places = iter(order)
    with model.filled_norm() as norm:
        for batch in batches:
            # The token at t + 1 is predicted at t.
            for hidden, answer in zip(norm(batch.quantized)[:, :-1], batch.answer[:, 1:]):
                found[next(places)] = hidden[answer]
    return [found[i] for i in range(len(samples))]
