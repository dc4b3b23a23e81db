"""How long a run takes, phase by phase.

The plan is a pure function of shapes, the lengths of the samples, the method, and what the machine
does in a second (`machine.py`):

    choose types   where block types or widths are chosen by cost: every matrix solved on each, and
                   the gradients of the answers through all layers
    tower          where the vision tower is quantized: both streams through it, segment by segment,
                   and the solve of its linears
    first pass     vision tower and embedding, once
    walk           both streams through every layer
    importance     where the method weighs tokens: one more pass through the attention of the
                   quantized stream, and back; or through all layers for the answers' loss
    statistics     A and D of every group of linears
    factorization  of A, in float64, and what is solved with it
    column loop    the loop and its products, under all candidate ranges
    ranges         the error that each candidate range leaves
    descent        sweeps over the integers afterwards
    block types    the search for the scales of GGUF's block types
    metrics        the losses that the manifest records
    weights        reading each layer, and writing its integers

Products are counted as floating-point operations. Everything else moves tensors: its passes over
them are counted, with the number of calls for small ones. The counts stand beside the constants, as
read from the code that they are of. docs/scale.md has the plan beside measured runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vlmq_export.quantizer.calibration.answer_loss import KEPT
from vlmq_export.quantizer.calibration.routed import portion
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.choice import vision_block
from vlmq_export.quantizer.job import method_of
from vlmq_export.quantizer.methods import Method
from vlmq_export.quantizer.run.machine import Machine
from vlmq_export.quantizer.run.memory_plan import Shapes, on_tower, tries_of
from vlmq_export.quantizer.run.solve_time import (
    smoothing_seconds,
    solve_seconds,
    solved_seconds,
    statistics_seconds,
)
from vlmq_export.quantizer.run.work import Linears, Seconds, Work, add, summed
from vlmq_export.quantizer.samples.sample import Length, Lengths
from vlmq_export.quantizer.vision.tower import tower_method

# Passes over the hidden state while a stream goes through a layer: norms, each at every step that
# needs it (20), rotary positions of queries and keys (6), the check for finite values (6), sums and
# copies (6).
_HIDDEN_PASSES = 38
_MLP_PASSES = 4  # over what is as wide as the MLP: activation, product, copies
_NORM_PASSES = 5  # over the hidden state while it passes a norm
_EXPERT_CALLS = 20  # small operations of one step of an expert on one batch
_LAYER_CALLS = 200  # small operations of one layer on one batch, with Python's own work
_PIXEL_PASSES = 12  # over pixels: gathered, moved to the layout of the convolution, multiplied
_WINDOW = 64  # patches that a layer of the tower attends over at once
_WINDOW_CALLS = 40  # small operations of one of these windows
# Times that the segments of a quantized tower are run by each stream, in all: to the inputs of each
# group of linears, and to their end.
_TOWER_PASSES = 3
_BACKWARD = 2.5  # products of the attention's backward pass, for one of the forward pass
_ON_DISK = 4  # passes over a layer's weights that reading them takes


@dataclass(frozen=True)
class TimePlan:
    """How long a run takes."""

    seconds: float
    phases: Mapping[str, float]  # seconds of each
    left_out: tuple[str, ...] = ()  # what a run does besides


def plan_seconds(
    shapes: Shapes,
    layers: Sequence[Sequence[Linears]],  # groups of each layer; an output matrix comes last
    outside: Mapping[str, int],  # block type → other weights that are fitted to it
    config: QuantConfig,
    lengths: Lengths,  # of the samples
    machine: Machine,
    room: int = 0,  # bytes of memory for what MLPs have made (`MemoryPlan.room`)
) -> dict[str, float]:
    """Seconds of quantizing a model, phase by phase."""
    method = method_of(config)
    work = Work(shapes, method, tries_of(config), lengths, machine, room=room)
    found = Seconds(float)
    if shapes.tower:
        found["tower"] = _tower(work, config)
    if method.calibrated:
        found["first pass"] = _first_pass(work)
    for index, groups in enumerate(layers):
        routed = [group for group in groups if group.routed]
        if method.calibrated and index < shapes.layers:
            own = work.of_layer([group for group in groups if not group.routed])
            found["walk"] += _walk(own) + _walk_experts(own, routed)
            if method.importance == "answers":
                found["importance"] += _answers(own) + _answers_of_experts(own, routed)
            elif method.importance != "none" and index:
                found["importance"] += _importance(own)
        for place, group in enumerate(groups):
            if group.routed:
                continue
            first = place == 0 and index < shapes.layers
            add(found, solved_seconds(work, group, first=first))
            if config.smooth and index < shapes.layers:
                found["smoothing"] += smoothing_seconds(work, group, first=first)
        for group, count in Counter(routed).items():
            solved = solved_seconds(summed(work), group)
            add(found, {phase: count * seconds for phase, seconds in solved.items()})
        found["weights"] += machine.elementwise(_ON_DISK * shapes.layer)
    for kind, weights in outside.items():
        found["embedding"] += machine.fits[kind] * weights
    return dict(found)


@dataclass(frozen=True)
class Tried:
    """Matrices of one shape, and the kinds that each is solved on to measure their costs."""

    rows: int
    columns: int
    kinds: tuple[str | int, ...]  # block types or widths
    count: int


def choosing_seconds(
    shapes: Shapes,
    tried: Sequence[Tried],
    config: QuantConfig,
    lengths: Lengths,  # of all samples
    most: int,  # of them, on which costs are measured
    plain: int,  # bits from which on a width has no ranges and no descent
    towers: Sequence[int],  # widths of the vision tower whose costs are measured
    pictures: int,  # samples that each of them is solved on
    machine: Machine,
) -> float:
    """Seconds in which the costs of all kinds are measured (type_budget/sensitivity.py).

    All samples that are taken go forward once. One half goes through each layer once more for the
    statistics, and the other forward and back with the gradients of the weights. A tower of each
    width is solved, and the other half goes through it.
    """
    few = Lengths(lengths.each, len(lengths.each) / max(1, min(lengths.samples, most)))
    own = method_of(config)
    method = Method(refine=own.refine, neighbours=own.neighbours)
    work = Work(shapes, method, tries_of(config), few, machine)
    half = replace(work, lengths=Lengths(lengths.each, 2 * few.share))
    hidden = work.moved(_HIDDEN_PASSES, shapes.hidden)
    hidden += work.moved(_MLP_PASSES, shapes.linears[-1][1])
    layer = (
        3 * sum(work.through(*each) for each in shapes.linears)
        + (2 + _BACKWARD / 2) * work.attention()
        + 2.5 * hidden
        + 2 * few.samples * _LAYER_CALLS * machine.call
        + 2 * machine.elementwise(_ON_DISK * shapes.layer)
    )
    total = _first_pass(work) + shapes.layers * layer
    whole = replace(work, method=own, lengths=lengths)
    for bits in towers:
        total += _tower(whole, config.with_vision(bits), pictures) + _first_pass(half)
    for each in tried:
        weights = each.rows * each.columns
        dots = half.lengths.samples * len(each.kinds) * machine.elementwise(3 * weights)
        solved = statistics_seconds(half, each.columns) + machine.factorization(each.columns)
        for kind in each.kinds:
            refined = isinstance(kind, int) and kind < plain
            own = method if refined else Method()
            parts = solve_seconds(work, own, each.rows, each.columns, kind if kind in GRIDS else "")
            solved += sum(parts.values()) - parts["factorization"]  # which all kinds share
        total += each.count * (dots + solved)
    return total


def _first_pass(work: Work) -> float:
    """The vision tower, on every patch, and the embedding rows."""
    s, m = work.shapes, work.machine
    patches = work.lengths.images * s.patches
    if not patches:
        return 0.0
    batches, each = len(work.batches), patches / len(work.batches)
    passes = (_HIDDEN_PASSES + 4 * _MLP_PASSES) * s.tower_layers
    windows = max(work.lengths.samples, patches / _WINDOW)
    return (
        batches * m.product(each, s.tower_width, s.prefix / max(1, s.tower_width))
        + m.elementwise(passes * patches * s.tower_width, each * s.tower_width)
        + m.elementwise(_PIXEL_PASSES * work.lengths.images * s.pixels)
        + (batches * _LAYER_CALLS + windows * _WINDOW_CALLS) * s.tower_layers * m.call
        + m.elementwise(_ON_DISK * s.prefix)
    )


def _tower(work: Work, config: QuantConfig, most: int = 0) -> float:
    """The vision tower, on patches in place of tokens, and on one sample at a time.

    Linears that share an input are planned with statistics of their own.

    most: samples that it is solved on; 0: as many as a run takes.
    """
    lengths, bits = work.lengths, config.vision_bits
    counted = lengths.pictured(most) if most else on_tower(work.shapes, lengths, bits)
    patches = tuple(Length(work.shapes.patches * one.images, one.images) for one in counted.each)
    own = replace(
        work,
        method=tower_method(work.method, bits),
        tries=tries_of(config.vision),
        lengths=Lengths(patches, work.lengths.share),
        most=1,
    )
    groups = (
        Linears(columns, (rows,), (vision_block(config, columns),))
        for rows, columns in work.shapes.tower
    )
    solved = sum(sum(solved_seconds(own, group).values()) for group in groups)
    streams = (1 + own.method.two_streams) * own.method.calibrated
    return solved + _TOWER_PASSES * streams * _first_pass(own)


def _walk(work: Work) -> float:
    """Both streams through a layer.

    The quantized one computes gate and up twice, as far as memory has no room for what they make.
    """
    streams = 2 if work.method.two_streams else 1
    linears, m = work.shapes.linears, work.machine
    inner = linears[-1][1]
    again = max(0.0, 1 - work.room / max(1, 4 * work.lengths.tokens * inner))
    again = 0 if work.shapes.experts else again  # what an attention has mixed is always kept
    products = sum(work.through(*each) for each in linears) * streams
    products += again * sum(work.through(*each) for each in work.shapes.sharing[-2])
    moved = work.moved(_HIDDEN_PASSES, work.shapes.hidden) * streams
    moved += work.moved(_MLP_PASSES, inner) * (streams + again)
    calls = len(work.batches) * _LAYER_CALLS * streams * m.call
    return products + moved + calls + streams * work.attention()


def _walk_experts(work: Work, groups: Sequence[Linears]) -> float:
    """Both streams through the experts, and once more to the inputs of their last linears.

    groups: of each expert its first linears, and its last one. Portions of the experts are given
    their tokens one after the other, and each time these pass the norm.
    """
    if not groups:
        return 0.0
    streams, m = 2 if work.method.two_streams else 1, work.machine
    some, own = work.of_expert(), summed(work)
    seconds = 0.0
    for group, count in Counter(groups).items():
        products = sum(some.through(rows, group.columns) for rows in group.rows)
        if len(group.rows) > 1:  # its first linears
            products += sum(own.through(rows, group.columns) for rows in group.rows)
            products += own.moved(_MLP_PASSES, group.rows[0]) + own.moved(2, group.columns)
        seconds += count * streams * (products + len(work.batches) * _EXPERT_CALLS * m.call)
    size = portion(work.shapes.experts, *work.shapes.sharing[-2][0], work.method)
    passes = 2 * -(-work.shapes.experts // size) * streams
    return seconds + passes * work.moved(_NORM_PASSES, work.shapes.hidden)


def _importance(work: Work) -> float:
    """The quantized stream's attention block forwards, and back to the outputs of q, k and v."""
    qkv, (out,), *_ = work.shapes.sharing
    products = sum(work.through(*each) for each in qkv) + 3 * work.through(*out)
    attention = (1 + _BACKWARD) * work.attention()
    moved = 2 * work.moved(_HIDDEN_PASSES, work.shapes.hidden)
    return products + attention + moved + 3 * len(work.batches) * _LAYER_CALLS * work.machine.call


def _answers(work: Work) -> float:
    """A layer forwards, forwards once more where its gradient is found, and back to its input.

    The second time its last linear is left out, unless it is of experts.
    """
    linears, m = work.shapes.linears, work.machine
    kept = work.lengths.tokens * work.shapes.hidden * work.shapes.layers * 4
    return (
        3 * sum(work.through(*each) for each in linears)
        - (0 if work.shapes.experts else work.through(*linears[-1]))
        + (2 + _BACKWARD) * work.attention()
        + 4 * work.moved(_HIDDEN_PASSES, work.shapes.hidden)
        + 4 * work.moved(_MLP_PASSES, linears[-1][1])
        + 5 * len(work.batches) * _LAYER_CALLS * m.call
        + 2 * max(1, kept / KEPT) * m.elementwise(_ON_DISK * work.shapes.layer)
    )


def _answers_of_experts(work: Work, groups: Sequence[Linears]) -> float:
    """The same of a layer's experts."""
    if not groups:
        return 0.0
    seconds, weights, some = 0.0, 0, work.of_expert()
    for group, count in Counter(groups).items():
        products = sum(some.through(rows, group.columns) for rows in group.rows)
        moved = some.moved(_MLP_PASSES, group.rows[0])
        calls = len(work.batches) * _EXPERT_CALLS * work.machine.call
        seconds += count * (3 * products + 2 * moved + 3 * calls)
        weights += count * sum(group.rows) * group.columns
    return seconds + 2 * work.machine.elementwise(_ON_DISK * weights)
