"""What the end of the model says of a token: the gradients of the answers' cross-entropy.

    L = Σ over samples of the mean of −log p over the sample's answer tokens

The full-precision stream is taken forward, and every layer's input is put away. Then the layers
are filled again, from the last to the first, and the gradient is passed back through each. As many
batches at once go this way as have inputs of KEPT bytes in all layers together, so that memory
follows neither the number of samples nor that of layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.batches import Batch, add
from vlmq_export.quantizer.calibration.hooks import leaf_output, without_output
from vlmq_export.quantizer.calibration.importance import Reached, per_sample, token_factors
from vlmq_export.quantizer.model.experts import reached
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.ranks import ALONE, Ranks

AT_ONCE = 512  # positions whose logits are there at once
KEPT = 4 * 2**30  # bytes of layers' inputs that are put away at once
Names = Sequence[Sequence[str]]  # of modules, one sequence for each layer
# Is given layer, module, batch and ∂L/∂Z [samples, tokens, out]. At an expert, to which some tokens
# alone come, that is [n, out], and the last argument tells which these are.
Take = Callable[[int, str, Batch, torch.Tensor, torch.Tensor | None], None]


@tensor_cores()
def answer_gradients(
    model: StreamedModel, batches: Sequence[Batch], names: Names, take: Take
) -> None:
    """Give `take` the gradient of L at the output Z of each module of `names`, last layer first.

    Samples do not weigh on each other. The batches are at the input of the first layer and are left
    there. Samples whose activations are not finite have no loss.
    """
    kept = 4 * len(names) * model.head_shape[1]  # bytes of a token
    for some in _parts(batches, kept):
        _gradients_of(model, some, names, take)


def _parts(batches: Sequence[Batch], kept: int) -> Iterator[Sequence[Batch]]:
    """The batches in parts, each of which keeps at most KEPT bytes, or is one batch.

    kept: bytes that one token keeps. The activations themselves may rest on disk, and stay there.
    """
    start, held = 0, 0
    for index, batch in enumerate(batches):
        own = kept * batch.ids.numel()
        if index > start and held + own > KEPT:
            yield batches[start:index]
            start, held = index, 0
        held += own
    if batches:
        yield batches[start:]


def _gradients_of(model: StreamedModel, batches: Sequence[Batch], names: Names, take: Take) -> None:
    """`answer_gradients` of one part of the batches."""
    layers = len(names)
    inputs = layer_inputs(model, layers, batches)
    gradients: list[Callable] = []  # ∂L/∂ of what leaves the layer, one a batch
    for index in reversed(range(layers)):
        with model.filled_layer(index) as layer, ExitStack() as stack:
            head = stack.enter_context(model.filled_head()) if index == layers - 1 else None
            for position, (batch, seen) in enumerate(zip(batches, inputs)):
                hidden, leaves = seen.pop()().requires_grad_(), {}
                with torch.enable_grad(), ExitStack() as hooks:
                    # On CUDA the fused backward adds in no fixed order, and a resumed run must
                    # match.
                    if hidden.is_cuda:
                        hooks.enter_context(sdpa_kernel(SDPBackend.MATH))
                    if head is None and (last := _last_linear(model, index)):
                        hooks.enter_context(without_output(layer.get_submodule(last)))
                    for name in names[index]:
                        module = layer.get_submodule(name)
                        hooks.enter_context(leaf_output(module, leaves, name, cut=False))
                    out = layer_output(layer, hidden, batch, index)
                    if head is not None:
                        out = add(out, batch, index)
                        onward = _loss_gradient(head, out, batch)
                    else:
                        onward = gradients[position]()
                    wanted = [hidden, *leaves.values()]
                    found = torch.autograd.grad(out, wanted, grad_outputs=onward)
                gradients[position : position + 1] = [batch.aside(found[0])]
                for name, gradient in zip(leaves, found[1:]):
                    take(index, name, batch, gradient, reached(layer, name))


def _last_linear(model: StreamedModel, index: int) -> str:
    """The linear whose output leaves the layer, added to the residual stream; empty if none does.

    No gradient within the layer depends on that output.
    """
    last = model.checkpoint.architecture.blocks(index)[-1]
    return last.out if last.kind == "mlp" and not last.post else ""


def layer_inputs(
    model: StreamedModel, layers: int, batches: Sequence[Batch]
) -> list[list[Callable]]:
    """For each batch, what enters each layer in the full-precision model, put aside."""
    inputs = [[batch.aside(batch.quantized)] for batch in batches]
    for index in range(layers - 1):
        with torch.no_grad(), model.filled_layer(index) as layer:
            for batch, seen in zip(batches, inputs):
                hidden = layer_output(layer, seen[-1](), batch, index)
                seen.append(batch.aside(add(hidden, batch, index)))
    return inputs


def layer_output(layer: Any, hidden: torch.Tensor, batch: Batch, ahead: int = 0) -> torch.Tensor:
    """What leaves a decoder layer for `hidden`, [samples, tokens, hidden].

    The layer is the one that `batch` stands before, or `ahead` layers further on.
    """
    out = layer(hidden, **batch.kwargs_of(ahead))
    return out[0] if isinstance(out, tuple) else out


def _loss_gradient(
    head: Callable[[torch.Tensor], torch.Tensor],  # [n, hidden] → logits [n, vocabulary]
    out: torch.Tensor,  # of the last layer, [samples, tokens, hidden]
    batch: Batch,
) -> torch.Tensor:
    """∂L/∂out of one batch, where most positions have none. A sample without an answer has none.

    Only the positions before an answer's tokens have logits, and AT_ONCE of them at a time.
    """
    here = batch.answer[:, 1:] & batch.valid[:, None]  # the token at t + 1 is predicted at t
    share = 1 / here.sum(1).clamp_min(1)
    gradient = torch.zeros_like(out)
    for row, place in zip(*(part.split(AT_ONCE) for part in here.nonzero(as_tuple=True))):
        some = out.detach()[row, place].requires_grad_()
        log_p = head(some).log_softmax(-1).gather(1, batch.ids[row, place + 1, None]).squeeze(1)
        (gradient[row, place],) = torch.autograd.grad(-(share[row] * log_p).sum(), some)
    return gradient


def answer_factors(
    model: StreamedModel, batches: Sequence[Batch], names: Names
) -> list[dict[str, list[torch.Tensor | Reached]]]:
    """How much the answers depend on each token, at the outputs of `names` of every layer.

    layer → name → g, one tensor a batch, [samples, tokens] on the CPU, or at an expert those of the
    tokens that come there. g is the mean of |∂L/∂Z| over the channels, scaled to mean(g²) = 1 in
    each sample. A sample without an answer has zeros.
    """
    found: list[dict[str, list[torch.Tensor | Reached]]]
    found = [{name: [torch.empty(0)] * len(batches) for name in own} for own in names]
    places = {id(batch): index for index, batch in enumerate(batches)}

    def take(
        layer: int, name: str, batch: Batch, gradient: torch.Tensor, tokens: torch.Tensor | None
    ) -> None:
        g = token_factors(gradient, "l1")
        some = per_sample(g) if tokens is None else Reached(g, tokens, batch.ids.shape).per_sample()
        found[layer][name][places[id(batch)]] = some.to("cpu")

    answer_gradients(model, batches, names, take)
    return found


def modality_ratios(
    model: StreamedModel, batches: Sequence[Batch], names: Names, ranks: Ranks = ALONE
) -> list[dict[str, float]]:
    """MBQ's ρ of each module of `names`, by layer (docs/methods.md §4.2).

    ρ is the mean magnitude of the gradient over image tokens, divided by that over answer tokens.
    Each sample's mean counts alike. ρ is never below its median over the layers that have a module
    of that name.
    """
    # Columns: Σ of image means, their number, Σ of answer means, their number.
    sums = [{name: torch.zeros(4, dtype=torch.float64) for name in own} for own in names]

    def take(
        layer: int, name: str, batch: Batch, gradient: torch.Tensor, _tokens: torch.Tensor | None
    ) -> None:
        each = gradient.abs().mean(-1).double()  # [samples, tokens]
        for start, tokens in ((0, batch.image), (2, batch.answer)):
            number = tokens.sum(1)
            some = batch.valid & (number > 0)
            means = torch.where(tokens, each, 0.0).sum(1) / number.clamp_min(1)
            found = torch.stack([means[some].sum(), some.sum().double()])
            sums[layer][name][start : start + 2] += found.cpu()

    answer_gradients(model, batches, names, take)
    ratios: list[dict[str, float]] = [{} for _ in names]
    for name in dict.fromkeys(name for own in names for name in own):
        where = [layer for layer, own in enumerate(names) if name in own]
        parts = torch.stack([sums[layer][name] for layer in where])
        total = torch.tensor(ranks.total(*parts.flatten().tolist())).view(-1, 4)
        image, images, answer, answers = total.T
        image, answer = image / images.clamp_min(1), answer / answers.clamp_min(1)
        each = (image / answer.clamp_min(1e-300)).tolist()
        least = statistics.median(each)
        for layer, ratio in zip(where, each):
            ratios[layer][name] = max(ratio, least)
    return ratios
