"""The arithmetic of the speed benches. docs/performance.md has what they measure."""

import time

import pytest
import torch

from tools.bench import pipeline, solver
from vlmq_export.quantizer.solver.nearest import round_to_nearest

CPU = torch.device("cpu")


def test_phases_do_not_overlap():
    class Work:
        def inner(self):
            time.sleep(0.02)

    phases = pipeline.Phases(CPU)
    phases.now = time.perf_counter
    work = Work()
    undo = phases.watch(work, "inner", "inner")
    start = time.perf_counter()
    with phases("outer"):
        time.sleep(0.01)
        work.inner()
        work.inner()
    total = time.perf_counter() - start
    undo()
    work.inner()
    assert phases.seconds["inner"] >= 0.04 and phases.seconds["outer"] >= 0.01
    assert sum(phases.seconds.values()) == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("method", ["gptq", "vlmq-paper"])
def test_a_layer_of_the_pipeline(method):
    shape = pipeline.Shape(hidden=128, mlp=256, heads=4, kv_heads=2, layers=4)
    first, second = pipeline.run(shape, method, 2, 4, 16, CPU, "device")
    assert {"column loop", "factorize", "walk and statistics", "advance"} <= set(second["seconds"])
    assert "importance" in second["seconds"]
    assert ("column term" in second["seconds"]) == (method == "vlmq-paper")
    assert first["peak"] > 0 and second["total"] == pytest.approx(sum(second["seconds"].values()))


@torch.no_grad()
def test_ours_has_the_loss_of_the_solver():
    """On the bench's problem, solving is much better than rounding to nearest.

    Otherwise its column of losses would say nothing.
    """
    generator = torch.Generator().manual_seed(0)
    a, diagonal = solver.hessian(256, generator, "cpu")
    w = torch.randn(64, 256, generator=generator) * 0.02
    (ours,) = solver.ours([w], a, diagonal, 4, "gar")
    nearest = round_to_nearest(w, solver.Affine(4), group=128).decode()
    assert solver.weighted_loss(ours, w, a) < 0.6 * solver.weighted_loss(nearest, w, a)
