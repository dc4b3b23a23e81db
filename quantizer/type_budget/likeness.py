"""What a kind would cost a matrix, from one that is solved more quickly.

A matrix is solved on a lattice in many times the seconds that evenly spaced levels take, and with
ranges and descent in many times those of the plain column loop. Lattices, and widths of many bits
with their ranges and descent, are therefore solved on a few matrices alone. Their weighted error
there, over that of a K type of about the same size or of the plain loop, differs little from matrix
to matrix, and far less than costs do, which are measured on few samples (docs/gguf.md,
docs/widths.md). So the mean of that ratio stands for every matrix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence

import torch

from vlmq_export.quantizer.solver.hessian import weighted_loss

LIKE: dict[Kind, str] = {
    "IQ2_XXS": "Q2_K",
    "IQ2_XS": "Q2_K",
    "IQ2_S": "Q2_K",
    "IQ3_XXS": "Q3_K",
    "IQ3_S": "Q3_K",
}
PLAIN = 4  # bits from which on a width is measured by the plain column loop
PROBES = 4  # matrices on which the others are solved too
Kind = str | int  # a block type, or the bits of a width
Kinds = Mapping[str, Iterable[Kind]]  # matrix → kinds to try
# Lattice → its weighted error over that of LIKE's type; width → over that of the plain loop.
Ratios = dict[Kind, float]


def quick(kinds: Iterable[Kind]) -> list[Kind]:
    """The kinds that every matrix is solved on: those that are no lattices, or the only one."""
    kinds = list(kinds)
    return [k for k in kinds if k not in LIKE] if len(kinds) > 1 else kinds


def probes(kinds: Kinds, solved: Container[str]) -> list[str]:
    """Matrices to solve on what `quick` and the plain loop pass over, evenly spaced."""
    names = [n for n, tried in kinds.items() if n in solved and _scaled(tried)]
    step = max(1, len(names) // PROBES)
    return names[step // 2 :: step][:PROBES]


def _scaled(kinds: Iterable[Kind]) -> list[Kind]:
    """The kinds whose cost is that of another solve, times a ratio."""
    kinds = list(kinds)
    if len(kinds) == 1:
        return []
    return [k for k in kinds if k in LIKE or (isinstance(k, int) and k >= PLAIN)]


def gains(
    whole: Mapping[Kind, torch.Tensor], plain: Mapping[Kind, torch.Tensor], hessian: torch.Tensor
) -> Ratios:
    """The ratios of one matrix from width → Ŵ − W, with ranges and descent and without."""
    loss = [_losses(errors, hessian) for errors in (whole, plain)]
    return {k: loss[0][k] / loss[1][k] for k in whole if min(loss[0][k], loss[1][k]) > 0}


def ratios(errors: Mapping[Kind, torch.Tensor], hessian: torch.Tensor) -> Ratios:
    """The ratios of one matrix from type → Ŵ − W, [out, in], and A, float32 [in, in]."""
    loss = _losses(errors, hessian)
    return {k: loss[k] / loss[LIKE[k]] for k in loss if k in LIKE and loss[LIKE[k]] > 0}


def _losses(errors: Mapping[Kind, torch.Tensor], hessian: torch.Tensor) -> dict[Kind, float]:
    return {k: weighted_loss(e.float(), torch.zeros(()), hessian) for k, e in errors.items()}


def completed(
    costs: Mapping[str, Mapping[Kind, float]],
    kinds: Kinds,
    found: Sequence[Ratios],
    solved: Container[str],
) -> dict[str, dict[Kind, float]]:
    """The costs, with those of the kinds that were not measured.

    found: the ratios of each probe.
    solved: matrices that are solved. What a width costs the others, they were measured with.
    """
    logs: dict[Kind, list[float]] = defaultdict(list)
    for probe in found:
        for kind, ratio in probe.items():
            logs[kind].append(math.log(ratio))
    mean = {kind: math.exp(sum(each) / len(each)) for kind, each in logs.items()}
    return {
        name: {
            k: _cost(cost, k, mean.get(k, 1.0) if isinstance(k, str) or name in solved else 1.0)
            for k in kinds[name]
        }
        for name, cost in costs.items()
    }


def _cost(measured: Mapping[Kind, float], kind: Kind, ratio: float) -> float:
    """What a kind costs a matrix. A lattice that is the only kind was measured itself."""
    if isinstance(kind, str):
        return measured[kind] if kind in measured else measured[LIKE[kind]] * ratio
    return measured[kind] * ratio
