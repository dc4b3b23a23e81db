"""Batches of samples, and how they come to the input of the first decoder layer.

Samples of equal length travel together, so that nothing is ever padded. Every batch carries two
streams: one through the full-precision model and one through the quantized model. Both start from
the same decoder inputs, which one pass through vision tower and embeddings gives.
docs/methods.md §1.3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from vlmq_export.quantizer.calibration.hooks import Stop, before
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.samples.sample import Sample

BATCH_TOKENS = 4096
HELD_OUT = 8  # every 8th sample, by length, can be kept out of the statistics, to judge choices by


class Batch:
    """Samples of one length at the input of a decoder layer.

    What is read is on the device. Between two uses it rests where the shelf puts it.
    """

    def __init__(
        self,
        quantized: torch.Tensor,  # X, float32 [samples, tokens, hidden]
        full: torch.Tensor | None,  # X̃, same shape; None where the method needs one stream only
        # Attention mask and position embeddings: of every layer, or one for each next layer.
        kwargs: dict | Sequence[dict],
        valid: torch.Tensor,  # bool [samples]: whether all activations were finite so far
        vision: torch.Tensor | None = None,  # bool [samples, tokens]: where `added` belongs
        added: Sequence[torch.Tensor] = (),  # [vision tokens, hidden]: one for each next layer
        shelf: Shelf | None = None,
        *,
        image: torch.Tensor | None = None,  # bool [samples, tokens], as Sample.vision
        answer: torch.Tensor | None = None,  # bool [samples, tokens], as Sample.answer
        ids: torch.Tensor | None = None,  # int64 [samples, tokens], as Sample.input_ids
        held: torch.Tensor | None = None,  # bool [samples]: kept out of the statistics
    ):
        self._shelf = shelf or Shelf(quantized.device)
        self._quantized = self._shelf.put(quantized)
        self._full = self._quantized if full is quantized else self._shelf.put(full)
        self.two_streams = full is not None
        ahead = [kwargs] if isinstance(kwargs, dict) else kwargs
        rests = {id(each): self._shelf.put(each) for each in ahead}
        self._kwargs = [rests[id(each)] for each in ahead]  # layers of one kind share theirs
        self._added = [self._shelf.put(features) for features in added]  # to the quantized stream
        self._added_full = list(self._added)
        self.valid, self.vision = valid, vision
        self._whole = bool(valid.all())  # known here, so that no batch has to ask the device again
        self._marks = {"image": image, "answer": answer, "ids": ids, "held": held}

    @property
    def quantized(self) -> torch.Tensor:
        """X, float32 [samples, tokens, hidden]."""
        return self._quantized.get()

    @quantized.setter
    def quantized(self, value: torch.Tensor) -> None:
        self._quantized = self._shelf.put(value)

    @property
    def full(self) -> torch.Tensor:
        """X̃, float32 [samples, tokens, hidden], where there are `two_streams`."""
        return self._full.get()

    @full.setter
    def full(self, value: torch.Tensor | None) -> None:
        self._full = self._shelf.put(value)

    @property
    def equal_streams(self) -> bool:
        """Whether both streams are one, because nothing that is quantized has come before."""
        return self._full is self._quantized

    @property
    def kwargs(self) -> dict:
        """Keyword arguments of the decoder layer that the batch stands before."""
        return self.kwargs_of(0)

    def kwargs_of(self, ahead: int) -> dict:
        """Keyword arguments of the layer that is so many layers further on."""
        return self._kwargs[min(ahead, len(self._kwargs) - 1)].get()

    @property
    def added(self) -> list[torch.Tensor]:
        """What the model adds to its image tokens after the next layers (DeepStack)."""
        return [features.get() for features in self._added]

    def begin_as(self, other: Batch) -> None:
        """Let the quantized stream begin as that of another batch of the same samples."""
        self._quantized, self._added = other._quantized, other._added

    @property
    def image(self) -> torch.Tensor:
        """bool [samples, tokens]: the image tokens."""
        return self._mark("image")

    @property
    def answer(self) -> torch.Tensor:
        """bool [samples, tokens]: the tokens of the answer."""
        return self._mark("answer")

    @property
    def ids(self) -> torch.Tensor:
        """int64 [samples, tokens]: the token ids."""
        return self._mark("ids")

    @property
    def held(self) -> torch.Tensor:
        """bool [samples]: the samples that are kept out of the statistics."""
        return self._mark("held")

    @property
    def knows_images(self) -> bool:
        """Whether the image tokens are marked."""
        return self._marks["image"] is not None

    def _mark(self, name: str) -> torch.Tensor:
        mark = self._marks[name]
        if mark is None:
            raise ValueError(f"this batch was made without {name}")
        return mark

    def pass_layer(self, quantized: torch.Tensor, full: torch.Tensor | None) -> None:
        """Take a layer's outputs, and add what the model adds after that layer."""
        if self._added:
            quantized = _with(quantized, self.vision, self._added.pop(0).get())
            theirs = self._added_full.pop(0).get()
            full = None if full is None else _with(full, self.vision, theirs)
        if len(self._kwargs) > 1:
            self._kwargs.pop(0)
        self.quantized, self.full = quantized, full

    def aside(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Put a tensor of this batch where its activations rest; call the result to get it back."""
        return self._shelf.put(value).get

    def drop_non_finite(self) -> int:
        """Leave out the samples whose activations are not finite. Returns how many are new."""
        finite = torch.isfinite(self.quantized).all(2).all(1)
        if self.two_streams:
            finite &= torch.isfinite(self.full).all(2).all(1)
        lost = int((self.valid & ~finite).sum())
        self._whole &= not lost
        self.valid &= finite
        return lost

    def tokens(self, activations: torch.Tensor) -> torch.Tensor:
        """[samples, tokens, ...] → [valid samples · tokens, ...], a view where all are valid."""
        return activations.flatten(0, 1) if self._whole else activations[self.valid].flatten(0, 1)


def add(hidden: torch.Tensor, batch: Batch, ahead: int = 0) -> torch.Tensor:
    """The output of a layer, with what the model adds after it.

    The layer is the one that `batch` stands before, or `ahead` layers further on.
    """
    added = batch.added
    return hidden if ahead >= len(added) else _with(hidden, batch.vision, added[ahead])


def _with(hidden: torch.Tensor, where: torch.Tensor | None, features: torch.Tensor) -> torch.Tensor:
    """The same with `features` added at the tokens that the mask `where` has."""
    hidden = hidden.clone()
    hidden[where] += features
    return hidden


@torch.no_grad()
def decoder_inputs(
    model: Any,  # transformers' own, filled up to the first decoder layer
    samples: Sequence[Sample],
    *,
    two_streams: bool,
    device: torch.device,
    added: tuple[str, str] | None = None,  # Family.added
    shelf: Shelf | None = None,
    ranks: Ranks = ALONE,
) -> list[Batch]:
    """Run vision tower and embeddings, and no decoder layer.

    Of several ranks each gets its share of the batches, which are the same for any number of ranks.
    """
    given: dict[str, Any] = {}  # the keyword arguments of the language model
    groups = list(_equal_lengths(samples))
    places = torch.arange(len(samples)).split([len(group) for group in groups])
    batches = []
    with (
        _entering(model.get_decoder().layers) as caught,
        before(model.get_decoder(), lambda _args, kwargs: given.update(kwargs)),
    ):
        for group, place in zip(ranks.share(groups), ranks.share(places)):
            parts = []
            for samples_at_once in _passes(group):
                caught.clear()
                with suppress(Stop):
                    model.model(**_stacked(samples_at_once, device), use_cache=False)
                parts.append(caught[0][0])
            # Of samples that go one by one, the keyword arguments are the same, and are broadcast.
            hidden, kwargs = torch.cat(parts), [kept for _, kept in caught]
            caught.clear()
            mask, features = (given.get(name) for name in added) if added else (None, None)
            given.clear()
            batches.append(
                Batch(
                    hidden,
                    hidden if two_streams else None,
                    kwargs,
                    torch.ones(len(group), dtype=torch.bool, device=device),
                    mask,
                    features or (),
                    shelf,
                    image=torch.stack([s.vision for s in group]).to(device),
                    answer=torch.stack([s.answer for s in group]).to(device),
                    ids=torch.stack([s.input_ids for s in group]).to(device),
                    held=(place % HELD_OUT == HELD_OUT // 2).to(device),
                )
            )
    return batches


@contextmanager
def _entering(layers: Sequence[Any]) -> Iterator[list[tuple[torch.Tensor, dict]]]:
    """What each layer would be given by the model, whose pass ends at the last. None of them runs.

    Layers that are given the very same things have one dict of keyword arguments.
    """
    caught: list[tuple[torch.Tensor, dict]] = []

    def catch(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        kept = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
        alike = (old for _, old in caught if old.keys() == kept.keys())
        same = (old for old in alike if all(old[k] is kept[k] for k in kept))
        caught.append((hidden, next(same, kept)))
        if len(caught) == len(layers):
            raise Stop
        return hidden

    try:
        for layer in layers:
            layer.forward = catch
        yield caught
    finally:
        for layer in layers:
            del layer.forward


def _equal_lengths(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Groups of equal length, the shortest first, of at most BATCH_TOKENS tokens or one sample."""
    by_length: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_length[len(sample.input_ids)].append(sample)
    for length in sorted(by_length):
        group, size = by_length[length], max(1, BATCH_TOKENS // length)
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _passes(group: Sequence[Sample]) -> list[Sequence[Sample]]:
    """A batch as the model takes it: as a whole, or one sample after the other (Family.packed)."""
    return [[sample] for sample in group] if group[0].packed else [group]


def _stacked(group: Sequence[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model for samples of equal length."""
    parts = [sample.model_inputs() for sample in group]
    keys = dict.fromkeys(k for p in parts for k in p)
    return {k: torch.cat([p[k] for p in parts if k in p]).to(device) for k in keys}
