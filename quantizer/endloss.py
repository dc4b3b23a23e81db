"""What the end of the model says of a token: gradients of the answers' cross-entropy, a decoder layer at a time.

The full-precision stream is taken forward once, every layer's input put away; then the layers are filled again from the
last to the first and the gradient is passed back through each. Memory stays one layer and the activations in flight.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.importance import leaf_output
from vlmq_export.quantizer.model import StreamedModel, tensor_cores
from vlmq_export.quantizer.streams import Batch, add

MBQ_TYPES = ("self_attn.o_proj", "mlp.down_proj")  # whose outputs stand for attention and MLP
Take = Callable[[int, str, Batch, torch.Tensor], None]  # layer, module, batch, ∂L/∂Z [samples, tokens, out]


@tensor_cores()
def answer_gradients(
    model: StreamedModel, count: int, batches: Sequence[Batch], names: Sequence[str], take: Take
) -> None:
    """Give `take` the gradient of L at the output Z of each module of `names`, last layer first.

    L = Σ over samples of the mean cross-entropy of their answer tokens; samples do not weigh on each other. The batches
    are at the input of the first layer and are left there. Nothing is taken for samples without finite activations.
    """
    inputs: list[list] = [[batch.aside(batch.quantized)] for batch in batches]
    for i in range(count - 1):
        with torch.no_grad(), model.filled_layer(i) as layer:
            for batch, seen in zip(batches, inputs):
                hidden = _forward(layer, seen[-1](), batch)
                seen.append(batch.aside(add(hidden, batch, i)))
    gradients = []
    for index in reversed(range(count)):
        with model.filled_layer(index) as layer, ExitStack() as stack:
            head = stack.enter_context(model.filled_head()) if index == count - 1 else None
            for position, (batch, seen) in enumerate(zip(batches, inputs)):
                hidden, leaves = seen.pop()().requires_grad_(), {}
                with torch.enable_grad(), ExitStack() as hooks:
                    if hidden.is_cuda:  # as in importance.py: the fused backward adds in no fixed order
                        hooks.enter_context(sdpa_kernel(SDPBackend.MATH))
                    for name in names:
                        hooks.enter_context(leaf_output(layer.get_submodule(name), leaves, name, cut=False))
                    out = _forward(layer, hidden, batch)
                    if head is not None:
                        out, onward = _loss(head(add(out, batch, index)), batch), None
                    else:
                        onward = gradients[position]()
                    found = torch.autograd.grad(out, [hidden, *leaves.values()], grad_outputs=onward)
                gradients[position : position + 1] = [batch.aside(found[0])]
                for name, gradient in zip(leaves, found[1:]):
                    take(index, name, batch, gradient)


def _forward(layer: nn.Module, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    out = layer(hidden, **batch.kwargs)
    return out[0] if isinstance(out, tuple) else out


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Σ over samples of −mean log p of the answer tokens; a sample without an answer has none."""
    here = batch.answer[:, 1:] & batch.valid[:, None]  # the token at t + 1 is predicted at t
    log_p = logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None]).squeeze(2)
    return -(torch.where(here, log_p, 0.0).sum(1) / here.sum(1).clamp_min(1)).sum()


def modality_ratios(
    model: StreamedModel, count: int, batches: Sequence[Batch], names: Sequence[str], ranks: Ranks = ALONE
) -> dict[str, list[float]]:
    """MBQ's ρ of each module of `names`, a figure a layer (methods.md §4.2).

    The mean magnitude of the gradient over image tokens against that over answer tokens, each sample's mean counting
    alike, and never below the median over the layers.
    """
    sums = {name: torch.zeros(count, 4, dtype=torch.float64) for name in names}  # Σ image, samples, Σ answer, samples

    def take(layer: int, name: str, batch: Batch, gradient: torch.Tensor) -> None:
        each = gradient.abs().mean(-1).double()  # [samples, tokens]
        for start, tokens in ((0, batch.image), (2, batch.answer)):
            number = tokens.sum(1)
            some = batch.valid & (number > 0)
            means = torch.where(tokens, each, 0.0).sum(1) / number.clamp_min(1)
            sums[name][layer, start : start + 2] += torch.stack([means[some].sum(), some.sum().double()]).cpu()

    answer_gradients(model, count, batches, names, take)
    ratios = {}
    for name, parts in sums.items():
        image, images, answer, answers = torch.tensor(ranks.total(*parts.flatten().tolist())).view(count, 4).T
        each = ((image / images.clamp_min(1)) / (answer / answers.clamp_min(1)).clamp_min(1e-300)).tolist()
        least = statistics.median(each)
        ratios[name] = [max(ratio, least) for ratio in each]
    return ratios
