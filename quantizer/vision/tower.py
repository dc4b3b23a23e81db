"""The linears of the vision tower and the projector, before the decoder.

They are solved in the order in which data flows, as those of a decoder layer are, with the same
targets. All patches count the same: importance is measured in the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.calibration.collect import Evidence, summed_at_outputs, summed_on
from vlmq_export.quantizer.calibration.statistics import Statistics, outputs_apart
from vlmq_export.quantizer.host import give_back
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.stack import Matrix, Solved
from vlmq_export.quantizer.layers.unit import broadcast, solve_unit
from vlmq_export.quantizer.methods import Method
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.vision.padding import cut, filled, fitting, missing
from vlmq_export.quantizer.vision.walk import TowerWalk

# Bits from which on a tower costs so little that it is solved in less time: on fewer images
# (stage.py), and without the full-precision stream. On the first two references the KL without that
# stream is .65 and 1.2 of that with it at 8 bits, and 1.5 and .75 on Q6_K, which is noise. All of
# it is at most a fifth of what a decoder of 4 bits costs.
FINE = 6


def tower_job(job: Job) -> Job:
    """The job as the tower knows it."""
    return replace(job, method=tower_method(job.method, job.config.vision_bits))


def tower_method(method: Method, bits: int) -> Method:
    """A method without importance, tuning, and scales of input channels."""
    return replace(
        method,
        drift="plain" if bits >= FINE else method.drift,
        importance="none",
        residual=False,
        tuned=False,
        calibrated=method.solves,
        ranges="minmax",
        own=False,
    )


def quantize_tower(
    walk: TowerWalk,
    job: Job,  # of `tower_job`
    ranks: Ranks = ALONE,
    tell: Callable[[int, int], None] = lambda *_: None,  # segments done, segments in all
) -> list[Solved]:
    """Solve every linear that the walk comes by, and leave the decoded weights in the model.

    Raises CalibrationError where no sample has finite activations.
    """
    solved: list[Solved] = []
    for number, segment in enumerate(walk.segments):
        tell(number, len(walk.segments))
        for names in segment.groups:
            evidence = summed_on(0, _evidence(walk, names, job, ranks), ranks)
            parts: Sequence[Solved | None] = [None] * len(names)
            if evidence is not None:
                matrices = _matrices(walk, names, job)
                columns = matrices[0].weight.shape[1]
                whole = [replace(m, weight=filled(m.weight)) for m in matrices]
                found = solve_unit(whole, evidence.to_float32(), fitting(job, columns))
                parts = [cut(solution, columns) for solution in found]
            for name, part in zip(names, parts):
                linear, metrics = broadcast(part, ranks, 0)
                walk.put(name, linear)
                solved.append((linear, metrics))
        walk.advance()
        give_back()
    return solved


def _matrices(walk: TowerWalk, names: Sequence[str], job: Job) -> list[Matrix]:
    modules = {name: walk.model.get_submodule(name) for name in names}
    return [Matrix(job.family.hub_name(n), m.weight, m.bias) for n, m in modules.items()]


def _evidence(walk: TowerWalk, names: Sequence[str], job: Job, ranks: Ranks) -> Evidence:
    """The statistics of what enters these linears, from the samples of this rank."""
    module, method = walk.model.get_submodule(names[0]), job.method
    two = method.drift != "plain"
    (few,) = summed_at_outputs(walk.model, [names], method)

    def empty() -> Statistics:
        columns, device = module.in_features + missing(module.in_features), module.weight.device
        pull = 0 if few is None else len(few)
        return Statistics.empty(columns, drift=two and few is None, device=device, pull=pull)

    found = Evidence(empty(), empty() if method.holds_out else None)
    for picture, entering in walk.inputs(names[0]):
        aside = found.held is not None and picture.held
        sums = found.held if aside and found.held is not None else found.fitted
        full = entering.full if two else None
        pull = None
        if few is not None and full is not None:
            pull = outputs_apart(few, entering.quantized, full)
        padded = None if full is None else filled(full)
        sums.add(filled(entering.quantized), padded, pull=pull)
    if not ranks.count(found.everything.tokens if found.held else found.fitted.tokens):
        raise CalibrationError(
            f"no sample has finite activations at {job.family.hub_name(names[0])};"
            " the model or the images are damaged"
        )
    return found
