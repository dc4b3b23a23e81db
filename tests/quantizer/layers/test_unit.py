"""One unit of work: linears that share their statistics, on one grid or on several."""

from __future__ import annotations

import torch

from tests.jobs import job_for
from tests.quantizer.solver.test_descent import sums_of, two_streams
from vlmq_export.quantizer.calibration.collect import Evidence
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.layers.stack import Matrix
from vlmq_export.quantizer.layers.unit import solve_unit

WIDTH = 64  # columns: two blocks of the types below
TYPES = {"first": "Q4_0", "second": "Q4_1"}


def matrices() -> list[Matrix]:
    g = torch.Generator().manual_seed(0)
    return [Matrix(name, torch.randn(12, WIDTH, generator=g)) for name in TYPES]


def evidence() -> Evidence:
    fitted, held = two_streams(150, WIDTH), two_streams(60, WIDTH, seed=50)
    return Evidence(sums_of(*fitted), sums_of(*held))


def test_samples_put_aside_count_once_for_each_linear():
    """`auto` solves once more from all samples.

    Where linears stand on several types, the samples that were put aside used to be added to the
    sums of the others once for each type.
    """
    job, sums = job_for(QuantConfig(method="auto", types=TYPES)), evidence()
    together = solve_unit(matrices(), sums, job)
    assert [metrics["tokens"] for _, metrics in together] == [210, 210]
    assert (sums.fitted.tokens, sums.held.tokens) == (150, 60)
    for (ours, _), matrix in zip(together, matrices(), strict=True):
        ((alone, _),) = solve_unit([matrix], evidence(), job)
        assert torch.equal(ours.decode(), alone.decode())


def test_linears_come_back_in_their_order():
    types = {"first": "Q4_0", "third": "Q4_0"}  # the second stays on the affine grid
    job = job_for(QuantConfig(method="gptq", types=types, group_size=-1))
    g = torch.Generator().manual_seed(0)
    three = [Matrix(n, torch.randn(12, WIDTH, generator=g)) for n in ("first", "second", "third")]
    solved = solve_unit(three, Evidence(evidence().fitted), job)
    assert [linear.name for linear, _ in solved] == ["first", "second", "third"]
