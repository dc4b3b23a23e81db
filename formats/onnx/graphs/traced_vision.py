"""Vision towers with their projectors, as modules that torch.onnx can trace.

The towers' own code counts frames, rows and tiles in Python, so that a trace of it would hold for
one image only. Here the graph itself counts them. Each class takes the whole model, without
weights. Its `forward` gives image_features [image tokens, width] of all images in order, and its
`example()` is what it is traced with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.onnx.ops import symbolic

from vlmq_export.errors import FormatError
from vlmq_export.formats.model_plan import require_even_positions
from vlmq_export.formats.onnx.graphs.traced_operators import OPSET
from vlmq_export.formats.onnx.graphs.traced_text import Example

OUTPUTS = ("image_features",)


class Qwen3Vision(nn.Module):
    """Patches of any number of images → their features.

    A feature is (1 + deepstack)·hidden wide: the embedding of an image token, then what the first
    layers of the decoder add to it (deepstack). In Qwen3.5 they add nothing.
    """

    inv_freq: torch.Tensor  # [head size / 4]

    def __init__(self, model: Any):
        super().__init__()
        self.visual: Any = model.model.visual
        config: Any = self.visual.config
        self.indexes: list[int] = getattr(self.visual, "deepstack_visual_indexes", [])
        self.deepstack = len(self.indexes)  # how many decoder layers are fed
        self.merge: int = config.spatial_merge_size
        self.side: int = self.visual.num_grid_per_side
        self.heads: int = config.num_heads
        rotary: Any = type(self.visual.rotary_pos_emb)(config)
        self.register_buffer("inv_freq", rotary.inv_freq.clone())
        self.pixels: int = config.in_channels * config.temporal_patch_size * config.patch_size**2

    def example(self) -> Example:
        """Two images of two frames, each frame of 2 × 2 merged patches."""
        frame = 4 * self.merge**2
        arguments = (
            torch.zeros(2 * frame + 2 * frame, self.pixels),
            torch.tensor([[2, 2 * self.merge, 2 * self.merge]] * 2),
        )
        inputs = {"pixel_values": {0: "patches"}, "image_grid_thw": {0: "images"}}
        return Example(arguments, inputs, OUTPUTS)

    def forward(
        self,
        pixel_values: torch.Tensor,  # [patches, channels·frames of a patch·side·side]
        image_grid_thw: torch.Tensor,  # int64 [images, 3]: frames, rows and columns of patches
    ) -> torch.Tensor:
        """The features, [image tokens, (1 + deepstack)·hidden]."""
        frame, row, column, heights, widths = patch_grid(
            pixel_values.shape[0], image_grid_thw, self.merge
        )
        visual = self.visual
        x = visual.patch_embed(pixel_values) + self._positions(row, column, heights, widths)
        angles = torch.cat([row[:, None] * self.inv_freq, column[:, None] * self.inv_freq], dim=-1)
        cos, sin = angles.cos(), angles.sin()  # [patches, head size / 2]
        # [patches, patches]: added to the scores, it keeps the frames apart.
        apart = torch.where(frame[:, None] == frame, 0.0, torch.finfo(torch.float32).min)
        deep = []
        for i, block in enumerate(visual.blocks):
            x = x + self._attend(block.attn, block.norm1(x), cos, sin, apart)
            x = x + block.mlp(block.norm2(x))
            if i in self.indexes:
                deep.append(visual.deepstack_merger_list[self.indexes.index(i)](x))
        return torch.cat([visual.merger(x), *deep], dim=-1)

    def _attend(
        self,
        attention: Any,
        x: torch.Tensor,  # [patches, hidden]
        cos: torch.Tensor,
        sin: torch.Tensor,
        apart: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of every patch over the patches of its own frame, [patches, hidden]."""
        each = attention.qkv(x).unflatten(-1, (3, self.heads, -1))
        each = each.permute(1, 2, 0, 3)  # [3, heads, patches, head size]
        query, key, value = each[0], each[1], each[2]
        query, key = rotate_half(query, cos, sin), rotate_half(key, cos, sin)
        scores = query @ key.transpose(1, 2) * attention.scaling
        attended = (scores + apart).softmax(-1) @ value
        return attention.proj(attended.transpose(0, 1).flatten(1))

    def _positions(
        self, row: torch.Tensor, column: torch.Tensor, heights: torch.Tensor, widths: torch.Tensor
    ) -> torch.Tensor:
        """The learned positions of the patches, [patches, hidden].

        They are a square grid that is stretched over each image, corners on corners, and sampled
        bilinearly. Arguments are those that `patch_grid` gives.
        """
        top, bottom, down = taps(row, heights, self.side)
        left, right, across = taps(column, widths, self.side)
        table = self.visual.pos_embed.weight
        return (
            table[top * self.side + left] * ((1 - down) * (1 - across))[:, None]
            + table[top * self.side + right] * ((1 - down) * across)[:, None]
            + table[bottom * self.side + left] * (down * (1 - across))[:, None]
            + table[bottom * self.side + right] * (down * across)[:, None]
        )


def patch_grid(
    patches: int,
    grid: torch.Tensor,  # int64 [images, 3]: frames, rows and columns of patches
    merge: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each patch is: frame, row, column, and height and width of its image, [patches] each.

    Frames are counted over all images, and everything else in patches. The patches come image after
    image, frame after frame, and in blocks of merge × merge, as Qwen2-VL's processor orders them.
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


def taps(
    index: torch.Tensor, size: torch.Tensor, side: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where point `index` of `size` points lies in a table of `side` entries, corners on corners.

    Returns its two neighbours in the table, and the share of the second one.
    """
    point = index.float() * (side - 1) / (size - 1).clamp(min=1)
    first = point.floor()
    return first.long(), (first.long() + 1).clamp(max=side - 1), point - first


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The two halves of each head rotated against each other; x [..., patches, head size]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class InternVision(nn.Module):
    """The tiles of all images in order → their features."""

    deepstack = 0  # no decoder layer is fed

    def __init__(self, model: Any):
        super().__init__()
        self.tower: Any = model.model.vision_tower
        self.projector: Any = model.model.multi_modal_projector
        self.config: Any = model.config
        self.pixel_shuffle: Any = model.model.pixel_shuffle
        layer = one_layer(self.config.vision_feature_layer)
        layers = self.tower.encoder.layer
        self.last = layer == -1  # what the whole tower gives
        self.layers: Any = layers[: None if self.last else hidden_state(layer, layers)]

    def example(self) -> Example:
        """Three tiles."""
        height, width = self.tower.embeddings.image_size
        pixels = torch.zeros(3, self.config.vision_config.num_channels, height, width)
        return Example((pixels,), {"pixel_values": {0: "tiles"}}, OUTPUTS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[tiles, channels, size, size] → [image tokens, hidden]."""
        embeddings = self.tower.embeddings
        x = embeddings.patch_embeddings(pixel_values)
        x = torch.cat([embeddings.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if embeddings.position_embeddings is not None:
            x = x + embeddings.position_embeddings
        for layer in self.layers:
            x = layer(x)
        x = self.tower.layernorm(x) if self.last else x
        if self.config.vision_feature_select_strategy == "default":
            x = x[:, 1:]  # without the class token
        side = int(x.shape[1] ** 0.5)
        x = self.pixel_shuffle(
            x.unflatten(1, (side, side)), scale_factor=self.config.downsample_ratio
        )
        return self.projector(x.flatten(1, 2)).flatten(0, 1)


class SmolVision(nn.Module):
    """Tiles of any number of images → their features, of Idefics3 and SmolVLM.

    Every tile is taken whole: where transformers' processor pads a batch of prompts with tiles of
    zeros, these must be left out.

    Raises FormatError for tiles whose positions transformers rounds.
    """

    deepstack = 0  # no decoder layer is fed

    def __init__(self, model: Any):
        super().__init__()
        self.tower: Any = model.model.vision_model
        self.connector: Any = model.model.connector
        self.config: Any = model.config.vision_config
        require_even_positions(self.config.image_size // self.config.patch_size)

    def example(self) -> Example:
        """Two prompts with three tiles each."""
        size = self.config.image_size
        pixels = torch.zeros(2, 3, self.config.num_channels, size, size)
        return Example((pixels,), {"pixel_values": {0: "prompts", 1: "tiles"}}, OUTPUTS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[prompts, tiles, channels, size, size] → [image tokens, hidden]."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = patches + embeddings.position_embedding.weight
        for layer in self.tower.encoder.layers:
            x = layer(x, None)
        return self.connector(self.tower.post_layernorm(x)).flatten(0, 1)


class GemmaVision(nn.Module):
    """Any number of images, one tile each → their features: SigLIP, whose patches are pooled."""

    deepstack = 0  # no decoder layer is fed

    def __init__(self, model: Any):
        super().__init__()
        self.tower: Any = model.model.vision_tower
        self.projector: Any = model.model.multi_modal_projector
        self.config: Any = model.config.vision_config

    def example(self) -> Example:
        """Two images."""
        size = self.config.image_size
        pixels = torch.zeros(2, self.config.num_channels, size, size)
        return Example((pixels,), {"pixel_values": {0: "images"}}, OUTPUTS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, channels, size, size] → [image tokens, hidden]."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = patches + embeddings.position_embedding.weight
        for layer in self.tower.encoder.layers:
            x = layer(x, None)
        return self.projector(self.tower.post_layernorm(x)).flatten(0, 1)


class PixtralVision(nn.Module):
    """Images of one size → their features: Pixtral with Mistral 3's projector.

    The tower of the model takes images of several sizes as one sequence. Those of one size are rows
    of a batch here, which see no patch of each other either.
    """

    deepstack = 0  # no decoder layer is fed
    inv_freq: torch.Tensor  # [head size / 2]: of rows, then of columns

    def __init__(self, model: Any):
        super().__init__()
        self.tower: Any = model.model.vision_tower
        self.projector: Any = model.model.multi_modal_projector
        self.merge: int = model.config.spatial_merge_size
        layer, layers = one_layer(model.config.vision_feature_layer), self.tower.transformer.layers
        self.layers: Any = layers[: hidden_state(layer, layers)]
        self.register_buffer("inv_freq", axial_frequencies(self.tower.config))

    def example(self) -> Example:
        """Two images of 3 × 4 merged patches."""
        config: Any = self.tower.config
        unit = config.patch_size * self.merge
        pixels = torch.zeros(2, config.num_channels, 3 * unit, 4 * unit)
        axes = {0: "images", 2: "height", 3: "width"}
        return Example((pixels,), {"pixel_values": axes}, OUTPUTS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, channels, height, width] → [image tokens, hidden]."""
        grid = self.tower.patch_conv(pixel_values)  # [images, width of the tower, rows, columns]
        rows, columns = grid.shape[2:]
        x = self.tower.ln_pre(grid.flatten(2).transpose(1, 2))
        by_row, by_column = self.inv_freq.chunk(2)
        down = (torch.arange(rows)[:, None] * by_row)[:, None].expand(-1, columns, -1)
        across = (torch.arange(columns)[:, None] * by_column)[None].expand(rows, -1, -1)
        turn = torch.cat([down, across] * 2, dim=-1).flatten(0, 1)  # [patches, head size]
        for layer in self.layers:
            x = layer(x, None, position_embeddings=(turn.cos(), turn.sin()))
        return self._projected(self.projector.norm(x), columns)

    def _projected(self, x: torch.Tensor, columns: int) -> torch.Tensor:
        """[images, patches, width of the tower] → [image tokens, hidden].

        The patches of a token are put side by side, column by column of the tower's width.
        """
        side, projector = self.merge, self.projector
        x = x.unflatten(1, (-1, side, columns // side, side))
        x = x.permute(0, 1, 3, 5, 2, 4).flatten(0, 2).flatten(1)  # [tokens, width · side²]
        x = projector.patch_merger.merging_layer(x)
        return projector.linear_2(projector.act(projector.linear_1(x)))


def axial_frequencies(config: Any) -> torch.Tensor:
    """The frequencies of Pixtral: every second one turns with the row, the others with the column.

    [head size / 2], of rows and then of columns.
    """
    size, base = config.head_dim, config.rope_parameters["rope_theta"]
    frequencies = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float) / size))
    return torch.cat([frequencies[0::2], frequencies[1::2]])


class LlavaOnevision(nn.Module):
    """The tiles of one image, and its size → its features.

    The first tile is the whole image. The others are cut from the image once it is resized to the
    resolution of `image_grid_pinpoints` that fits best. The features of these are laid out as one
    picture: its padding is cut off, it is made smaller if it is large, and each of its rows ends
    with `image_newline`. An image among several is a single tile. It has no picture after it, but
    one newline.

    Raises FormatError for a model that does not take every patch of a tile.
    """

    deepstack = 0  # no decoder layer is fed
    resolutions: torch.Tensor  # int64 [resolutions, 2]: height and width, in pixels

    def __init__(self, model: Any):
        super().__init__()
        self.tower: Any = model.model.vision_tower
        self.projector: Any = model.model.multi_modal_projector
        self.image_newline: Any = model.model.image_newline
        self.config: Any = model.config
        if self.config.vision_feature_select_strategy != "full":
            raise FormatError(
                "ONNX graphs of LLaVA-OneVision take every patch of a tile; leave out --format onnx"
            )
        vision = self.config.vision_config
        self.size: int = vision.image_size  # of a tile, in pixels
        self.side: int = vision.image_size // vision.patch_size  # of a tile, in patches
        layers, layer = self.tower.encoder.layers, one_layer(self.config.vision_feature_layer)
        self.layers: Any = layers[: hidden_state(layer, layers)]
        # A picture has at most as many features as this number of tiles.
        self.most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        self.register_buffer("resolutions", torch.tensor(self.config.image_grid_pinpoints))

    def example(self) -> Example:
        """The whole image, and four tiles cut from it."""
        size = self.size
        arguments = torch.zeros(5, 3, size, size), torch.tensor([[2 * size, 2 * size]])
        return Example(arguments, {"pixel_values": {0: "tiles"}, "image_sizes": {}}, OUTPUTS)

    def forward(
        self,
        pixel_values: torch.Tensor,  # [tiles, 3, size, size]
        image_sizes: torch.Tensor,  # int64 [1, 2]: height and width of the image, in pixels
    ) -> torch.Tensor:
        """The features, [image tokens, hidden]."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = patches + embeddings.position_embedding.weight
        for layer in self.layers:
            x = layer(x, None)
        x = self.projector(x)  # [tiles, side², hidden]
        picture = torch.cat([x.flatten(0, 1), self.image_newline[None]])
        index, share = self._layout(image_sizes[0], symbolic_length(pixel_values))
        return torch.cat([x[0], (picture[index] * share[..., None]).sum(1)])

    def _layout(
        self,
        size: torch.Tensor,  # int64 [2]: height and width of the image
        tiles: torch.Tensor,  # int64: how many there are
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What makes each feature of the picture: four of the tiles' features, and their shares.

        Both are [features, 4]. The index counts the features of all tiles, tile after tile, and
        behind them the newline.
        """
        (across, top, left), (rows, columns), (height, width) = self._picture(size)
        # A single tile has no picture after it: one row, and in it the newline alone.
        width = torch.where(tiles == 1, 0, width)
        count = (torch.where(tiles == 1, 1, height) * (width + 1)).item()
        torch._check(count >= 1)
        feature = torch.arange(count)
        row, column = feature // (width + 1), feature % (width + 1)
        upper, lower, down = resized(row, rows, height)
        left_, right, along = resized(column, columns, width.clamp(min=1))

        def at(r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            r, c = r + top, c + left
            tile = 1 + r // self.side * across + c // self.side
            return tile * self.side**2 + r % self.side * self.side + c % self.side

        corners = [at(upper, left_), at(upper, right), at(lower, left_), at(lower, right)]
        index = torch.stack(corners, dim=-1)
        shares = [(1 - down) * (1 - along), (1 - down) * along, down * (1 - along), down * along]
        share, newline = torch.stack(shares, dim=-1), (column == width)[:, None]
        last = tiles * self.side**2
        first_only = torch.tensor([1.0, 0.0, 0.0, 0.0])
        return torch.where(newline, last, index), torch.where(newline, first_only, share)

    def _picture(self, size: torch.Tensor) -> tuple[tuple, tuple, tuple]:
        """How the picture of an image of this size is laid out, in features.

        Returns

        1. how many tiles lie side by side, and the row and column where the image begins within
           its padding
        2. the rows and columns of the image
        3. the rows and columns to which it is resized

        The model's code does this in Python's float64, and so does the graph: one row more or less
        would be another number of image tokens.
        """
        height, width = size.double().unbind()
        tall, wide = self.resolutions.double().unbind(1)
        scale = torch.minimum(wide / width, tall / height)
        used = torch.minimum((width * scale).long() * (height * scale).long(), size[0] * size[1])
        wasted = self.resolutions[:, 0] * self.resolutions[:, 1] - used
        # The resolution with the most pixels in use, and of these the one with the least waste.
        chosen = (used.double() * 2**25 - wasted.double()).argmax()
        best = self.resolutions[chosen] // self.size  # tiles: down, across
        rows, columns = best[0] * self.side, best[1] * self.side
        tall, wide = rows.double(), columns.double()
        flat = width / height > wide / tall
        inner = torch.where(flat, height * (wide / width), width * (tall / height))
        # The model's code is int(round(·, 7)).
        inner = (inner + 5e-8).floor().long()
        top = torch.where(flat, (rows - inner) // 2, 0)
        left = torch.where(flat, 0, (columns - inner) // 2)
        rows, columns = rows - 2 * top, columns - 2 * left
        ratio = (rows * columns).double() / (self.most * self.side**2)
        ratio = ratio.sqrt()
        ratio = torch.where(ratio > 1.1, ratio, 1.0)
        place = best[1], top, left
        resized_to = floor_divide(rows, ratio), floor_divide(columns, ratio)
        return place, (rows, columns), resized_to


def symbolic_length(x: torch.Tensor) -> torch.Tensor:
    """x.shape[0] as a tensor, for a graph in which it may be one or more.

    torch.export itself specializes a length, either to one or to at least two.
    """
    return symbolic(
        "::Shape", (x,), {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,), version=OPSET
    )[0]


def floor_divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Python's a // b of floats, int64.

    It is computed by the remainder, because the rounded quotient may be a whole number that the
    exact one does not reach.
    """
    a = a.double()
    return ((a - torch.fmod(a, b)) / b).round().long()


def resized(
    index: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where row `index` of `target` rows lies among `source` rows (bilinear, corners not aligned).

    Returns its two neighbours among the source's rows, and the share of the second one.
    """
    point = ((index.float() + 0.5) * (source.float() / target.float()) - 0.5).clamp(min=0)
    first = point.long().minimum(source - 1)
    return first, (first + 1).minimum(source - 1), point - first.float()


def one_layer(layer: Any) -> int:
    """The number of the vision layer in config.json. Raises FormatError for several layers."""
    if not isinstance(layer, int):
        raise FormatError(
            f"ONNX graphs take the features of one vision layer, not {layer};"
            " leave out --format onnx"
        )
    return layer


def hidden_state(index: int, layers: nn.ModuleList) -> int:
    """How many layers run before hidden state `index` of a model.

    State 0 is what enters the first layer, and −1 is what leaves the last one.
    """
    return index if index >= 0 else len(layers) + 1 + index
