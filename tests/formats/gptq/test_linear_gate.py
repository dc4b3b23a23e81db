"""The gate on single linears: a right kernel passes whatever its rows are, a wrong one fails."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vlmq_export.formats.gptq.proof.check import program
from vlmq_export.formats.in_transformers.proof.rows import linear_row

COLUMNS, ROWS, GROUP = 512, 256, 128
NAME = "model.layers.0.mlp.down_proj"


def row_of(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> Any:
    """The row of the parity table for a linear of this weight that gave y for x."""
    weights = SimpleNamespace(linears=[NAME], floats=set(), array=lambda _name: weight)
    outcome = SimpleNamespace(linear=lambda _name: (x, y))
    reference: Any = SimpleNamespace(weights=weights)
    return linear_row(program(4), outcome, lambda name: name, reference)  # type: ignore[arg-type]


def product(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x·wᵀ in float32, as torch computes it: [M, N]."""
    return (torch.from_numpy(x) @ torch.from_numpy(weight).T).numpy()


def problem(factor: float) -> tuple[np.ndarray, np.ndarray]:
    """A weight with one row of `factor` times the size, and inputs on which outputs cancel."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    weight[5] *= factor
    x = rng.standard_normal((32, COLUMNS))
    half = weight[: ROWS // 2].astype(np.float64)  # these outputs are about zero for all inputs
    x -= x @ np.linalg.pinv(half) @ half
    return weight, x.astype(np.float32)


@pytest.mark.parametrize("factor", [1, 50, 1000])
def test_a_right_kernel_passes(factor):
    row = row_of(*(p := problem(factor)), product(*p))
    assert row.status == "passed" and row.value < 0.5


@pytest.mark.parametrize("factor", [1, 50, 1000])
@pytest.mark.parametrize("output", [5, 7, 200])
def test_a_wrong_scale_fails(factor, output):
    """One unit in the last place of a float16 scale, in one group of one row."""
    weight, x = problem(factor)
    wrong = weight.copy()
    wrong[output, GROUP : 2 * GROUP] *= 1 + 2.0**-10
    row = row_of(weight, x, product(wrong, x))
    assert row.status == "failed" and row.worst == NAME


def test_an_output_that_is_not_a_number_fails():
    weight, x = problem(1)
    y = product(weight, x)
    y[3, 7] = np.nan
    assert row_of(weight, x, y).status == "failed"
