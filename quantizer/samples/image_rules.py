"""What a family makes of an image: its size, the inputs of the model, and the number of its tokens.

Each image is resized once, here, to a size that every runtime's own preprocessing leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from vlmq_export.quantizer.samples.companions import pixel_limits

TOKENS = (8, 4096)  # the fewest and most tokens of an image, after merging, that llama.cpp allows


Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Encoded:
    """What the images of one sample become."""

    inputs: dict[str, torch.Tensor]  # keyword arguments of the model: pixel_values and their layout
    tokens: list[int]  # number of tokens of each image


class ImageRule(Protocol):
    """How one family's images are prepared."""

    def size(self, size: Size, most: int | None = None) -> Size:
        """The size that an image of this size is resized to, which every runtime leaves alone.

        It has at most `most` tokens, where the rule can do with so few.
        """
        ...

    def tokens(self, size: Size) -> int:
        """The number of tokens of an image that has been resized to this size."""
        ...

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """The model's inputs for images that were fitted."""
        ...


class Grid:
    """The Qwen families: an image keeps its shape, and takes as many tokens as its size asks for.

    Its sides are multiples of patch · merge, and its area lies within limits.
    """

    def __init__(self, processor: Any):
        self.processor = processor  # transformers' image processor of the model
        self.unit = processor.patch_size * processor.merge_size  # pixels, side of one token

    def pixel_limits(self) -> tuple[int, int]:
        """Smallest and largest area in pixels that the model's processor leaves alone.

        Where it states none, they are those of transformers for Qwen2-VL.
        """
        low, high = pixel_limits(self.processor)
        return low or 56 * 56, high or 28 * 28 * 1280

    def size(self, size: Size, most: int | None = None) -> Size:
        """Multiples of the unit, with the area inside the limits of every runtime.

        The shape is kept as well as the multiples allow.
        """
        low, high = self.pixel_limits()
        low, high = max(low, TOKENS[0] * self.unit**2), min(high, TOKENS[1] * self.unit**2)
        if most is not None:
            high = max(low, min(high, most * self.unit**2))
        w, h = size
        scale = float(np.sqrt(np.clip(w * h, low, high) / (w * h)))
        grid = np.maximum(np.round(np.array([w, h]) * scale / self.unit), 1)
        while grid.prod() * self.unit**2 > high:
            grid[grid.argmax()] -= 1
        while grid.prod() * self.unit**2 < low:
            thicker = (grid.min() + 1) * grid.max() * self.unit**2 <= high
            grid[grid.argmin() if thicker else grid.argmax()] += 1
        width, height = (int(v) * self.unit for v in grid)
        return width, height

    def tokens(self, size: Size) -> int:
        return size[0] * size[1] // self.unit**2

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """pixel_values [patches, channels·temporal·patch²], image_grid_thw [images, 3]."""
        features = self.processor(images=list(images), return_tensors="pt")
        grid = features["image_grid_thw"].long()
        inputs = {"pixel_values": features["pixel_values"].float(), "image_grid_thw": grid}
        return Encoded(inputs, (grid.prod(-1) // self.processor.merge_size**2).tolist())


class Tile:
    """LLaVA-OneVision, InternVL3: an image is one square tile of the vision tower's own size.

    Both families can also cut a large image into several tiles. Runtimes do that differently or not
    at all. One tile also leaves room for text: of the 986 tokens to which the paper cuts samples of
    LLaVA-OneVision, an image takes 730 (27 · 27 patches and a newline), and 256 are left.
    """

    def __init__(self, processor: Any, config: dict, newline: int):  # Family.newline
        vision = config["vision_config"]
        self.processor = processor  # transformers' image processor of the model
        self.side = _first(vision["image_size"])  # pixels
        patches = self.side // _first(vision["patch_size"])
        self.each = round((patches * config.get("downsample_ratio", 1)) ** 2) + newline  # tokens

    def size(self, size: Size, most: int | None = None) -> Size:
        """The tile. It cannot have fewer tokens."""
        return self.side, self.side

    def tokens(self, size: Size) -> int:
        return self.each

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """pixel_values [images, 3, side, side].

        For LLaVA-OneVision also image_sizes [images, 2] and batch_num_images [1].
        """
        features = self.processor(images=list(images), return_tensors="pt")
        inputs = {"pixel_values": features["pixel_values"].float()}
        if "image_sizes" in features:
            # The processor gives [images, 1 + tiles, 3, side, side], with the whole image first. A
            # sample with several images makes the model take the whole images alone. It treats a
            # single image in the same way where the count is not one.
            inputs["pixel_values"] = inputs["pixel_values"][:, 0].contiguous()
            inputs["image_sizes"] = features["image_sizes"].long()
            inputs["batch_num_images"] = torch.tensor([max(2, len(images))])
        return Encoded(inputs, [self.each] * len(images))


def image_rule(kind: str, processor: Any, config: dict, newline: int) -> ImageRule:
    """The rule of a family. `kind` is Family.images, `newline` Family.newline."""
    return Grid(processor) if kind == "grid" else Tile(processor, config, newline)


def resized(image: Image.Image, size: Size) -> Image.Image:
    """The image at another size. One that has this size is not touched."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _first(value: int | Sequence[int]) -> int:
    """A side in pixels, which configs give as 448 or as [448, 448]."""
    return int(value if isinstance(value, int) else value[0])
