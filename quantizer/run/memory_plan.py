"""How much memory a run takes, and where its activations rest.

The plan is a pure function of shapes, tokens and what is free. Peak memory follows one decoder
layer and the calibration set, and never the number of layers:

    fixed        Python, PyTorch, transformers
    images       the pixels of all samples' images, dropped after the first pass
    first pass   vision tower and projector in float32, dropped before the first layer
    tower        its integers, and what the solve of its widest linear takes, where it is quantized
    layer        a layer's weights in float32, and the group of linears that is being solved
    solver       statistics and factorization of the linear with the most inputs
    ranges       rows that are solved under all candidate ranges at once, and the matrices that
                 this needs, where the method chooses ranges by the outcome
    tuning       codes and scales as real numbers, with what the optimizer and the backward pass
                 keep of each, where the recipe asks for it
    batch        what a layer makes of BATCH_TOKENS tokens, with the attention scores of the
                 backward pass where there is one
    gradients    the output matrix and the logits of some positions, where a method starts from the
                 answers' loss. This is before the first layer is solved
    weights      of the tokens in every layer, where a method takes them from that loss
    activations  both streams, and within a layer what attention made of them; before the first
                 layer, what enters every layer, where a method starts from the answers' loss. On a
                 CPU also what the MLP has made, as far as memory has room

Of solver, ranges and batch one is there at a time; beside a batch stand the sums that it is added
to: those of a group of linears, or of as many experts as calibration/routed.py allows. Only
the activations can rest in host memory or on disk. The constants are measured (docs/scale.md), and
a test holds the plan against the peak of a real run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmq_export.quantizer.calibration.answer_loss import AT_ONCE as AT_ONCE_LOGITS
from vlmq_export.quantizer.calibration.answer_loss import KEPT
from vlmq_export.quantizer.calibration.batches import BATCH_TOKENS
from vlmq_export.quantizer.calibration.offload import Place
from vlmq_export.quantizer.calibration.routed import expert_bytes, portion
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.job import method_of
from vlmq_export.quantizer.layers.attempt import moves_of
from vlmq_export.quantizer.methods import METHODS, Method
from vlmq_export.quantizer.samples.sample import Lengths
from vlmq_export.quantizer.solver.ranges import AT_ONCE
from vlmq_export.quantizer.vision.stage import enough
from vlmq_export.quantizer.vision.tower import tower_method

FIXED = 600 * 10**6
_FLOAT = 4  # bytes of a float32
_DOUBLE = 8
_SHARE = 0.9  # of what is free that a plan may count on
# Copies of the weights being solved: target, loop order, decoded, codes and scales.
_GROUP_COPIES = 4
# Copies of the rows under all ranges: target, errors, codes, and a product where the loop itself
# does not judge them (on CUDA).
_RANGE_COPIES = 4
# Tensors that are alive at once in a layer, by their width: hidden, MLP, attention scores.
_BATCH_HIDDEN = 10
_BATCH_MLP = 4
_BATCH_SCORES = 5
# The same of what is as wide as the values of a linear attention, measured without a backward pass
# and with one, on layers of Qwen3.5 0.8B and 4B: 13 to 16, and 37 to 45.
_BATCH_VALUES, _BATCH_VALUES_BACK = 16, 45
# Copies of a layer's weights while it is tuned: source, latents, two moments, gradient, steps,
# decoded weights, their gradient, and two temporaries of the optimizer.
_TUNED_COPIES = 10
_EXPERT_WEIGHTS = 5  # of a token at an expert, in float32: three factors, and its place in int64
_LOGITS = 3  # copies of these logits in the backward pass of the loss, measured


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that memory depends on, from headers alone."""

    layers: int
    hidden: int
    heads: int
    linears: tuple[tuple[int, int], ...]  # (out, in) of each linear of the largest decoder layer
    groups: tuple[int, ...]  # how many of them share an input, in the same order
    prefix: int  # weights that run before the first decoder layer, embedding rows not counted
    pixels: int  # numbers of a preprocessed image for each of its tokens
    patches: int  # patches of an image for each of its tokens
    tower_layers: int  # of the vision tower
    tower_width: int
    weights: int  # of the whole model
    vocabulary: int  # rows of the output matrix
    tower: tuple[tuple[int, int], ...] = ()  # (out, in) of the tower's linears that are quantized
    experts: int = 0  # of a layer; 0: each token takes all of it
    taken: int = 0  # experts that a token takes
    recurrent_heads: int = 0  # of the linear attention, where some layers have one
    recurrent_width: int = 0  # of each of these heads

    @property
    def widest(self) -> int:
        """The most inputs of a linear."""
        return max(columns for _, columns in self.linears)

    @property
    def layer(self) -> int:
        """The weights of a layer's linears."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def dense(self) -> int:
        """How many linears of a layer all tokens come to."""
        return len(self.linears) - 3 * self.experts

    @property
    def sharing(self) -> list[tuple[tuple[int, int], ...]]:
        """The linears of a layer in groups that share an input, and so are solved together."""
        starts = [sum(self.groups[:i]) for i in range(len(self.groups))]
        return [self.linears[start : start + size] for start, size in zip(starts, self.groups)]

    @property
    def largest_group(self) -> int:
        """The most weights of linears that are solved together."""
        return max(sum(rows * columns for rows, columns in group) for group in self.sharing)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak, part by part."""

    place: Place  # where the activations rest
    parts: dict[str, int]  # all but the activations
    activations: int
    host: int  # needed at the peak
    device: int  # what CUDA needs at the peak; 0 on the CPU
    disk: int  # for activations
    room: int  # of the activations, what enters the MLPs' `out`: made again where there is none
    host_free: int
    device_free: int  # 0: there is no CUDA device

    @property
    def fits(self) -> bool:
        """Whether no more is needed than is free."""
        return self.host <= self.host_free and self.device <= self.device_free


def memory_plan(
    shapes: Shapes,
    config: QuantConfig,
    lengths: Lengths,  # of the samples
    *,
    host_free: int,
    device_free: int = 0,  # 0: everything runs on the host
) -> MemoryPlan:
    """What is held at the peak of a run.

    Activations rest on the device if everything fits there, else in host memory, else on disk.
    Where everything runs on the host, the host is the device.
    """
    method = method_of(config)
    on_cuda = device_free > 0
    parts = _parts(shapes, config, lengths, AT_ONCE["cuda" if on_cuda else "cpu"])
    activations = _activations(shapes, method, lengths, config.vision_bits)
    images, first = parts["images"], parts["first pass"] + parts["tower"]
    solving = parts["layer"] + max(
        parts["solver"],
        parts["ranges"],
        _summing(shapes, method) + parts["batch"],
        parts["tuning"] + parts["batch"],
    )
    backward = shapes.layer * _FLOAT + parts["batch"] + parts["gradients"]
    work = max(solving, backward) if parts["gradients"] else solving
    if on_cuda:
        host, device = FIXED + images + parts["weights"], max(first, work)
    else:
        host, device = FIXED + max(images + first, parts["weights"] + work), 0
    room = 0
    fits_host = host + activations <= int(_SHARE * host_free)
    fits_device = device + activations <= int(_SHARE * device_free) if on_cuda else fits_host
    place: Place = "device" if fits_device else "host" if fits_host else "disk"
    if place == "device" and on_cuda:
        device += activations
    elif place != "disk":
        host += activations
        if not on_cuda:
            room = max(0, min(_inner(shapes, config, lengths), int(_SHARE * host_free) - host))
            host, activations = host + room, activations + room
    return MemoryPlan(
        place,
        {"fixed": FIXED} | parts,
        activations,
        host,
        device,
        disk=activations if place == "disk" else 0,
        room=room,
        host_free=host_free,
        device_free=device_free,
    )


def _parts(shapes: Shapes, config: QuantConfig, lengths: Lengths, at_once: int) -> dict[str, int]:
    """Bytes of everything that a run adds to the fixed part, but for the activations.

    `at_once` is the number of weights that are solved under all ranges at once.
    """
    method = method_of(config)
    calibrated = method.calibrated
    solved = shapes.layer + _GROUP_COPIES * shapes.largest_group
    tries = 0 if config.types else tries_of(config)  # block types have ranges of their own
    return {
        "images": lengths.images * shapes.pixels * _FLOAT if calibrated else 0,
        "first pass": shapes.prefix * _FLOAT if calibrated else 0,
        "tower": _tower(shapes, method),
        "layer": solved * _FLOAT,
        "solver": _solver(shapes.linears, method) if calibrated else 0,
        "ranges": _ranges(shapes, method, tries, at_once) if tries else 0,
        "tuning": _TUNED_COPIES * shapes.layer * _FLOAT if method.tuned else 0,
        "batch": _batch(shapes, method, lengths) if calibrated else 0,
        "gradients": _gradients(shapes, method),
        "weights": _weights(shapes, method, lengths),
    }


def _tower(shapes: Shapes, method: Method) -> int:
    """Bytes of the tower's integers, and of the solve of its widest linear."""
    if not shapes.tower:
        return 0
    rows, columns = max(shapes.tower, key=lambda shape: (shape[1], shape[0]))
    solver = _solver(shapes.tower, method) if method.solves else 0
    own = _GROUP_COPIES * _FLOAT * rows * columns * (len(method.refine.shrink) or 1)
    return sum(r * c for r, c in shapes.tower) + solver + own


def on_tower(shapes: Shapes, lengths: Lengths, bits: int) -> Lengths:
    """Those of the samples that a tower of so many bits is calibrated on.

    Its widest linear is taken to be the projector's, which sees a row for each token of an image.
    """
    some = [length.images for length in lengths.each if length.images]
    rows = sum(some) / max(1, len(some))
    return lengths.pictured(enough(max(columns for _, columns in shapes.tower), rows, bits))


def _solver(linears: Sequence[tuple[int, int]], method: Method) -> int:
    """Bytes of the sums of the linear that takes most, and of what is made of them."""
    damped = bool(method.refine.sweeps or method.candidates)  # for what follows the loop
    factor = 1

    def each(rows: int, columns: int) -> int:
        sums = columns**2 + 2 * _beside(method, rows, columns)  # A, and D with GPTAQ's P
        sums *= 1 + method.holds_out  # those of the samples that were put aside
        # The factorization itself holds two matrices in float64.
        return _FLOAT * sums + ((damped + factor) * _FLOAT + 2 * _DOUBLE) * columns**2

    return max(each(*shape) for shape in linears)


def _beside(method: Method, rows: int, columns: int) -> int:
    """How many numbers of the drift stand beside A: D, or as many as a linear has weights."""
    if method.drift == "plain":
        return 0
    return columns * (rows if method.sums_outputs(rows, columns) else columns)


def _summing(shapes: Shapes, method: Method) -> int:
    """Bytes of the sums of the widest linear's inputs, while batches are added to them."""
    if not method.solves:
        return 0
    sums = max(c**2 + _beside(method, rows, c) for rows, c in shapes.linears)
    dense = _DOUBLE * sums * (1 + method.holds_out)
    if not shapes.experts:
        return dense
    gate = shapes.sharing[-2][0]
    together = portion(shapes.experts, *gate, method)
    return max(dense, together * expert_bytes(*gate, method))


def _ranges(shapes: Shapes, method: Method, tries: int, at_once: int) -> int:
    """Bytes of rows under all their ranges, and of the square matrices beside them."""

    def each(group: tuple[tuple[int, int], ...]) -> int:
        rows, columns = sum(rows for rows, _ in group), group[0][1]
        # A, its factor, and A damped for the descent
        matrices = 3 * columns**2 + _beside(method, rows, columns)
        together = _RANGE_COPIES * min(at_once, tries * rows * columns)
        return together + (1 + method.holds_out) * matrices

    return _FLOAT * max(map(each, shapes.sharing))


def _batch(shapes: Shapes, method: Method, lengths: Lengths) -> int:
    """Bytes of what a layer makes of the batch that takes most."""
    backward = method.importance != "none" or method.asks_answers
    hidden = _BATCH_HIDDEN * shapes.hidden
    if shapes.experts and backward:  # what each expert makes of its tokens is kept
        inner = shapes.linears[-1][1]
        hidden += shapes.taken * (_BATCH_HIDDEN * shapes.hidden + _BATCH_MLP * inner) // 2
    scores = _BATCH_SCORES * shapes.heads if backward else 0
    values = shapes.recurrent_heads * shapes.recurrent_width
    values *= _BATCH_VALUES_BACK if backward else _BATCH_VALUES

    def width(each: int) -> int:
        """Numbers for one token of a sample, in the layer that makes most of it."""
        return hidden + max(_BATCH_MLP * shapes.widest + scores * each, values)

    batches = lengths.batches(BATCH_TOKENS)
    return _FLOAT * max((n * each * width(each) for n, each in batches), default=0)


def _gradients(shapes: Shapes, method: Method) -> int:
    """Bytes of the output matrix, and of what the loss makes of logits."""
    if not method.asks_answers:
        return 0
    return shapes.vocabulary * (shapes.hidden + _LOGITS * AT_ONCE_LOGITS) * _FLOAT


def _weights(shapes: Shapes, method: Method, lengths: Lengths) -> int:
    """Bytes of a factor for every token at every linear, if they are found before the first."""
    if method.importance != "answers":
        return 0
    each = len(shapes.linears)
    if shapes.experts:  # of an expert's linears a factor and a place for each token that comes
        each = shapes.dense + shapes.taken * _EXPERT_WEIGHTS
    return shapes.layers * each * lengths.tokens * _FLOAT


def _activations(shapes: Shapes, method: Method, lengths: Lengths, bits: int) -> int:
    """Bytes of the activations of all samples, each stream before and after the attention.

    A method that scales has one stream, and beside it what an inspected module gave at full
    precision. One that asks for the answers' gradients first keeps the input of every layer.
    """
    copies = (4 if method.two_streams else 2) if method.calibrated else 0
    copies += method.tuned  # the layer's input is kept
    copies += bool(shapes.experts) and method.two_streams  # the stream behind the experts waits
    copies = 3 if method.scaling else copies
    one = lengths.tokens * shapes.hidden * _FLOAT
    kept = one + min(KEPT, shapes.layers * one) if method.asks_answers else 0
    own = tower_method(method, bits)
    shown = on_tower(shapes, lengths, bits).images if shapes.tower and own.calibrated else 0
    patches = shown * shapes.patches
    streams = 2 * (1 + own.two_streams)  # before a segment of the tower, and behind it
    return max(copies * one, kept, streams * patches * shapes.tower_width * _FLOAT)


def _inner(shapes: Shapes, config: QuantConfig, lengths: Lengths) -> int:
    """Bytes of what enters the MLP's `out` in the quantized stream, for all samples.

    Where channels are made even there it is made again, because up changes once it is known.
    """
    method = method_of(config)
    if not method.solves or config.smooth or shapes.experts:
        return 0
    return lengths.tokens * shapes.linears[-1][1] * _FLOAT


def tries_of(config: QuantConfig) -> int:
    """Ranges that are tried for each row of an affine grid, zero-points included; 0: none are.

    A method that chooses among others tries the ranges of all of them, one method after the other.
    """
    method = method_of(config)
    found = []
    bits = min(config.widths.values(), default=config.bits)  # the fewest have the most ranges
    for each in (method, *(METHODS[name] for name in method.candidates)):
        moves = moves_of(each, bits, config.symmetric)
        found.append(len(each.refine.shrink) * len(moves))
    return max(found)
