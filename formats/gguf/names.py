"""Tensor names and shapes on both sides: what a GGUF file must hold, and which hub tensor each of its tensors is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from vlmq_export.formats.gguf.families import Row, class_row_first, class_row_last
from vlmq_export.formats.gguf.params import TextParams, VisionParams, text_params, vision_params
from vlmq_export.quantizer.families import family_of

Shapes = dict[str, tuple[int, ...]]  # GGUF name → shape in torch's order


@dataclass(frozen=True)
class Place:
    """A tensor of a GGUF file and where it comes from."""

    module: str  # transformers' name of the tensor
    shape: tuple[int, ...]
    part: Callable[[torch.Tensor], torch.Tensor] | None  # of the module tensor; None: all of it
    linear: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.part(tensor) if self.part else tensor


def text_places(p: TextParams) -> dict[str, Place]:
    """Every tensor of the text file, in file order."""
    places = _places(p.graph.rows, p.sizes, {"{i}": list(enumerate(range(p.layers)))})
    if p.tied:
        del places["output.weight"]
    return places


def vision_places(p: VisionParams, class_row: str = "last") -> dict[str, Place]:
    """Every tensor of the mmproj, in file order. DeepStack's are named after their block in the file, by number on the
    hub. `class_row`: where the class token's position row is, last for llama.cpp b11549 or first as on the hub."""
    each = {"{i}": list(enumerate(range(p.layers))), "{d}": [(i, block) for i, block in enumerate(p.stacked)]}
    places = _places(p.graph.rows, p.sizes, each)
    if class_row == "first":
        moved = {n: replace(x, part=class_row_first) for n, x in places.items() if x.part is class_row_last}
        places |= moved
    return places


def _places(rows: tuple[Row, ...], sizes: dict[str, int], each: dict[str, list[tuple[int, int]]]) -> dict[str, Place]:
    places = {}
    for index, group in groupby(rows, lambda row: next((k for k in each if k in row.gguf), None)):
        repeated = list(group)
        for module, gguf in each[index] if index else [(0, 0)]:
            for row in repeated:
                shape = tuple(int(s) if s.isdigit() else sizes[s] for s in row.shape)
                name = row.gguf.replace(index, str(gguf)) if index else row.gguf
                source = row.module.replace(index, str(module)) if index else row.module
                places[name] = Place(source, shape, row.part, row.linear)
    return places


def text_shapes(p: TextParams) -> Shapes:
    return {name: place.shape for name, place in text_places(p).items()}


def vision_shapes(p: VisionParams) -> Shapes:
    return {name: place.shape for name, place in vision_places(p).items()}


def text_to_hub(config: dict) -> dict[str, str]:
    return _hub_names(config, text_places(text_params(config)))


def vision_to_hub(config: dict) -> dict[str, str]:
    """The three parts of a fused qkv, and the two time slices of the patch convolution, name the same hub tensor."""
    return _hub_names(config, vision_places(vision_params(config)))


def _hub_names(config: dict, places: dict[str, Place]) -> dict[str, str]:
    family = family_of(config)
    return {name: family.hub_name(place.module) for name, place in places.items()}


def to_hub(config: dict) -> dict[str, str]:
    """GGUF tensor name → hub tensor name, over both files."""
    return text_to_hub(config) | vision_to_hub(config)


def from_hub(config: dict) -> dict[str, tuple[str, ...]]:
    """Hub tensor name → the GGUF tensors that hold it."""
    inverse: dict[str, tuple[str, ...]] = {}
    for name, hub in to_hub(config).items():
        inverse[hub] = (*inverse.get(hub, ()), name)
    return inverse


def unused(config: dict) -> set[str]:
    """Hub tensors that a GGUF need not hold: no graph runs them, transformers' own included."""
    return {family_of(config).hub_name(module) for module in vision_params(config).graph.unused}


def without_place(config: dict, hub_names: list[str]) -> list[str]:
    """Hub tensors that the files would lose."""
    known = set(to_hub(config).values()) | unused(config)
    return [n for n in hub_names if n not in known and not (n == head(config) and text_params(config).tied)]


def head(config: dict) -> str:
    """Hub name of the output matrix, which a file stores although it is the embedding itself."""
    return family_of(config).hub_name("lm_head.weight")


def expected_mmproj(
    weights, config: dict, dtype: str = "f16", class_row: str = "last"
) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor of the mmproj, from `reference.Weights`: what a reader must find.

    Raises FormatError for a tower that an mmproj cannot express.
    """
    places, hub = vision_places(vision_params(config), class_row), vision_to_hub(config)
    for name, place in places.items():
        array = np.ascontiguousarray(place.of(torch.from_numpy(weights.array(hub[name]))).numpy())
        yield name, _ROUNDED.get(dtype, _as_is)(array) if place.linear else array


def _as_is(array: np.ndarray) -> np.ndarray:
    return array


def _half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float32)


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """Q8_0: blocks of 32 in steps of max/127, the step in float16; rows that do not fill blocks are float16."""
    if array.shape[1] % 32:
        return _half(array)
    blocks = array.reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    # half away from zero, as C's roundf
    codes = np.trunc(blocks * inverse + np.copysign(np.float32(0.5), blocks))
    return (codes * step.astype(np.float16).astype(np.float32)).reshape(array.shape)


_ROUNDED = {"f16": _half, "q8_0": _eight_bits}
