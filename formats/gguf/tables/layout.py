"""What the two GGUF files of a model hold, and which hub tensor each of their tensors is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch.nn.functional import pad

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.tables.families import a_row, class_row_first, class_row_last
from vlmq_export.formats.gguf.tables.graphs import Part, Row, TextParams, VisionParams
from vlmq_export.formats.gguf.tables.params import text_params, vision_params
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.samples.companions import load_tokenizer


@dataclass(frozen=True)
class Place:
    """A tensor of a GGUF file, and where it comes from."""

    hub: str  # hub name of the source tensor
    module: str  # its name in the module tree of transformers 5
    shape: tuple[int, ...]  # of the GGUF tensor, in torch's order
    part: Callable[[torch.Tensor], torch.Tensor] | None  # of the source tensor; None: all of it
    linear: bool  # a matrix that multiplies activations
    added: tuple[int, ...] = ()  # zeros behind the source's own numbers, by dimension
    wide: bool = False  # whether it is F32, though it is no vector
    experts: int = 0  # how many matrices lie one behind the other; 0: it is one tensor of the hub
    # Of columns that stand in another order: heads of equal width, in the order of the file.
    heads: tuple[int, ...] = ()

    @property
    def hubs(self) -> list[str]:
        """Hub names of all source tensors that it is made of, in the order of the file."""
        return _each_expert(self.hub, self.experts)

    @property
    def modules(self) -> list[str]:
        """The same in the module tree of transformers 5, with a module for each expert."""
        return _each_expert(self.module, self.experts)

    @property
    def run(self) -> int:
        """Columns of the source that are neighbours in the file too."""
        return self.shape[-1] // max(1, len(self.heads))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a source tensor that belongs here, with zeros behind it."""
        part = heads_in_order(self.part(tensor) if self.part else tensor, self.heads)
        if not any(self.added):
            return part
        return pad(part, [n for more in reversed(self.added) for n in (0, more)])

    def inner(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape without these zeros."""
        return tuple(n - more for n, more in zip(shape, self.added))

    def of_array(self, array: np.ndarray) -> np.ndarray:
        """The same for an array with as many numbers for each head of the columns."""
        return self.of_rows(self.of_columns(array))

    def of_columns(self, array: np.ndarray) -> np.ndarray:
        """The same for the columns of an array, or for a number for each column."""
        return heads_in_order(torch.from_numpy(array), self.heads).numpy()

    def of_rows(self, array: np.ndarray) -> np.ndarray:
        """The same for the rows of an array, such as packed rows or a number for each row."""
        own = np.ascontiguousarray(self.part(torch.from_numpy(array))) if self.part else array
        rows = self.added[0] if self.added else 0
        return np.pad(own, ((0, rows), *[(0, 0)] * (own.ndim - 1))) if rows else own


def _each_expert(name: str, experts: int) -> list[str]:
    """The name for each number of an expert, where the given one has the number 0."""
    start, mark, end = name.partition(".experts.0.")
    return [f"{start}.experts.{e}.{end}" for e in range(experts)] if mark and experts else [name]


def pairs_together(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of heads with the two of each rotary pair side by side, as llama.cpp's `llama` has them.

    rows: [heads · head, ...], where a pair is rows i and i + head/2 of a head.
    """
    pairs = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _row(folder: Path, token: str) -> int:
    """The row of the embedding that is a token's. Raises FormatError for one that is no token."""
    ids = load_tokenizer(folder)(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise FormatError(
            f"tokenizer.json: {token} is no token, and llama.cpp puts its embedding behind the rows"
            " of an image; copy the file from the original model"
        )
    return int(ids[0])


def heads_in_order(values: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """The last axis, which is that of heads, in this order of them. None: as it is."""
    if not heads:
        return values
    return values.unflatten(-1, (len(heads), -1))[..., list(heads), :].flatten(-2)


def _then_in_order(
    rows: torch.Tensor, part: Part | None, heads: list[int], head: int
) -> torch.Tensor:
    """A part of a tensor, and then its value heads in order."""
    return value_heads_in_order(part(rows) if part else rows, heads, head)


def value_heads_in_order(rows: torch.Tensor, heads: list[int], head: int) -> torch.Tensor:
    """Rows whose last ones are those of value heads, with these heads in this order.

    head: rows of a head. [rows, ...] → the same shape
    """
    first = len(rows) - len(heads) * head
    values = rows[first:].unflatten(0, (len(heads), head))[heads].flatten(0, 1)
    return torch.cat([rows[:first], values])


@dataclass(frozen=True)
class Layout:
    """The text model and the mmproj of one model, resolved from its config.json once."""

    architecture: Architecture
    text_params: TextParams
    vision_params: VisionParams
    class_row: str  # where the class token's position row is: see contract.CLASS_ROWS
    # The row of the embedding that the mmproj has too; None: no tensor can be made of it.
    token_row: int | None = None

    @classmethod
    def of(
        cls, architecture: Architecture, class_row: str = "last", folder: Path | None = None
    ) -> Layout:
        """The layout of a model, whose tokenizer is in `folder`.

        Raises FormatError for a model that llama.cpp cannot express, and for a tokenizer that lacks
        a token which the mmproj needs.
        """
        text, vision = text_params(architecture), vision_params(architecture)
        token = vision.graph.row_end
        row = _row(folder, token) if folder and token else None
        return cls(architecture, text, vision, class_row, row)

    @cached_property
    def text(self) -> dict[str, Place]:
        """GGUF name → place, of every tensor of the text file, in the file's order."""
        p = self.text_params
        kinds = [blocks[0].kind for blocks in map(self.architecture.blocks, range(p.layers))]
        each = {
            "{i}": [(i, i) for i in range(p.layers)],
            "{a}": [(i, i) for i, kind in enumerate(kinds) if kind == "attention"],
            "{r}": [(i, i) for i, kind in enumerate(kinds) if kind == "recurrent"],
        }
        places = self._places(p.graph.rows, p.sizes, each)
        if p.tied:
            del places["output.weight"]
        return places

    @cached_property
    def vision(self) -> dict[str, Place]:
        """GGUF name → place, of every tensor of the mmproj, in the file's order.

        The three parts of a fused qkv have one source tensor, and so have the two time slices of
        the patch convolution. DeepStack's tensors are named after their block in the file, and
        numbered from 0 on the hub. The MLP is filled up with zeros to whole blocks of columns.
        """
        p = self.vision_params
        each = {
            "{i}": list(enumerate(range(p.layers))),
            "{d}": [(i, block) for i, block in enumerate(p.stacked)],
        }
        more = {"feed_forward": p.filled - p.feed_forward}
        places = self._places(p.graph.rows, p.sizes, each, more)
        parts: dict[Part | None, Part] = {}
        if self.class_row == "first":
            parts[class_row_last] = class_row_first
        if self.token_row is not None:
            parts[a_row] = itemgetter(self.token_row)
        return {n: replace(x, part=parts.get(x.part, x.part)) for n, x in places.items()}

    def _places(
        self,
        rows: Iterable[Row],
        sizes: Mapping[str, int],
        each: Mapping[str, Sequence[tuple[int, int]]],  # index → its numbers (on the hub, in GGUF)
        more: Mapping[str, int] = MappingProxyType({}),  # size → by how much it is larger in GGUF
    ) -> dict[str, Place]:
        places = {}
        by_index = groupby(rows, lambda row: next((k for k in each if k in row.gguf), None))
        for index, group in by_index:
            repeated = list(group)
            for module, gguf in each[index] if index else [(0, 0)]:
                for row in repeated:
                    own = tuple(int(s) if s.isdigit() else sizes[s] for s in row.shape)
                    added = tuple(more.get(s, 0) for s in row.shape)
                    shape = tuple(n + m for n, m in zip(own, added))
                    name = row.gguf.replace(index, str(gguf)) if index else row.gguf
                    source = row.module.replace(index, str(module)) if index else row.module
                    hub = self.architecture.family.hub_name(source)
                    part = partial(pairs_together, head=sizes["head"]) if row.pairs else row.part
                    experts = shape[0] if row.stacked else 0
                    delta = self.text_params.delta
                    order = delta.order if delta else []
                    if row.value_rows and delta and order:
                        head = 1 if shape[0] == delta.value_heads else delta.head
                        part = partial(_then_in_order, part=row.part, heads=order, head=head)
                    heads = tuple(order) if row.value_columns else ()
                    places[name] = Place(
                        hub, source, shape, part, row.linear, added, row.wide, experts, heads
                    )
        return places

    @property
    def head(self) -> str:
        """Hub name of the output matrix. A checkpoint may store it although it is the embedding."""
        return f"{self.architecture.family.head}.weight"

    @cached_property
    def unused(self) -> frozenset[str]:
        """Hub tensors that no graph runs, that of transformers included."""
        family = self.architecture.family
        return frozenset(family.hub_name(name) for name in self.vision_params.graph.unused)

    @cached_property
    def shared(self) -> dict[str, Place]:
        """The tensors of the mmproj that are parts of one of the text file."""
        text = {place.hub for place in self.text.values()}
        return {name: place for name, place in self.vision.items() if place.hub in text}

    @cached_property
    def held(self) -> frozenset[str]:
        """Hub tensors that one of the two files holds."""
        places = (*self.text.values(), *self.vision.values())
        return frozenset(hub for place in places for hub in place.hubs)

    def without_place(self, hub_names: Iterable[str]) -> list[str]:
        """Hub tensors that the files would lose."""
        idle = {self.head} if self.text_params.tied else set()
        return [name for name in hub_names if name not in self.held | self.unused | idle]


def shapes(places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """GGUF name → shape in torch's order."""
    return {name: place.shape for name, place in places.items()}
