"""What every phase of a run's time is planned from: shapes, samples, method and machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vlmq_export.quantizer.calibration.batches import BATCH_TOKENS
from vlmq_export.quantizer.methods import Method
from vlmq_export.quantizer.run.machine import Machine
from vlmq_export.quantizer.run.memory_plan import Shapes
from vlmq_export.quantizer.samples.sample import Lengths

_SCORE_PASSES = 4  # over the attention's scores: scale, largest, exponential, sum
_CHUNK = 64  # tokens that a linear attention takes at once
_CHUNK_PASSES = 12  # over its queries, keys, values and scores
_CHUNK_CALLS = 12  # small operations of one chunk

Seconds = defaultdict[str, float]  # by phase


@dataclass(frozen=True)
class Linears:
    """The linears of one decoder layer that share an input."""

    columns: int
    rows: tuple[int, ...]  # of each
    types: tuple[str, ...]  # block type of each; empty on an affine grid
    recurrent: bool = False  # whether they belong to a linear attention
    routed: bool = False  # whether they belong to an expert, which only some tokens come to


@dataclass(frozen=True)
class Work:
    """What every phase is planned from, for the largest layer unless `of_layer` says another."""

    shapes: Shapes
    method: Method
    tries: int  # ranges of a row on an affine grid
    lengths: Lengths
    machine: Machine
    most: int = BATCH_TOKENS  # tokens of a batch of several samples
    recurrent: bool = False  # whether the layer has a linear attention
    room: int = 0  # bytes of memory for what MLPs have made

    @cached_property
    def batches(self) -> list[tuple[int, int]]:
        """(samples, tokens of each)."""
        return self.lengths.batches(self.most)

    def through(self, rows: int, columns: int) -> float:
        """Seconds that all tokens take through a linear."""
        mean = self.lengths.tokens / max(1, len(self.batches))
        return len(self.batches) * self.machine.product(mean, columns, rows)

    def of_layer(self, groups: Sequence[Linears]) -> Work:
        """The same for a layer with these linears."""
        linears = tuple((rows, group.columns) for group in groups for rows in group.rows)
        sizes = tuple(len(group.rows) for group in groups)
        shapes = replace(self.shapes, linears=linears, groups=sizes)
        return replace(self, shapes=shapes, recurrent=groups[0].recurrent)

    def of_expert(self) -> Work:
        """The same for what comes to one of the experts, if all have as many tokens."""
        share = self.shapes.taken / self.shapes.experts
        each = (replace(x, tokens=max(1, round(share * x.tokens))) for x in self.lengths.each)
        lengths, most = Lengths((*each,), self.lengths.share), max(1, round(share * self.most))
        return replace(self, lengths=lengths, most=most)

    def attention(self) -> float:
        """Seconds of the scores and of the values of all tokens, in one layer."""
        if self.recurrent:
            return self._delta_rule()
        heads, m = self.shapes.heads, self.machine
        width = self.shapes.sharing[1][0][1]  # of all heads together
        total = 0.0
        for samples, each in self.batches:
            scores = samples * heads * each**2
            total += 2 * samples * heads * m.product(each, width // heads, each)
            total += m.elementwise(_SCORE_PASSES * scores, scores)
        return total

    def _delta_rule(self) -> float:
        """Seconds of a linear attention, which goes through a sample chunk by chunk.

        In a chunk of each head, five products have both sides as long as the chunk and three have
        both as wide as the head.
        """
        heads, width, m = self.shapes.recurrent_heads, self.shapes.recurrent_width, self.machine
        total = 0.0
        for samples, each in self.batches:
            chunks = -(-each // _CHUNK)
            one = 5 * m.product(_CHUNK, width, _CHUNK) + 3 * m.product(_CHUNK, width, width)
            values = samples * chunks * _CHUNK * heads
            total += samples * heads * chunks * one + chunks * _CHUNK_CALLS * m.call
            total += m.elementwise(_CHUNK_PASSES * values * (width + _CHUNK), values * width)
        return total

    def moved(self, passes: float, width: int) -> float:
        """Seconds of passes over all tokens' activations of a width."""
        tokens = self.lengths.tokens
        each = tokens * width / max(1, len(self.batches))
        return self.machine.elementwise(passes * tokens * width, each)


def summed(work: Work) -> Work:
    """What an expert's statistics are of: all tokens where few come (calibration/routed.py)."""
    some = work.of_expert()
    return work if some.lengths.tokens < work.shapes.hidden else some


def add(found: Seconds, more: Mapping[str, float]) -> None:
    """Add the seconds of each phase."""
    for phase, seconds in more.items():
        found[phase] += seconds
