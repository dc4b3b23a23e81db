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

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vlmq_export.quantizer.calibration.answer_loss import KEPT
from vlmq_export.quantizer.calibration.batches import BATCH_TOKENS
from vlmq_export.quantizer.calibration.routed import portion
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.choice import vision_block
from vlmq_export.quantizer.job import method_of
from vlmq_export.quantizer.layers.damping import ROWS, trial
from vlmq_export.quantizer.layers.vlm_ptq import MIXES
from vlmq_export.quantizer.methods import METHODS, Method
from vlmq_export.quantizer.run.machine import COLUMNS, LEAF, Machine
from vlmq_export.quantizer.run.memory_plan import Shapes, on_tower, tries_of
from vlmq_export.quantizer.samples.sample import Length, Lengths
from vlmq_export.quantizer.solver.ranges import AT_ONCE, SHRINK

# Passes over the hidden state while a stream goes through a layer: norms, each at every step that
# needs it (20), rotary positions of queries and keys (6), the check for finite values (6), sums and
# copies (6).
_HIDDEN_PASSES = 38
_MLP_PASSES = 4  # over what is as wide as the MLP: activation, product, copies
_SCORE_PASSES = 4  # over the attention's scores: scale, largest, exponential, sum
_CHUNK = 64  # tokens that a linear attention takes at once
_CHUNK_PASSES = 12  # over its queries, keys, values and scores
_CHUNK_CALLS = 12  # small operations of one chunk
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
_INPUT_PASSES = 6  # over the inputs of a linear in its sums: weighted, squared, drift
_SUM_PASSES = 4  # over a sum for each batch: it is float64, and the product float32
_SQUARE_PASSES = 16  # over a Hessian: made, mirrored, to float32, ordered in float64, factor
_WEIGHT_PASSES = 40  # over the weights of a linear: target, order, decoded, metrics, packed
_JUDGE_PASSES = 6  # over the rows under all ranges: made, masked, ordered, decoded, error
_DAMPINGS = 10 / 3  # that a stack tries: three if the recipe's is the best, four beside it
_SEARCH_PASSES = 8  # over weights for one range that is judged before the loop: codes, error, sum
_ON_DISK = 4  # passes over a layer's weights that reading them takes


@dataclass(frozen=True)
class Linears:
    """The linears of one decoder layer that share an input."""

    columns: int
    rows: tuple[int, ...]  # of each
    types: tuple[str, ...]  # block type of each; empty on an affine grid
    recurrent: bool = False  # whether they belong to a linear attention
    routed: bool = False  # whether they belong to an expert, which only some tokens come to


@dataclass(frozen=True)
class TimePlan:
    """How long a run takes."""

    seconds: float
    phases: Mapping[str, float]  # seconds of each
    left_out: tuple[str, ...] = ()  # what a run does besides


_Seconds = defaultdict[str, float]  # by phase


@dataclass(frozen=True)
class _Job:
    """What every phase is planned from."""

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

    def of_layer(self, groups: Sequence[Linears]) -> _Job:
        """The same for a layer with these linears."""
        linears = tuple((rows, group.columns) for group in groups for rows in group.rows)
        sizes = tuple(len(group.rows) for group in groups)
        shapes = replace(self.shapes, linears=linears, groups=sizes)
        return replace(self, shapes=shapes, recurrent=groups[0].recurrent)

    def of_expert(self) -> _Job:
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
    job = _Job(shapes, method, tries_of(config), lengths, machine, room=room)
    found = _Seconds(float)
    if shapes.tower:
        found["tower"] = _tower(job, config)
    if method.calibrated:
        found["first pass"] = _first_pass(job)
    for index, groups in enumerate(layers):
        routed = [group for group in groups if group.routed]
        if method.calibrated and index < shapes.layers:
            own = job.of_layer([group for group in groups if not group.routed])
            found["walk"] += _walk(own) + _walk_experts(own, routed)
            if method.importance == "answers":
                found["importance"] += _answers(own) + _answers_of_experts(own, routed)
            elif method.importance != "none" and index:
                found["importance"] += _importance(own)
        for place, group in enumerate(groups):
            if not group.routed:
                _add(found, _solved(job, group, first=place == 0 and index < shapes.layers))
        for group, count in Counter(routed).items():
            solved = _solved(_summed(job), group)
            _add(found, {phase: count * seconds for phase, seconds in solved.items()})
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
    job = _Job(shapes, method, tries_of(config), few, machine)
    half = replace(job, lengths=Lengths(lengths.each, 2 * few.share))
    hidden = job.moved(_HIDDEN_PASSES, shapes.hidden)
    hidden += job.moved(_MLP_PASSES, shapes.linears[-1][1])
    layer = (
        3 * sum(job.through(*each) for each in shapes.linears)
        + (2 + _BACKWARD / 2) * job.attention()
        + 2.5 * hidden
        + 2 * few.samples * _LAYER_CALLS * machine.call
        + 2 * machine.elementwise(_ON_DISK * shapes.layer)
    )
    total = _first_pass(job) + shapes.layers * layer
    whole = replace(job, method=own, lengths=lengths)
    for bits in towers:
        total += _tower(whole, config.with_vision(bits), pictures) + _first_pass(half)
    for each in tried:
        weights = each.rows * each.columns
        dots = half.lengths.samples * len(each.kinds) * machine.elementwise(3 * weights)
        solved = _statistics(half, each.columns) + machine.factorization(each.columns)
        for kind in each.kinds:
            refined = isinstance(kind, int) and kind < plain
            own = method if refined else Method()
            parts = _solve(job, own, each.rows, each.columns, kind if kind in GRIDS else "")
            solved += sum(parts.values()) - parts["factorization"]  # which all kinds share
        total += each.count * (dots + solved)
    return total


def _add(found: _Seconds, more: Mapping[str, float]) -> None:
    for phase, seconds in more.items():
        found[phase] += seconds


def _first_pass(job: _Job) -> float:
    """The vision tower, on every patch, and the embedding rows."""
    s, m = job.shapes, job.machine
    patches = job.lengths.images * s.patches
    if not patches:
        return 0.0
    batches, each = len(job.batches), patches / len(job.batches)
    passes = (_HIDDEN_PASSES + 4 * _MLP_PASSES) * s.tower_layers
    windows = max(job.lengths.samples, patches / _WINDOW)
    return (
        batches * m.product(each, s.tower_width, s.prefix / max(1, s.tower_width))
        + m.elementwise(passes * patches * s.tower_width, each * s.tower_width)
        + m.elementwise(_PIXEL_PASSES * job.lengths.images * s.pixels)
        + (batches * _LAYER_CALLS + windows * _WINDOW_CALLS) * s.tower_layers * m.call
        + m.elementwise(_ON_DISK * s.prefix)
    )


def _tower(job: _Job, config: QuantConfig, most: int = 0) -> float:
    """The vision tower, on patches in place of tokens, and on one sample at a time.

    Linears that share an input are planned with statistics of their own.

    most: samples that it is solved on; 0: as many as a run takes.
    """
    counted = job.lengths.pictured(most) if most else on_tower(job.shapes, job.lengths)
    patches = tuple(Length(job.shapes.patches * one.images, one.images) for one in counted.each)
    own = replace(
        job,
        method=replace(job.method, importance="none"),
        tries=tries_of(config.vision),
        lengths=Lengths(patches, job.lengths.share),
        most=1,
    )
    groups = (
        Linears(columns, (rows,), (vision_block(config, columns),))
        for rows, columns in job.shapes.tower
    )
    solved = sum(sum(_solved(own, group).values()) for group in groups)
    streams = (1 + job.method.two_streams) * job.method.calibrated
    return solved + _TOWER_PASSES * streams * _first_pass(own)


def _walk(job: _Job) -> float:
    """Both streams through a layer.

    The quantized one computes gate and up twice, as far as memory has no room for what they make.
    """
    streams = 2 if job.method.two_streams else 1
    linears, m = job.shapes.linears, job.machine
    inner = linears[-1][1]
    again = max(0.0, 1 - job.room / max(1, 4 * job.lengths.tokens * inner))
    again = 0 if job.shapes.experts else again  # what an attention has mixed is always kept
    products = sum(job.through(*each) for each in linears) * streams
    products += again * sum(job.through(*each) for each in job.shapes.sharing[-2])
    moved = job.moved(_HIDDEN_PASSES, job.shapes.hidden) * streams
    moved += job.moved(_MLP_PASSES, inner) * (streams + again)
    calls = len(job.batches) * _LAYER_CALLS * streams * m.call
    return products + moved + calls + streams * job.attention()


def _walk_experts(job: _Job, groups: Sequence[Linears]) -> float:
    """Both streams through the experts, and once more to the inputs of their last linears.

    groups: of each expert its first linears, and its last one. Portions of the experts are given
    their tokens one after the other, and each time these pass the norm.
    """
    if not groups:
        return 0.0
    streams, m = 2 if job.method.two_streams else 1, job.machine
    some, own = job.of_expert(), _summed(job)
    seconds = 0.0
    for group, count in Counter(groups).items():
        products = sum(some.through(rows, group.columns) for rows in group.rows)
        if len(group.rows) > 1:  # its first linears
            products += sum(own.through(rows, group.columns) for rows in group.rows)
            products += own.moved(_MLP_PASSES, group.rows[0]) + own.moved(2, group.columns)
        seconds += count * streams * (products + len(job.batches) * _EXPERT_CALLS * m.call)
    size = portion(job.shapes.experts, job.shapes.hidden, job.method)
    passes = 2 * -(-job.shapes.experts // size) * streams
    return seconds + passes * job.moved(_NORM_PASSES, job.shapes.hidden)


def _summed(job: _Job) -> _Job:
    """What an expert's statistics are of: all tokens where few come (calibration/routed.py)."""
    some = job.of_expert()
    return job if some.lengths.tokens < job.shapes.hidden else some


def _importance(job: _Job) -> float:
    """The quantized stream's attention block forwards, and back to the outputs of q, k and v."""
    qkv, (out,), *_ = job.shapes.sharing
    products = sum(job.through(*each) for each in qkv) + 3 * job.through(*out)
    attention = (1 + _BACKWARD) * job.attention()
    moved = 2 * job.moved(_HIDDEN_PASSES, job.shapes.hidden)
    return products + attention + moved + 3 * len(job.batches) * _LAYER_CALLS * job.machine.call


def _answers(job: _Job) -> float:
    """A layer forwards, forwards once more where its gradient is found, and back to its input.

    The second time its last linear is left out, unless it is of experts.
    """
    linears, m = job.shapes.linears, job.machine
    kept = job.lengths.tokens * job.shapes.hidden * job.shapes.layers * 4
    return (
        3 * sum(job.through(*each) for each in linears)
        - (0 if job.shapes.experts else job.through(*linears[-1]))
        + (2 + _BACKWARD) * job.attention()
        + 4 * job.moved(_HIDDEN_PASSES, job.shapes.hidden)
        + 4 * job.moved(_MLP_PASSES, linears[-1][1])
        + 5 * len(job.batches) * _LAYER_CALLS * m.call
        + 2 * max(1, kept / KEPT) * m.elementwise(_ON_DISK * job.shapes.layer)
    )


def _answers_of_experts(job: _Job, groups: Sequence[Linears]) -> float:
    """The same of a layer's experts."""
    if not groups:
        return 0.0
    seconds, weights, some = 0.0, 0, job.of_expert()
    for group, count in Counter(groups).items():
        products = sum(some.through(rows, group.columns) for rows in group.rows)
        moved = some.moved(_MLP_PASSES, group.rows[0])
        calls = len(job.batches) * _EXPERT_CALLS * job.machine.call
        seconds += count * (3 * products + 2 * moved + 3 * calls)
        weights += count * sum(group.rows) * group.columns
    return seconds + 2 * job.machine.elementwise(_ON_DISK * weights)


def _solved(job: _Job, group: Linears, *, first: bool = False) -> dict[str, float]:
    """The linears of a group, the first of its layer or another, from their inputs to integers."""
    found = _Seconds(float)
    for names in _units(job, group, first=first):
        if job.method.calibrated:
            alone = group.rows[names[0]] if len(names) == 1 else 0
            found["statistics"] += _statistics(job, group.columns, alone)
        # Linears of one type are solved as one matrix.
        stacks: Counter[str] = Counter()
        for i in names:
            stacks[group.types[i]] += group.rows[i]
        for kind, rows in stacks.items():
            for method in _attempts(job.method):
                _add(found, _stack(job, method, rows, group.columns, kind))
    return found


def _attempts(method: Method) -> list[Method]:
    """The methods that a stack is solved by: candidates, and the last of them once more."""
    tried = [METHODS[name] for name in method.candidates]
    return [*tried, *tried[-1:]] or [method]


def _units(job: _Job, group: Linears, *, first: bool) -> list[list[int]]:
    """Linears that share their statistics. Those whose tokens are weighed have their own."""
    every = list(range(len(group.rows)))
    weighs = job.method.importance != "none" and (first or job.method.weighs == "all")
    return [[i] for i in every] if weighs else [every]


def _statistics(job: _Job, columns: int, alone: int = 0) -> float:
    """A, of which little more than half is computed, and D, or what an output should make up for.

    alone: outputs of a linear that shares these with no other.
    """
    m, batches = job.machine, len(job.batches)
    few = bool(alone) and job.method.sums_outputs(alone, columns)
    beside = 0 if job.method.drift == "plain" else alone if few else columns
    sums = min(1.0, 0.5 + 512 / columns) + beside / columns
    mean = job.lengths.tokens / max(1, batches)
    return (
        (job.through(alone, columns) if few else 0)
        + batches * m.product(columns, mean, columns * sums)
        + job.moved(_INPUT_PASSES, columns)
        + batches * m.elementwise(_SUM_PASSES * sums * columns**2, columns**2)
    )


def _stack(job: _Job, method: Method, rows: int, columns: int, kind: str) -> dict[str, float]:
    """Linears that are solved as one matrix [rows, columns]."""
    m, found = job.machine, _Seconds(float)
    found["metrics"] += m.elementwise(_WEIGHT_PASSES * rows * columns)
    if kind:  # what rounding to nearest would have left
        found["block types"] += m.fits[kind] * rows * columns
    if not method.calibrated or method.scaling:
        return found
    found["metrics"] += 3 * m.product(rows, columns, columns)
    _add(found, _solve(job, method, rows, columns, kind))
    if method.damping == "held-out":
        quick = trial(method, GRIDS.get(kind))
        few = replace(job, tries=len(quick.refine.shrink))
        some = _solve(few, quick, min(rows, ROWS), columns, kind)
        _add(found, {phase: _DAMPINGS * seconds for phase, seconds in some.items()})
    return found


def _solve(job: _Job, method: Method, rows: int, columns: int, kind: str) -> dict[str, float]:
    """One solve of a matrix [rows, columns], from the sums to its codes."""
    m, found = job.machine, _Seconds(float)
    square = m.product(rows, columns, columns)  # W·A
    if kind:
        found["block types"] += m.fits[kind] * rows * columns
    found["factorization"] += m.factorization(columns)
    found["factorization"] += m.elementwise(_SQUARE_PASSES * columns**2)
    if method.drift != "plain":
        # Two triangular solves of half as much as W·D, which is not formed where outputs are summed
        found["factorization"] += (2 - method.sums_outputs(rows, columns)) * square
    if method.drift == "columns":  # two triangular solves for each row, from the row's place on
        found["factorization"] += m.product(columns, columns, columns) / 3
    if method.ranges == "modality":
        searched = len(SHRINK) * (1 + len(MIXES)) * _SEARCH_PASSES
        found["ranges"] += m.elementwise(searched * rows * columns, COLUMNS * rows)
    many = max(1, job.tries) if method.refine.shrink and not kind else 1
    found["column loop"] += _loop(job, method, rows * many, columns, kind)
    if many > 1:
        found["ranges"] += many * square
        found["ranges"] += m.elementwise(_JUDGE_PASSES * many * rows * columns, AT_ONCE["cpu"])
    if method.refine.sweeps:
        found["descent"] += _descent(job, method, rows, columns, kind)
    return found


def _loop(job: _Job, method: Method, rows: int, columns: int, kind: str) -> float:
    """The column loop on [rows, columns], as many rows at once as the search of ranges takes.

    On a lattice a point is searched as in a sweep.
    """
    m = job.machine
    at_once = min(rows, max(1, AT_ONCE["cpu"] // columns))
    each = m.sweep(at_once, on_lattice=True) if _on_lattice(kind) else m.column(at_once)
    own = columns * each * rows / at_once
    products, half = 0.0, columns / 2
    while half >= COLUMNS:
        products += columns / half / 2 * m.product(rows, half, half)
        half /= 2
    return own + products * (2 if method.drift == "columns" else 1)


def _on_lattice(kind: str) -> bool:
    return bool(kind) and GRIDS[kind].lattice is not None


def _descent(job: _Job, method: Method, rows: int, columns: int, kind: str) -> float:
    """Sweeps over [rows, columns], each of which moves the gradient of every column along."""
    m, sweeps = job.machine, method.refine.sweeps
    each = columns * m.sweep(rows, on_lattice=_on_lattice(kind))
    moved = columns / LEAF * m.product(rows, LEAF, columns)
    return sweeps * (each + moved) + m.product(rows, columns, columns)
