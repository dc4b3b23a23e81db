"""One sample: what the model is given of one row, and what its tokens are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from PIL import Image

from vlmq_export.quantizer.samples.rows import Row


@dataclass(frozen=True)
class Sample:
    """One tokenized row with its images, unpadded. S is the number of its tokens."""

    id: str
    input_ids: torch.Tensor  # int64 [S]
    vision: torch.Tensor  # bool [S], true at image tokens
    answer: torch.Tensor  # bool [S], true at the last assistant turn, its end token included
    # float32 [patches, channels·temporal·patch²] on a grid, [images, 3, height, width] of the
    # largest for lines, [tiles, 3, side, side] for tiles, of which Idefics3 takes [tiles, 1, 3,
    # side, side]; None for a sample without images.
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None  # int64 [images, 3]; None off a grid
    images: tuple[Image.Image, ...] = ()  # after resizing
    scaled: bool = False  # whether the limit on the sample's length made an image smaller
    text: str = ""  # the prompt, with one placeholder for each image
    row: Row | None = None  # where the sample comes from
    # What else the model must know of the images: keyword arguments of get_image_features.
    layout: dict[str, torch.Tensor] = field(default_factory=dict)
    mrope: bool = True  # as Family.mrope
    marks: str = ""  # as Family.marks
    packed: bool = False  # as Family.packed

    def image_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of get_image_features in transformers. Empty without images."""
        if self.pixel_values is None:
            return {}
        grid = {} if self.image_grid_thw is None else {"image_grid_thw": self.image_grid_thw}
        return {"pixel_values": self.pixel_values} | grid | self.layout

    def model_inputs(self, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Keyword arguments of the model in transformers, as a batch of one."""
        ids = self.input_ids[None]
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.image_inputs()
        if marks := self.marks or ("mm_token_type_ids" if self.mrope else ""):
            kwargs[marks] = self.vision[None].long()
        return {k: v.to(device) for k, v in kwargs.items()}


def truncate(sample: Sample, seq_len: int) -> Sample | None:
    """The first `seq_len` tokens of a sample, or None where that would cut an image's tokens.

    The VLMQ paper drops such samples. Images that may be scaled down are small enough by now.
    """
    if len(sample.input_ids) <= seq_len:
        return sample
    if bool(sample.vision[seq_len:].any()):
        return None
    cut = {name: getattr(sample, name)[:seq_len] for name in ("input_ids", "vision", "answer")}
    return replace(sample, **cut)


@dataclass(frozen=True)
class Length:
    """How long a sample is, in tokens."""

    tokens: int
    images: int  # of these, the tokens of images
    last: int = 0  # tokens up to the last one of an image; 0 without images

    def cut(self, seq_len: int) -> Length | None:
        """What `truncate` leaves of such a sample."""
        if self.tokens <= seq_len:
            return self
        return None if self.last > seq_len else replace(self, tokens=seq_len)


@dataclass(frozen=True)
class Lengths:
    """How long the samples of a run are: each of them, or a share that stands for all."""

    each: tuple[Length, ...]
    share: float = 1.0  # of all samples

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Lengths:
        """The lengths of samples that are there."""
        each = ((len(s.input_ids), int(s.vision.sum())) for s in samples)
        return cls(tuple(Length(*both) for both in each))

    @property
    def samples(self) -> int:
        """The number of all samples."""
        return round(len(self.each) / self.share)

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return round(sum(length.tokens for length in self.each) / self.share)

    @property
    def images(self) -> int:
        """Image tokens of all samples."""
        return round(sum(length.images for length in self.each) / self.share)

    def pictured(self, most: int) -> Lengths:
        """Those of samples with images, evenly spaced: at most `most` of all such samples."""
        some = [length for length in self.each if length.images]
        count = min(len(some), ceil(most * self.share))
        return Lengths(tuple(some[i * len(some) // count] for i in range(count)), self.share)

    def batches(self, most: int) -> list[tuple[int, int]]:
        """(samples, tokens of each) of the batches of all samples.

        A batch has samples of equal length, and at most `most` tokens or one sample. Where a share
        stands for all, its lengths are taken to be the only ones.
        """
        found = []
        for length, count in sorted(Counter(each.tokens for each in self.each).items()):
            size, left = max(1, most // length), max(1, round(count / self.share))
            found += [(size, length)] * (left // size)
            found += [(left % size, length)] * (left % size > 0)
        return found
