"""L1: every weight and every key of both files, as three readers find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError, MissingRuntime
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.completeness import complete
from vlmq_export.formats.gguf.proof.rows import Exported, failed, gated
from vlmq_export.formats.gguf.tables.layout import Place
from vlmq_export.formats.proof.checks import Check, compare_weights

Reader = Callable[[Path], Iterator[tuple[str, np.ndarray]]]  # a file's (GGUF name, decoded array)


def completeness(export: Exported) -> Check:
    """Whether the files have all that llama.cpp needs."""
    folder = export.reference.folder
    problems = [
        problem
        for file in (export.text, export.mmproj)
        for problem in complete(file, export.layout, folder)
    ]
    return gated(
        "L1",
        "metadata and names complete",
        len(problems),
        0,
        unit="problems",
        detail="what llama.cpp misses silently: biases, rope base, tokenizer, shapes",
        worst="; ".join(problems[:4]),
    )


def weights_read_back(export: Exported) -> Iterator[Check]:
    """Every weight of the model by each reader, bit for bit."""
    readers: dict[str, Reader] = {
        "gguf-py": read.decode_gguf_py,
        "llama.cpp's own decoder": read.decode_libggml,
        "our reader": read.decode_ours,
    }
    dtype = export.mmproj_dtype
    detail = "" if dtype == "f32" else f"linears of the mmproj against the source cast to {dtype}"
    if export.solved_tower:
        detail = f"linears of the mmproj against the artifact's integers, others cast to {dtype}"
    weights, unused = export.reference.weights, export.layout.unused
    idle = sum(weights.array(name).size for name in weights.names() if name in unused)
    layout, places = export.layout, export.layout.vision.values()
    idle -= sum(prod(place.shape) for place in layout.shared.values())  # which are in both files
    zeros = sum(prod(p.shape) - prod(p.inner(p.shape)) for p in places)
    for who, reader in readers.items():
        name, pairs = f"weights by {who}", _Pairs(export, reader)
        try:
            yield compare_weights(
                "gguf",
                name,
                pairs.expected(),
                pairs.found.get,
                count=weights.count - idle + zeros,
                detail=detail,
            )
        except MissingRuntime as e:
            yield Check.not_run("gguf", "L1", name, str(e))
        except FormatError as e:
            yield failed("L1", name, str(e))


class _Pairs:
    """What a reader finds beside what it should find, one tensor at a time in the file's order.

    Tensors that are absent come last.
    """

    def __init__(self, export: Exported, reader: Reader):
        self.export, self.reader = export, reader
        # The tensor that `expected` is at, by the name that it yields.
        self.found: dict[str, np.ndarray] = {}

    def expected(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name to report, array) of every tensor of the model."""
        layout, weights = self.export.layout, self.export.reference.weights
        tower = {x.hub for name, x in layout.vision.items() if name not in layout.shared}
        left = set(weights.names()) - layout.unused - tower
        for name, got in self.reader(self.export.text):
            if name in layout.text and layout.text[name].experts:
                yield from self._experts(layout.text[name], got)
                left.difference_update(layout.text[name].hubs)
                continue
            hubs = [layout.text[name].hub] if name in layout.text else []
            # A checkpoint may store a tied output matrix too. The file has one tensor for both.
            if name == "token_embd.weight" and "output.weight" not in layout.text:
                hubs.append(layout.head)
            for hub in left.intersection(hubs):
                want = weights.array(hub)
                own = name in layout.text and layout.text[name].hub == hub
                yield from self._pair(hub, got, layout.text[name].of_array(want) if own else want)
            left.difference_update(hubs)
        vision = dict(self.export.tower())
        for name, got in self.reader(self.export.mmproj):
            if name in vision:
                yield from self._pair(name, got, vision.pop(name))
        yield from vision.items()
        yield from ((hub, weights.array(hub)) for hub in sorted(left))

    def _experts(self, place: Place, got: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Each expert's matrix of a tensor that has them all."""
        for part, hub in zip(got, place.hubs):
            yield from self._pair(hub, part, self.export.reference.weights.array(hub))

    def _pair(
        self, name: str, got: np.ndarray, want: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray]]:
        self.found[name] = got
        yield name, want
        del self.found[name]
