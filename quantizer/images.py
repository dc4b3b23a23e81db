"""What a family makes of an image: its size, the model's inputs, and the number of its tokens.

Every image is resized once, here, to a size that each runtime's own preprocessing then leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

TOKENS = (8, 4096)  # merged tokens of an image that llama.cpp allows


@dataclass(frozen=True)
class Encoded:
    """Model inputs of the images of one sample, and the number of tokens that each of them takes."""

    inputs: dict[str, torch.Tensor]  # pixel_values, and where they belong
    tokens: list[int]


class ImageRule(Protocol):
    def fit(self, image: Image.Image) -> Image.Image: ...
    def encode(self, images: Sequence[Image.Image]) -> Encoded: ...


class Grid:
    """Qwen: an image keeps its shape, sides are multiples of patch · merge, the area lies within limits."""

    def __init__(self, processor):
        self.processor = processor
        self.unit = processor.patch_size * processor.merge_size

    def pixel_limits(self) -> tuple[int, int]:
        """Smallest and largest area in pixels that the model's processor leaves alone."""
        size = dict(self.processor.size or {})
        low = size.get("shortest_edge") or getattr(self.processor, "min_pixels", None) or 56 * 56
        high = size.get("longest_edge") or getattr(self.processor, "max_pixels", None) or 28 * 28 * 1280
        return int(low), int(high)

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize to sides that every runtime leaves alone: multiples of the unit, area inside all limits."""
        low, high = self.pixel_limits()
        low, high = max(low, TOKENS[0] * self.unit**2), min(high, TOKENS[1] * self.unit**2)
        w, h = image.size
        scale = float(np.sqrt(np.clip(w * h, low, high) / (w * h)))
        grid = np.maximum(np.round(np.array([w, h]) * scale / self.unit), 1)
        while grid.prod() * self.unit**2 > high:
            grid[grid.argmax()] -= 1
        while grid.prod() * self.unit**2 < low:
            grid[grid.argmin()] += 1
        return _resized(image, tuple(int(v) * self.unit for v in grid))

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """pixel_values [patches, channels·temporal·patch²], image_grid_thw [images, 3]."""
        features = self.processor(images=list(images), return_tensors="pt")
        grid = features["image_grid_thw"].long()
        inputs = {"pixel_values": features["pixel_values"].float(), "image_grid_thw": grid}
        return Encoded(inputs, (grid.prod(-1) // self.processor.merge_size**2).tolist())


class Tile:
    """LLaVA-OneVision, InternVL3: an image is one square tile of the vision tower's own size.

    Both can cut a large image into several tiles. Runtimes do that differently or not at all, and with one the paper's
    986 tokens hold an image and 256 tokens of text: 27 · 27 patches and LLaVA-OneVision's newline.
    """

    def __init__(self, processor, config: dict, newline: int):
        vision = config["vision_config"]
        self.processor = processor
        self.side = _first(vision.get("image_size", 384))
        patches = self.side // _first(vision.get("patch_size", 14))
        self.tokens = round((patches * config.get("downsample_ratio", 1)) ** 2) + newline

    def fit(self, image: Image.Image) -> Image.Image:
        return _resized(image, (self.side, self.side))

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """pixel_values [images, 3, side, side]; for LLaVA-OneVision image_sizes [images, 2], batch_num_images [1]."""
        features = self.processor(images=list(images), return_tensors="pt")
        inputs = {"pixel_values": features["pixel_values"].float()}
        if "image_sizes" in features:
            # [images, 1 + tiles, 3, side, side], the whole image first: what the model takes where a sample has
            # several images, and with a count other than one it takes a single image so.
            inputs["pixel_values"] = inputs["pixel_values"][:, 0].contiguous()
            inputs["image_sizes"] = features["image_sizes"].long()
            inputs["batch_num_images"] = torch.tensor([max(2, len(images))])
        return Encoded(inputs, [self.tokens] * len(images))


def image_rule(kind: str, processor, config: dict, newline: int) -> ImageRule:
    return Grid(processor) if kind == "grid" else Tile(processor, config, newline)


def _resized(image: Image.Image, size: tuple[int, ...]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _first(value: int | Sequence[int]) -> int:
    """Published as 448 or as [448, 448]."""
    return int(value if isinstance(value, int) else value[0])
