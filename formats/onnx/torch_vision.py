"""Vision towers with projector, traced by torch.onnx: what the tower's own code counts in Python is computed in the graph.

Each class takes the whole model, without weights; its `example()` gives arguments to trace with, and input and output
names with the names of their dynamic lengths. The output is `image_features` [image tokens, width], image after image.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.onnx.ops import symbolic

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.torch_text import OPSET

OUTPUTS = {"image_features": {}}


class Qwen3Vision(nn.Module):
    """pixel_values [patches, 3·2·16·16], image_grid_thw int64 [images, 3] → features of any number of images.

    Behind each image feature of width `hidden` stand those for the decoder's first layers (deepstack).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.visual = visual = model.model.visual
        config = visual.config
        self.deepstack, self.merge = len(config.deepstack_visual_indexes), config.spatial_merge_size
        self.side, self.heads = visual.num_grid_per_side, config.num_heads
        self.register_buffer("inv_freq", type(visual.rotary_pos_emb)(config).inv_freq.clone())
        self.pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2

    def example(self):
        unit = 4 * self.merge**2
        arguments = (
            torch.zeros(2 * unit + 2 * unit, self.pixels),
            torch.tensor([[2, 2 * self.merge, 2 * self.merge]] * 2),
        )
        return arguments, {"pixel_values": {0: "patches"}, "image_grid_thw": {0: "images"}}, OUTPUTS

    def forward(self, pixel_values, image_grid_thw):
        frame, row, column, heights, widths = patch_grid(pixel_values.shape[0], image_grid_thw, self.merge)
        visual = self.visual
        x = visual.patch_embed(pixel_values) + self._positions(row, column, heights, widths)
        angles = torch.cat([row[:, None] * self.inv_freq, column[:, None] * self.inv_freq], dim=-1)
        cos, sin = angles.cos(), angles.sin()  # [patches, head size / 2]
        apart = torch.where(frame[:, None] == frame, 0.0, torch.finfo(torch.float32).min)  # [patches, patches]
        deep = []
        for i, block in enumerate(visual.blocks):
            x = x + self._attend(block.attn, block.norm1(x), cos, sin, apart)
            x = x + block.mlp(block.norm2(x))
            if i in visual.deepstack_visual_indexes:
                deep.append(visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)](x))
        return torch.cat([visual.merger(x), *deep], dim=-1)

    def _attend(self, attention, x, cos, sin, apart):
        """Every patch over the patches of its own frame."""
        each = attention.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # [3, heads, patches, size]
        query, key, value = each[0], each[1], each[2]
        scores = rotate_half(query, cos, sin) @ rotate_half(key, cos, sin).transpose(1, 2) * attention.scaling
        attended = (scores + apart).softmax(-1) @ value
        return attention.proj(attended.transpose(0, 1).flatten(1))

    def _positions(self, row, column, heights, widths):
        """The learned square grid, sampled bilinearly with corners on corners."""
        (top, bottom, down), (left, right, across) = taps(row, heights, self.side), taps(column, widths, self.side)
        table = self.visual.pos_embed.weight
        return (
            table[top * self.side + left] * ((1 - down) * (1 - across))[:, None]
            + table[top * self.side + right] * ((1 - down) * across)[:, None]
            + table[bottom * self.side + left] * (down * (1 - across))[:, None]
            + table[bottom * self.side + right] * (down * across)[:, None]
        )


def patch_grid(patches: int, grid: torch.Tensor, merge: int):
    """int64 [patches] each: number of its frame over all images, row and column in it, height and width of its image.

    Patches come image after image, frame after frame, in blocks of merge × merge (Qwen2-VL's order).
    """
    areas = grid[:, 1] * grid[:, 2]
    ends = (grid[:, 0] * areas).cumsum(0)
    index = torch.arange(patches)
    image = (index[:, None] >= ends[None]).long().sum(1)  # [patches]
    starts = ends - grid[:, 0] * areas
    within, area = index - starts[image], areas[image]
    frames = grid[:, 0].cumsum(0) - grid[:, 0]
    frame = frames[image] + within // area
    within = within % area
    height, width = grid[:, 1][image], grid[:, 2][image]
    inner, block = within % merge**2, within // merge**2
    across = width // merge
    row = block // across * merge + inner // merge
    column = block % across * merge + inner % merge
    return frame, row, column, height, width


def taps(index: torch.Tensor, size: torch.Tensor, side: int):
    """Two neighbours in a table of `side` entries, and the share of the second, for point `index` of `size`."""
    point = index.float() * (side - 1) / (size - 1).clamp(min=1)
    first = point.floor()
    return first.long(), (first.long() + 1).clamp(max=side - 1), point - first


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class InternVision(nn.Module):
    """pixel_values [tiles, 3, size, size], the tiles of all images in order → features."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.config, self.pixel_shuffle = model.config, model.model.pixel_shuffle
        layer = one_layer(self.config.vision_feature_layer)
        self.last = layer == -1
        self.layers = self.tower.encoder.layer[: None if self.last else hidden_state(layer, self.tower.encoder.layer)]

    def example(self):
        height, width = self.tower.embeddings.image_size
        return (
            (torch.zeros(3, self.config.vision_config.num_channels, height, width),),
            {"pixel_values": {0: "tiles"}},
            OUTPUTS,
        )

    def forward(self, pixel_values):
        embeddings = self.tower.embeddings
        x = embeddings.patch_embeddings(pixel_values)
        x = torch.cat([embeddings.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if embeddings.position_embeddings is not None:
            x = x + embeddings.position_embeddings
        for layer in self.layers:
            x = layer(x)
        x = self.tower.layernorm(x) if self.last else x
        if self.config.vision_feature_select_strategy == "default":
            x = x[:, 1:]
        side = int(x.shape[1] ** 0.5)
        x = self.pixel_shuffle(x.unflatten(1, (side, side)), scale_factor=self.config.downsample_ratio)
        return self.projector(x.flatten(1, 2)).flatten(0, 1)


class LlavaOnevision(nn.Module):
    """pixel_values [tiles, 3, size, size] and image_sizes int64 [1, 2] (height, width) of one image → its features.

    The first tile is the whole image; the others are cut from it at the resolution of `image_grid_pinpoints` that fits
    best. Their features are laid out as one picture, its padding cut off, made smaller if it is large, and each row ends
    with `image_newline`. A single tile is the picture of an image among several.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.image_newline, self.config = model.model.image_newline, model.config
        if self.config.vision_feature_select_strategy != "full":
            raise FormatError("ONNX graphs of LLaVA-OneVision take every patch of a tile; leave out --format onnx")
        vision = self.config.vision_config
        self.size, self.side = vision.image_size, vision.image_size // vision.patch_size
        encoder = self.tower.encoder.layers
        self.layers = encoder[: hidden_state(one_layer(self.config.vision_feature_layer), encoder)]
        self.most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))  # tiles' worth of features
        self.register_buffer("resolutions", torch.tensor(self.config.image_grid_pinpoints))

    def example(self):
        size = self.size
        arguments = torch.zeros(5, 3, size, size), torch.tensor([[2 * size, 2 * size]])
        return arguments, {"pixel_values": {0: "tiles"}, "image_sizes": {}}, OUTPUTS

    def forward(self, pixel_values, image_sizes):
        embeddings = self.tower.embeddings
        x = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + embeddings.position_embedding.weight
        for layer in self.layers:
            x = layer(x, None)
        x = self.projector(x)  # [tiles, side², hidden]
        picture = torch.cat([x.flatten(0, 1), self.image_newline[None]])
        index, share = self._layout(image_sizes[0], symbolic_length(pixel_values))
        return torch.cat([x[0], (picture[index] * share[..., None]).sum(1)])

    def _layout(self, size, tiles):
        """Rows of `picture` that make each feature after the first tile's, and their shares: both [features, 4]."""
        (across, top, left), (rows, columns), (height, width) = self._picture(size)
        width = torch.where(tiles == 1, 0, width)  # a tile alone has no picture after it, but a newline
        count = (torch.where(tiles == 1, 1, height) * (width + 1)).item()
        torch._check(count >= 1)
        feature = torch.arange(count)
        row, column = feature // (width + 1), feature % (width + 1)
        upper, lower, down = resized(row, rows, height)
        left_, right, along = resized(column, columns, width.clamp(min=1))

        def at(r, c):
            r, c = r + top, c + left
            tile = 1 + r // self.side * across + c // self.side
            return tile * self.side**2 + r % self.side * self.side + c % self.side

        index = torch.stack([at(upper, left_), at(upper, right), at(lower, left_), at(lower, right)], dim=-1)
        shares = [(1 - down) * (1 - along), (1 - down) * along, down * (1 - along), down * along]
        share, newline = torch.stack(shares, dim=-1), (column == width)[:, None]
        last = tiles * self.side**2
        first_only = torch.tensor([1.0, 0.0, 0.0, 0.0])
        return torch.where(newline, last, index), torch.where(newline, first_only, share)

    def _picture(self, size):
        """Tiles across and where the image begins in their features, its rows and columns there, and those it gets.

        The arithmetic is Python's, in float64: one row more or less would be another number of tokens.
        """
        height, width = size.double().unbind()
        tall, wide = self.resolutions.double().unbind(1)
        scale = torch.minimum(wide / width, tall / height)
        used = torch.minimum((width * scale).long() * (height * scale).long(), size[0] * size[1])
        wasted = self.resolutions[:, 0] * self.resolutions[:, 1] - used
        best = (
            self.resolutions[(used.double() * 2**25 - wasted.double()).argmax()] // self.size
        )  # most used, least wasted
        rows, columns = best[0] * self.side, best[1] * self.side
        tall, wide = rows.double(), columns.double()
        flat = width / height > wide / tall
        inner = torch.where(flat, height * (wide / width), width * (tall / height))
        inner = (inner + 5e-8).floor().long()  # round(·, 7) before int(·)
        top = torch.where(flat, (rows - inner) // 2, 0)
        left = torch.where(flat, 0, (columns - inner) // 2)
        rows, columns = rows - 2 * top, columns - 2 * left
        ratio = (rows * columns).double() / (self.most * self.side**2)
        ratio = ratio.sqrt()
        ratio = torch.where(ratio > 1.1, ratio, 1.0)
        return (best[1], top, left), (rows, columns), (floor_divide(rows, ratio), floor_divide(columns, ratio))


def symbolic_length(x: torch.Tensor) -> torch.Tensor:
    """x.shape[0] as a tensor: torch.export takes a length for one or for at least two, where the graph takes both."""
    return symbolic("::Shape", (x,), {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,), version=OPSET)[0]


def floor_divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Python's a // b of floats: by the remainder, so that a quotient that rounds up to a whole number does not count."""
    a = a.double()
    return ((a - torch.fmod(a, b)) / b).round().long()


def resized(index: torch.Tensor, source: torch.Tensor, target: torch.Tensor):
    """Two source rows and the share of the second for row `index` of `target` (bilinear, corners not aligned)."""
    point = ((index.float() + 0.5) * (source.float() / target.float()) - 0.5).clamp(min=0)
    first = point.long().minimum(source - 1)
    return first, (first + 1).minimum(source - 1), point - first.float()


def one_layer(layer) -> int:
    if not isinstance(layer, int):
        raise FormatError(f"ONNX graphs take the features of one vision layer, not {layer}; leave out --format onnx")
    return layer


def hidden_state(index: int, layers: nn.ModuleList) -> int:
    """Number of layers that run before hidden state `index`: 0 is what enters the first, −1 what leaves the last."""
    return index if index >= 0 else len(layers) + 1 + index
