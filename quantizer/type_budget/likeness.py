"""What a lattice would cost a matrix, from a type that is solved more quickly.

A matrix is solved on a lattice in many times the seconds that evenly spaced levels take. Lattices
are therefore solved on a few matrices alone. Their weighted error there, over that of a K type of
about the same size, differs little from matrix to matrix, and far less than costs do, which are
measured on few samples (docs/gguf.md). So the mean of that ratio stands for every matrix.
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
PROBES = 4  # matrices on which lattices are solved
Kind = str | int  # a block type, or the bits of a width, which is like no other
Kinds = Mapping[str, Iterable[Kind]]  # matrix → kinds to try
Ratios = dict[Kind, float]  # lattice → its weighted error over that of LIKE's type


def quick(kinds: Iterable[Kind]) -> list[Kind]:
    """The types that every matrix is solved on: those that are no lattices, or the only one."""
    kinds = list(kinds)
    return [k for k in kinds if k not in LIKE] if len(kinds) > 1 else kinds


def probes(kinds: Kinds, solved: Container[str]) -> list[str]:
    """Matrices that lattices are solved on, evenly spaced among those that may become one."""
    names = [n for n, tried in kinds.items() if n in solved and {*tried} > {*quick(tried)}]
    step = max(1, len(names) // PROBES)
    return names[step // 2 :: step][:PROBES]


def ratios(errors: Mapping[Kind, torch.Tensor], hessian: torch.Tensor) -> Ratios:
    """The ratios of one matrix from type → Ŵ − W, [out, in], and A, float32 [in, in]."""
    loss = {k: weighted_loss(e.float(), torch.zeros(()), hessian) for k, e in errors.items()}
    return {k: loss[k] / loss[LIKE[k]] for k in loss if k in LIKE and loss[LIKE[k]] > 0}


def completed(
    costs: Mapping[str, Mapping[Kind, float]], kinds: Kinds, found: Sequence[Ratios]
) -> dict[str, dict[Kind, float]]:
    """The costs, with those of the lattices that were not measured. found: of each probe."""
    logs: dict[Kind, list[float]] = defaultdict(list)
    for probe in found:
        for kind, ratio in probe.items():
            logs[kind].append(math.log(ratio))
    mean = {kind: math.exp(sum(each) / len(each)) for kind, each in logs.items()}
    return {
        name: {k: cost[k] if k in cost else cost[LIKE[k]] * mean.get(k, 1.0) for k in kinds[name]}
        for name, cost in costs.items()
    }
