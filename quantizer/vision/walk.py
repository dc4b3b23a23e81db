"""Both streams through the vision tower and the projector, and what enters their linears.

transformers' own modules run here, and nothing of a family's tower is written down. One image pass
shows in which order linears and blocks are called, and which linears are given one tensor. The pass
falls into segments, each from the input of one block to that of the next; the first begins at the
pixels, and the last ends with the projector. Between two segments each sample keeps the input of
the next block, once for each stream. A segment is run again for every group of its linears, and
the blocks before it hand the kept input on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.hooks import before, input_of
from vlmq_export.quantizer.calibration.layer_walk import Inputs, put, source_weights
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.grids.linears import Linear


@dataclass
class Picture:
    """The images of one sample on their way through the tower."""

    inputs: dict[str, torch.Tensor]  # of get_image_features
    held: bool = False  # whether it is kept out of the statistics
    valid: bool = True  # whether all activations were finite so far
    # The input of the next segment's block in either stream; None before the first segment.
    quantized: Callable[[], torch.Tensor] | None = None
    full: Callable[[], torch.Tensor] | None = None


@dataclass
class Segment:
    """The linears that run between the inputs of two blocks."""

    groups: list[list[str]] = field(default_factory=list)  # those of one input together


class TowerWalk:
    """A model whose tower has its source weights, and the images of the calibration samples.

    Linears and blocks are called by their names in the module tree.
    """

    def __init__(
        self,
        model: Any,  # transformers' own
        linears: Collection[str],  # those that are to be quantized
        pictures: Sequence[Picture],
        shelf: Shelf,
        *,
        two_streams: bool,
    ):
        self.model, self.pictures = model, pictures
        self.two_streams = two_streams
        self._shelf = shelf
        self._source: list[tuple[nn.Parameter, torch.Tensor]] = []  # of this segment's linears
        self._here = 0  # the segment that the pictures stand before
        self.rows: dict[str, int] = {}  # linear → rows of the first picture that enter it
        self._blocks = _blocks(model, linears)
        self.segments = self._traced(linears)

    @torch.no_grad()
    def inputs(self, name: str) -> Iterator[tuple[Picture, Inputs]]:
        """What enters a linear of this segment, picture after picture."""
        for picture in self.pictures:
            if picture.valid:
                full = None
                if self.two_streams:
                    with source_weights(self._source):
                        full = self._reach(name, picture, picture.full)
                yield picture, Inputs(self._reach(name, picture, picture.quantized), full)

    def put(self, name: str, linear: Linear) -> None:
        """Give a linear of this segment the weights and the bias that will be on disk."""
        parameters = self.model.get_submodule(name).parameters()
        self._source += [(p, p.detach().clone()) for p in parameters]
        put(self.model, name, linear)

    @torch.no_grad()
    def advance(self) -> None:
        """Take both streams past this segment, whose linears have their decoded weights by now.

        A picture whose activations are not finite is left out from here on.
        """
        after = self._here + 1
        if after < len(self.segments):
            for picture in self.pictures:
                if not picture.valid:
                    continue
                quantized = self._reach(self._blocks[after], picture, picture.quantized, flat=False)
                streams = [quantized]
                if self.two_streams:
                    with source_weights(self._source):
                        full = self._reach(self._blocks[after], picture, picture.full, flat=False)
                    streams.append(full)
                    picture.full = self._shelf.put(full).get
                picture.quantized = self._shelf.put(quantized).get
                picture.valid = all(bool(torch.isfinite(s).all()) for s in streams)
        self._source.clear()
        self._here = after

    def _traced(self, linears: Collection[str]) -> list[Segment]:
        """The segments with their linears in the order of the calls. What is not called is left."""
        found, last = [Segment()], None

        def enter_block(_args: tuple, _kwargs: dict) -> None:
            found.append(Segment())

        def enter(name: str) -> Callable[[tuple, dict], None]:
            def action(args: tuple, _kwargs: dict) -> None:
                nonlocal last
                if name in self.rows:
                    return
                self.rows[name] = args[0].flatten(0, -2).shape[0]
                if last is args[0] and found[-1].groups:
                    found[-1].groups[-1].append(name)
                else:
                    found[-1].groups.append([name])
                last = args[0]

            return action

        with ExitStack() as hooks, torch.no_grad():
            for name in self._blocks[1:]:
                hooks.enter_context(before(self.model.get_submodule(name), enter_block))
            for name in linears:
                hooks.enter_context(before(self.model.get_submodule(name), enter(name)))
            self._run(self.pictures[0])
        return found

    @tensor_cores()
    def _reach(
        self,
        name: str,
        picture: Picture,
        state: Callable[[], torch.Tensor] | None,
        *,
        flat: bool = True,
    ) -> torch.Tensor:
        """What enters a module of this segment for one picture: [rows, in] if `flat`."""
        module = self.model.get_submodule(name)
        with self._handing_on(state):
            entering = input_of(module, lambda: self._run(picture))
        return entering.flatten(0, -2) if flat else entering

    def _run(self, picture: Picture) -> None:
        device = self._shelf.device
        self.model.model.get_image_features(**{k: v.to(device) for k, v in picture.inputs.items()})

    @contextmanager
    def _handing_on(self, state: Callable[[], torch.Tensor] | None) -> Iterator[None]:
        """The blocks before this segment give what is kept, instead of computing anything."""
        past = [self.model.get_submodule(name) for name in self._blocks[: self._here]]
        hidden = None if state is None else state()
        try:
            for block in past:
                block.forward = lambda *_args, **_kwargs: hidden
            yield
        finally:
            for block in past:
                del block.forward


def _blocks(model: nn.Module, linears: Collection[str]) -> list[str]:
    """The names of the tower's blocks: the elements of the list with most of its linears."""
    lists = {n: module for n, module in model.named_modules() if isinstance(module, nn.ModuleList)}

    def held(name: str) -> int:
        return sum(linear.startswith(f"{name}.") for linear in linears)

    name = max(lists, key=held)
    return [f"{name}.{i}" for i in range(len(lists[name]))] if held(name) else []
