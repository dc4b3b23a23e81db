"""What a family makes of an image: its size, the inputs of the model, and the number of its tokens.

Each image is resized once, here, to a size that every runtime's own preprocessing leaves alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from vlmq_export.errors import CalibrationError, CheckpointError
from vlmq_export.quantizer.model.families import Family
from vlmq_export.quantizer.samples.companions import pixel_limits

TOKENS = (8, 4096)  # the fewest and most tokens of an image, after merging, that llama.cpp allows


Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Encoded:
    """What the images of one sample become."""

    inputs: dict[str, torch.Tensor]  # keyword arguments of the model: pixel_values and their layout
    written: list[str]  # what stands for each image in the prompt


class ImageRule(Protocol):
    """How one family's images are prepared."""

    def size(self, size: Size, most: int | None = None) -> Size:
        """The size that an image of this size is resized to, which every runtime leaves alone.

        It has at most `most` tokens, where the rule can do with so few.
        """
        ...

    def tokens(self, size: Size) -> int:
        """The number of tokens of an image that has been resized to this size.

        Those that every image has around it are left out.
        """
        ...

    def encode(self, images: Sequence[Image.Image], token: str) -> Encoded:
        """The model's inputs for images that were fitted, and their text.

        `token` is the placeholder of an image.
        """
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

    def encode(self, images: Sequence[Image.Image], token: str) -> Encoded:
        """pixel_values [patches, channels·temporal·patch²], image_grid_thw [images, 3]."""
        features = self.processor(images=list(images), return_tensors="pt")
        grid = features["image_grid_thw"].long()
        inputs = {"pixel_values": features["pixel_values"].float(), "image_grid_thw": grid}
        counts = (grid.prod(-1) // self.processor.merge_size**2).tolist()
        return Encoded(inputs, [token * count for count in counts])


class Tile:
    """LLaVA-OneVision, InternVL, Gemma 3: an image is one square tile of the tower's own size.

    All three can also cut a large image into several tiles (pan and scan, in Gemma 3). Runtimes do
    that differently or not at all. One tile also leaves room for text: of the 986 tokens to which
    the paper cuts samples of LLaVA-OneVision, an image takes 730 (27 · 27 patches and a newline),
    and 256 are left.
    """

    def __init__(
        self,
        processor: Any,
        config: dict,
        newline: int,  # Family.newline
        around: tuple[str, str] = ("", ""),  # Family.around
    ):
        vision = config["vision_config"]
        self.before, self.after = around
        self.processor = processor  # transformers' image processor of the model
        self.side = _first(vision["image_size"])  # pixels
        patches = self.side // _first(vision["patch_size"])
        pooled = config.get("mm_tokens_per_image")
        made = pooled or round((patches * config.get("downsample_ratio", 1)) ** 2)
        self.each = made + newline  # tokens

    def size(self, size: Size, most: int | None = None) -> Size:
        """The tile. It cannot have fewer tokens."""
        return self.side, self.side

    def tokens(self, size: Size) -> int:
        return self.each

    def encode(self, images: Sequence[Image.Image], token: str) -> Encoded:
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
        return Encoded(inputs, [self.before + token * self.each + self.after] * len(images))


class Tiles:
    """Idefics3, SmolVLM: an image is one square tile, or a grid of tiles and the whole as one more.

    The processor's `do_image_splitting` says which. The grid is what covers the image once its
    longer side is `size.longest_edge`. With fewer tokens to spend, that side is shorter. Before
    each tile stands a word with its row and column, and before the whole image `<global-img>`.

    Raises CheckpointError for tiles of another size than the tower's, or that cannot be shuffled.
    """

    def __init__(self, processor: Any, config: dict, around: tuple[str, str]):  # Family.around
        self.processor = processor  # transformers' image processor of the model
        self.side = int(processor.max_image_size["longest_edge"])  # of a tile, in pixels
        self.longest = int(processor.size["longest_edge"]) if processor.do_image_splitting else 0
        self.before, self.after = around
        vision, shuffled = config["vision_config"], config["scale_factor"]
        if self.side != _first(vision["image_size"]):
            raise CheckpointError(
                f"max_image_size of the image processor is {self.side} where config.json has"
                f" image_size {vision['image_size']}; copy both from the original model"
            )
        patches = self.side // _first(vision["patch_size"])
        if not patches or patches % shuffled:
            raise CheckpointError(
                f"scale_factor {shuffled} in config.json does not divide the {patches} patches on a"
                " side of a tile; copy it from the original model"
            )
        self.each = (patches // shuffled) ** 2  # tokens of a tile

    def size(self, size: Size, most: int | None = None) -> Size:
        """A whole number of tiles along each side, or one tile."""
        for longest in range(self.longest, self.side, -self.side):
            fitted = self._covering(size, longest)
            if most is None or self.tokens(fitted) <= most:
                return fitted
        return self.side, self.side

    def tokens(self, size: Size) -> int:
        """The words of the tiles are counted as one token each, and so are the line breaks."""
        columns, rows = (side // self.side for side in size)
        grid = rows * columns * (self.each + 2) + rows if rows * columns > 1 else 0
        return grid + self.each

    def encode(self, images: Sequence[Image.Image], token: str) -> Encoded:
        """pixel_values [tiles, 1, 3, side, side], of all images in order.

        The model takes any number of tiles for a sample, and the order is all that it needs. Raises
        CalibrationError for a tile of zeros, which the model would take for padding.
        """
        tiles, written = [], []
        for image in images:
            features = self.processor(
                images=[image],
                do_resize=False,
                do_image_splitting=image.size != (self.side, self.side),
                return_row_col_info=True,
                return_tensors="pt",
            )
            tiles.append(features["pixel_values"][0].float())
            written.append(self.text(features["rows"][0][0], features["cols"][0][0], token))
        pixels = torch.cat(tiles)[:, None]
        if not bool(pixels.flatten(1).any(1).all()):
            raise CalibrationError("a tile of an image is zero everywhere, once normalized")
        return Encoded({"pixel_values": pixels}, written)

    def text(self, rows: int, columns: int, token: str) -> str:
        """What Idefics3Processor writes for a grid of tiles; 0 rows for an image not cut."""
        fake, text = self.after, ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                text += f"{fake}<row_{row}_col_{column}>{token * self.each}"
            text += "\n"
        return text + "\n" * bool(rows) + self.before + token * self.each + self.after

    def _covering(self, size: Size, longest: int) -> Size:
        """The tiles that cover an image whose longer side is `longest`, as the processor has it."""
        width, height = size
        long, short = max(size), min(size)
        short = int(longest * short / long)
        short = max(short + short % 2, 1)
        across, along = (math.ceil(n / self.side) * self.side for n in (short, longest))
        return (along, across) if width >= height else (across, along)


class Lines:
    """Mistral 3: an image keeps its shape and its size, and a token stands behind each row of it.

    The tower takes sides of any multiple of a patch. `longest` is the longest side of an image.
    """

    def __init__(self, processor: Any, config: dict, around: tuple[str, str]):  # Family.around
        self.processor = processor  # transformers' image processor of the model
        self.unit = _first(config["vision_config"]["patch_size"]) * config["spatial_merge_size"]
        self.longest = int(processor.size["longest_edge"])  # pixels
        self.end = around[1]  # what stands behind the last row
        self.row_end = self.end.replace("END", "BREAK")  # and behind the others

    def size(self, size: Size, most: int | None = None) -> Size:
        """The multiples of the unit that hold the image, as the model's processor has it.

        An image is made smaller only where it is longer than `longest`, or has over `most` tokens,
        and larger where it has fewer than any other family's (`TOKENS`).
        """
        most = TOKENS[1] if most is None else most
        shorter = max(1, max(size) / self.longest)
        grid = np.array([-(-int(side / shorter) // self.unit) for side in size]).clip(1)
        scale = 1.0
        while self._tokens(grid) > most and grid.prod() > TOKENS[0]:
            scale *= 0.98
            grid = np.round(np.array(size) / shorter * scale / self.unit).clip(1)
        while grid.prod() < TOKENS[0]:
            grid[grid.argmin()] += 1
        width, height = (int(v) * self.unit for v in grid)
        return width, height

    def tokens(self, size: Size) -> int:
        """The tokens behind the rows are counted, but for the last one."""
        return self._tokens(np.array(size) // self.unit)

    def _tokens(self, grid: np.ndarray) -> int:
        across, rows = grid
        return int(rows * (across + 1) - 1)

    def encode(self, images: Sequence[Image.Image], token: str) -> Encoded:
        """pixel_values [images, 3, height, width] of the largest, image_sizes [images, 2].

        Zeros fill the images to the right and below. The model cuts them off.
        """
        features = self.processor(
            images=list(images), do_resize=False, patch_size=self.unit, return_tensors="pt"
        )
        sizes = torch.as_tensor(features["image_sizes"]).long()  # height and width
        inputs = {"pixel_values": features["pixel_values"].float(), "image_sizes": sizes}
        grids = (sizes // self.unit).tolist()
        return Encoded(inputs, [self.text(rows, columns, token) for rows, columns in grids])

    def text(self, rows: int, columns: int, token: str) -> str:
        """What PixtralProcessor writes for an image of so many tokens."""
        return self.row_end.join([token * columns] * rows) + self.end


def image_rule(family: Family, processor: Any, config: dict) -> ImageRule:
    """The rule of a family, for transformers' image processor and the config of one model."""
    if family.images == "grid":
        return Grid(processor)
    if family.images == "tile":
        return Tile(processor, config, family.newline, family.around)
    if family.images == "lines":
        return Lines(processor, config, family.around)
    return Tiles(processor, config, family.around)


def resized(image: Image.Image, size: Size) -> Image.Image:
    """The image at another size. One that has this size is not touched."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _first(value: int | Sequence[int]) -> int:
    """A side in pixels, which configs give as 448 or as [448, 448]."""
    return int(value if isinstance(value, int) else value[0])
