"""The walk over decoder layers with a full-precision and a quantized stream (methods.md §1.3, Algorithm 1).

Samples of equal length travel together, so nothing is ever padded. The streams are lists of such batches; both start
from the same decoder inputs, which one pass through vision tower and embeddings gives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vlmq_export.quantizer.artifact import Linear
from vlmq_export.quantizer.calibration import Sample
from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.shelf import Shelf

BATCH_TOKENS = 4096
HELD_OUT = 8  # every n-th sample, by length, is what a method may judge its choices on


class Batch:
    """Samples of one length at the input of a decoder layer. `full` is None where the method needs one stream only.

    What is read is on the device; between two uses it rests where the shelf puts it.
    """

    def __init__(
        self,
        quantized: torch.Tensor,  # X, float32 [samples, tokens, hidden]
        full: torch.Tensor | None,  # X̃, same shape
        kwargs: dict,  # attention mask and position embeddings, the same for every layer
        valid: torch.Tensor,  # bool [samples]: activations finite so far
        vision: torch.Tensor | None = None,  # bool [samples, tokens], of what is in `added`
        added: Sequence[torch.Tensor] = (),  # [vision tokens, hidden] each, for the next layers' outputs
        shelf: Shelf | None = None,
        *,
        image: torch.Tensor | None = None,  # bool [samples, tokens], as Sample.vision
        answer: torch.Tensor | None = None,  # bool [samples, tokens], as Sample.answer
        ids: torch.Tensor | None = None,  # int64 [samples, tokens], as Sample.input_ids
        held: torch.Tensor | None = None,  # bool [samples]: kept out of the statistics where a method chooses by them
    ):
        self._shelf = shelf or Shelf(quantized.device)
        self._quantized = self._shelf.put(quantized)
        self._full = self._quantized if full is quantized else self._shelf.put(full)
        self._kwargs = self._shelf.put(kwargs)
        self._added = [self._shelf.put(features) for features in added]
        self.valid, self.vision = valid, vision
        self.image, self.answer, self.ids, self.held = image, answer, ids, held

    @property
    def quantized(self) -> torch.Tensor:
        return self._quantized.get()

    @quantized.setter
    def quantized(self, value: torch.Tensor) -> None:
        self._quantized = self._shelf.put(value)

    @property
    def full(self) -> torch.Tensor | None:
        return self._full.get()

    @full.setter
    def full(self, value: torch.Tensor | None) -> None:
        self._full = self._shelf.put(value)

    @property
    def kwargs(self) -> dict:
        return self._kwargs.get()

    @property
    def added(self) -> list[torch.Tensor]:
        return [features.get() for features in self._added]

    def pass_layer(self, quantized: torch.Tensor, full: torch.Tensor | None) -> None:
        """Take a layer's outputs, adding what the model adds to its image tokens after that layer (DeepStack)."""
        if self._added:
            quantized, full = (x if x is None else add(x, self) for x in (quantized, full))
            self._added.pop(0)
        self.quantized, self.full = quantized, full

    def aside(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Put something of this batch where its activations rest; call the result to have it back."""
        return self._shelf.put(value).get

    def drop_non_finite(self) -> int:
        """Leave out samples whose activations are not finite; how many are new."""
        finite = torch.isfinite(self.quantized).all(2).all(1)
        if (full := self.full) is not None:
            finite &= torch.isfinite(full).all(2).all(1)
        lost = int((self.valid & ~finite).sum())
        self.valid &= finite
        return lost

    def tokens(self, activations: torch.Tensor) -> torch.Tensor:
        """[samples, tokens, ...] → [valid samples · tokens, ...]."""
        return activations[self.valid].flatten(0, 1)


def add(hidden: torch.Tensor, batch: Batch, ahead: int = 0) -> torch.Tensor:
    """A layer's output with what the model adds after it; `ahead` layers further on than the batch is."""
    if ahead >= len(added := batch.added):
        return hidden
    hidden = hidden.clone()
    hidden[batch.vision] += added[ahead]
    return hidden


class Stop(Exception):
    """Ends a forward pass once what was wanted is there."""


@contextmanager
def before(module: nn.Module, action):
    """Call action(args, kwargs) before each forward of the module."""
    handle = module.register_forward_pre_hook(lambda _m, args, kwargs: action(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def decoder_inputs(
    model: nn.Module,
    first_layer: nn.Module,
    samples: Sequence[Sample],
    *,
    two_streams: bool,
    device: torch.device,
    added: tuple[str, str] | None = None,
    shelf: Shelf | None = None,
    ranks: Ranks = ALONE,
) -> list[Batch]:
    """Run vision tower and embeddings, and stop at the first decoder layer. `added`: see Family.

    Of several ranks each gets its share of the batches, which are the same for any number of ranks.
    """
    caught: list[tuple[torch.Tensor, dict]] = []
    given: dict = {}  # to the language model

    def catch(args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        caught.append((hidden, {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}))
        raise Stop

    groups = list(_equal_lengths(samples))
    places = torch.arange(len(samples)).split([len(group) for group in groups])
    batches = []
    with before(first_layer, catch), before(model.model.language_model, lambda _args, kwargs: given.update(kwargs)):
        for group, place in zip(ranks.share(groups), ranks.share(places)):
            try:
                model.model(**_stack(group, device), use_cache=False)
            except Stop:
                hidden, kwargs = caught.pop()
            valid = torch.ones(len(group), dtype=torch.bool, device=device)
            mask, features = (given.get(name) for name in added) if added else (None, None)
            given.clear()
            streams = (hidden, hidden if two_streams else None)
            marks = (("image", "vision"), ("answer", "answer"), ("ids", "input_ids"))
            marks = {name: torch.stack([getattr(s, field) for s in group]).to(device) for name, field in marks}
            held = (place % HELD_OUT == HELD_OUT // 2).to(device)
            batches.append(Batch(*streams, kwargs, valid, mask, features or (), shelf, held=held, **marks))
    return batches


def _equal_lengths(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Groups of equal length, shortest first, of at most BATCH_TOKENS tokens (or one sample)."""
    by_length: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_length[len(sample.input_ids)].append(sample)
    for length in sorted(by_length):
        group, size = by_length[length], max(1, BATCH_TOKENS // length)
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _stack(group: Sequence[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model for samples of equal length."""
    parts = [sample.model_inputs() for sample in group]
    joined = {k: torch.cat([p[k] for p in parts if k in p]) for k in dict.fromkeys(k for p in parts for k in p)}
    return {k: v.to(device) for k, v in joined.items()}


@torch.no_grad()
def put(layer: nn.Module, name: str, linear: Linear) -> None:
    """Give a linear of the layer the weights and bias that will be on disk."""
    module = layer.get_submodule(name)
    module.weight.copy_(linear.decode())
    if linear.bias is not None:
        module.bias.copy_(linear.bias)
