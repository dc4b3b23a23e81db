"""What there is to say of a family in llama.cpp, and of one model of it.

`TextGraph` and `VisionGraph` describe a family: its names, its tensors, and what llama.cpp computes
whatever config.json says. `families.py` has one of each per family. `TextParams` and `VisionParams`
are the sizes of one model, which `params.py` reads from config.json, and the metadata that they
become. `Row` is a line in a family's table of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from vlmq_export.quantizer.config import VISION_GROUP

Part = Callable[[torch.Tensor], torch.Tensor]  # makes a GGUF tensor of a source tensor


@dataclass(frozen=True)
class Row:
    """A GGUF tensor, or one of each block where the names contain an index."""

    # Its name in the file. {i} is a block, {a} one with an attention, {r} one with a linear
    # attention, and {d} a block whose features are stacked.
    gguf: str
    module: str  # the name of its source in the module tree of transformers 5
    shape: tuple[str, ...]  # names of sizes, or digits; in torch's order
    part: Part | None = None  # None: the source tensor as it is
    linear: bool = False  # a matrix that multiplies activations; all others are F32 in an mmproj
    wide: bool = False  # whether it is F32, though it is no vector
    # Whether it has the matrices of all experts, one behind the other. `module` is the first.
    stacked: bool = False
    # Whether its rows are those of heads, and the two of a rotary pair stand next to each other in
    # the file. In transformers the second of each pair is in the other half of the head.
    pairs: bool = False
    # Whether its last rows, or its columns, are those of the value heads of a linear attention.
    # With r of them for each key head, transformers has the r of the first key head first. In the
    # file the first of each key head come first, then the second of each.
    value_rows: bool = False
    value_columns: bool = False


@dataclass(frozen=True)
class TextGraph:
    """A language model in llama.cpp."""

    arch: str  # general.architecture
    rows: tuple[Row, ...]
    rope_types: tuple[str, ...]  # those of config.json that the graph computes
    sections: bool = False  # whether rotary pairs are divided among time, height and width
    head_keys: bool = False  # whether head_dim is written, and need not be hidden / heads
    # n, where llama.cpp has every n-th layer see all tokens and the others a window, unless the
    # file says which. None: all layers see all tokens.
    windows: int | None = None
    sparse: bool = False  # whether its layers have experts
    gelu: bool = False  # whether the MLP's activation is GELU, which llama.cpp reads from a table
    recurrent: bool = False  # whether some layers have a linear attention, a gated delta net
    # Layers, hidden, heads and head_dim → the only query_pre_attn_scalar that the graph computes.
    scalar: Callable[[int, int, int, int], int] | None = None
    # Key of the text's config → the only value that the graph computes.
    fixed: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class VisionGraph:
    """A vision tower with its projector in mtmd. Keys are those of vision_config."""

    projector: str  # clip.projector_type
    rows: tuple[Row, ...]
    # Size → key. If feed_forward is not here, it is mlp_ratio times hidden.
    sizes: dict[str, str]
    # Key → the only value that the graph computes, which is also transformers' default.
    fixed: dict[str, object]
    activation: str | None  # clip.use_…; None is quick-GELU
    out: str | None = None  # key of the projector's output; None: the language model's width
    eps: str | float = 1e-6  # key, or the constant in transformers' code
    # Patches along each side that become one token, or the key of config.json that says so.
    merge: int | str = 2
    pooled: str | None = None  # key of config.json with an image's tokens, which says the same
    # Written where mtmd asks for a size that means nothing; None: the tower has one of its own.
    image_size: int | None = None
    any_size: bool = True  # whether images may have any shape, within limits of their pixels
    class_token: bool = False
    # Whether an MLP as wide as the tower is read as it is. In other families llama.cpp takes it for
    # a file of an old converter, which had swapped ffn_up and ffn_down.
    square_mlp: bool = False
    keys: Callable[[VisionParams], dict[str, object]] = lambda p: {}  # more keys of clip.vision.*
    every_nth: str | None = None  # key of the blocks that attend over the whole image
    # Key of the blocks whose features join the first layers of the language model.
    stacked: str | None = None
    # Key of `fixed` → why no other value is written, where it is not that the graph knows but one.
    reasons: dict[str, str] = field(default_factory=dict)
    # As `fixed`, for config.json itself.
    top_fixed: dict[str, object] = field(default_factory=dict)
    # Regular expression of what stands for an image in a prompt. mtmd takes a marker in its place.
    image: str = r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>"
    # Whether mtmd writes words before an image's tiles, and two line breaks before the whole image.
    words: bool = False
    # What the processor writes before an image and behind it, and mtmd leaves to the caller.
    around: str = ""
    unused: tuple[str, ...] = ()  # tensors that transformers loads and never uses
    # GGUF name of a row that transformers appends to an image's tokens and mtmd does not.
    newline: str | None = None
    # The token of text behind each row of an image but the last. mtmd takes its embedding from the
    # mmproj, and gives it among the rows of the image.
    row_end: str = ""
    text_eps: bool = False  # whether transformers computes a norm with the language model's epsilon
    rotary_base: float | None = None  # the only one that the tower computes; None: it has none
    # The most tokens of an image that llama.cpp allows where it is not told otherwise; None: the
    # mmproj says how many.
    most: int | None = None


@dataclass(frozen=True)
class DeltaNet:
    """The linear attention of a language model: gated delta nets."""

    every: int  # each so-manieth layer has an attention in place of it
    key_heads: int
    value_heads: int
    head: int  # columns of a head, of keys and of values
    kernel: int  # tokens that its convolution sees

    @property
    def order(self) -> list[int]:
        """The value heads in the order of the file; empty where it is that of transformers."""
        each = self.value_heads // self.key_heads
        tiled = [k * each + i for i in range(each) for k in range(self.key_heads)]
        return tiled if each > 1 else []

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the names that rows use."""
        values = self.value_heads * self.head
        return {
            "value_heads": self.value_heads,
            "value_head": self.head,
            "values": values,
            "mixed": 2 * self.key_heads * self.head + values,
            "kernel": self.kernel,
        }

    def keys(self) -> dict[str, object]:
        """The metadata of the architecture."""
        return {
            "full_attention_interval": self.every,
            "ssm.conv_kernel": self.kernel,
            "ssm.state_size": self.head,
            "ssm.group_count": self.key_heads,
            "ssm.time_step_rank": self.value_heads,
            "ssm.inner_size": self.value_heads * self.head,
        }


@dataclass(frozen=True)
class TextParams:
    """The language model of one model."""

    graph: TextGraph
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # rows of the embedding, padding included
    context: int  # the most positions
    rms_eps: float
    rope_theta: float
    # Rotary pairs for time, height and width. Empty for plain rotary positions.
    sections: tuple[int, ...]
    # Keys of scaled rotary positions, which those of layers with a window are not.
    scaling: dict[str, object]
    windows: tuple[bool, ...]  # whether a layer sees a window of tokens alone; empty if none does
    window: int  # its length
    window_theta: float  # rope_theta of these layers
    stacked: int  # number of first layers that take features of their own from the vision tower
    tied: bool  # whether the output matrix is the embedding
    experts: int = 0  # of a layer; 0: it has one MLP
    taken: int = 0  # experts that a token takes
    expert_width: int = 0  # of an expert's MLP
    rotary: int = 0  # columns of a head that have a position; 0: all
    delta: DeltaNet | None = None  # of layers with a linear attention

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes by the names that rows use."""
        return (self.delta.sizes if self.delta else {}) | {
            "experts": self.experts,
            "expert_width": self.expert_width,
            "vocabulary": self.vocabulary,
            "hidden": self.hidden,
            "feed_forward": self.feed_forward,
            "head": self.head_dim,
            "query": self.heads * self.head_dim,
            "gated_query": 2 * self.heads * self.head_dim,
            "key": self.kv_heads * self.head_dim,
        }

    def keys(self) -> dict[str, object]:
        """The metadata of the architecture."""
        own: dict[str, object] = {
            "context_length": self.context,
            "block_count": self.layers,
            "embedding_length": self.hidden,
            "feed_forward_length": self.feed_forward,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": self.rms_eps,
            "rope.freq_base": self.rope_theta,
        }
        if self.graph.sections:
            own["rope.dimension_sections"] = [*self.sections, 0]
        if self.graph.head_keys:
            own |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        own |= self.scaling
        if self.windows and self.graph.windows:
            own["attention.sliding_window"] = self.window
            if self.windows != tuple((i + 1) % self.graph.windows != 0 for i in range(self.layers)):
                own["attention.sliding_window_pattern"] = list(self.windows)
            own["rope.freq_base_swa"] = self.window_theta
        if self.experts:
            own["expert_count"] = self.experts
            own["expert_used_count"] = self.taken
            own["expert_feed_forward_length"] = self.expert_width
        if self.rotary:
            own["rope.dimension_count"] = self.rotary
        if self.delta:
            own |= self.delta.keys()
        if self.stacked:
            own["n_deepstack_layers"] = self.stacked
        return {f"{self.graph.arch}.{key}": value for key, value in own.items()}


@dataclass(frozen=True)
class VisionParams:
    """The vision tower of one model."""

    graph: VisionGraph
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    patch: int  # side of a patch, in pixels
    out: int  # width of the language model
    merge: int  # patches along each side that become one token
    # Side of the square that the tower was trained on, in pixels. Without meaning where the tower
    # takes any size.
    image: int
    positions: int  # rows of the learned position embedding; 0 where there is none
    window_pattern: int | None  # n, where every n-th block attends over the whole image
    stacked: tuple[int, ...]  # blocks whose features join the first layers of the language model
    eps: float  # of the layer norms

    @property
    def filled(self) -> int:
        """The width of the MLP in the file: whole blocks, with zeros behind the source's own.

        Every activation makes zero of zero, so that what is added takes no part in any output.
        """
        return self.feed_forward + -self.feed_forward % VISION_GROUP

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes of the source by the names that rows use."""
        return {
            "hidden": self.hidden,
            "feed_forward": self.feed_forward,
            "patch": self.patch,
            "positions": self.positions,
            "fused": 3 * self.hidden,
            "head": self.hidden // self.heads,
            "merged": self.merge**2 * self.hidden,
            "out": self.out,
        }

    def keys(self) -> dict[str, object]:
        """The metadata of the tower, without that of the image processor."""
        own: dict[str, object] = {
            "projection_dim": self.out,
            "image_size": self.image,
            "patch_size": self.patch,
            "embedding_length": self.hidden,
            "feed_forward_length": self.filled,
            "block_count": self.layers,
            "attention.head_count": self.heads,
            "attention.layer_norm_epsilon": self.eps,
            **self.graph.keys(self),
        }
        clip: dict[str, object] = {
            "has_vision_encoder": True,
            "projector_type": self.graph.projector,
        }
        if self.graph.activation:
            clip[f"use_{self.graph.activation}"] = True
        vision = {f"clip.vision.{key}": value for key, value in own.items()}
        return {f"clip.{key}": value for key, value in clip.items()} | vision
