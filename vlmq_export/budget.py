"""--target-bpw: the block type of each matrix, planned from shapes alone and then chosen by what each would cost."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

from torch import nn

from vlmq_export.errors import ArtifactError, UsageError
from vlmq_export.formats.base import ModelPlan
from vlmq_export.formats.gguf.mix import module_choices
from vlmq_export.quantizer import budget
from vlmq_export.quantizer.calibration import Sample
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.distributed import Ranks
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.kquants import GRIDS
from vlmq_export.quantizer.methods import method_named
from vlmq_export.quantizer.model import exact_arithmetic, load_model, pick_device
from vlmq_export.quantizer.untrusted import read_json
from vlmq_export.recipe import Recipe

log = logging.getLogger("vlmq_export")
Bits = Mapping[str, Mapping[str, int]]  # hub module → type → bits of the whole matrix


def planned_types(model: ModelPlan, recipe: Recipe) -> dict[str, str]:
    """Types of about the right size, before anything is measured: errors as if all weights counted alike.

    Raises UsageError for a budget that no types meet, and for a method without samples to measure on.
    """
    if not method_named(recipe.method.value).calibrated:
        raise UsageError(f"--target-bpw measures on calibration samples, which --method {recipe.method} does not use")
    bits = module_choices(model, recipe.tensor_type)
    weights = _weights(model, bits)
    costs = {n: {k: (b, weights[n] * 4.0 ** -GRIDS[k].bits) for k, b in kinds.items()} for n, kinds in bits.items()}
    return budget.choose(costs, int(recipe.target_bpw * sum(weights.values())))


def chosen_types(
    model: ModelPlan, recipe: Recipe, checkpoint: Checkpoint, samples: list[Sample], memory: int, ranks: Ranks,
    begun: Path | None, progress: Callable[[str, int, int], None],
) -> dict[str, str]:  # fmt: skip
    """The measured types on every rank; a resumed run, whose run.json is `begun`, keeps those that it started with."""
    types = None
    if ranks.first:
        if begun is not None and begun.is_file():
            types = read_json(begun, error=ArtifactError)["config"]["types"]
        else:
            types = measured_types(model, recipe, checkpoint, samples, memory, progress)
    return ranks.broadcast_json(types, 0)


def measured_types(
    model: ModelPlan, recipe: Recipe, checkpoint: Checkpoint, samples: list[Sample], memory: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, str]:  # fmt: skip
    """The types of least measured cost within the budget."""
    costs = measured_costs(model, recipe, checkpoint, samples, memory, progress)
    total = sum(_weights(model, costs).values())
    types = budget.choose(costs, int(recipe.target_bpw * total))
    spent, expected = (sum(costs[n][k][i] for n, k in types.items()) for i in (0, 1))
    spread = ", ".join(f"{n} {k}" for k, n in sorted(Counter(types.values()).items()))
    log.info("%.4f bits per weight: %s; so would cost a KL of about %.1e", spent / total, spread, expected)
    return types


def measured_costs(
    model: ModelPlan, recipe: Recipe, checkpoint: Checkpoint, samples: list[Sample], memory: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, tuple[int, float]]]:  # fmt: skip
    """Hub module → type → (bits of the matrix, KL that it would cost); the whole model is loaded, and dropped again."""
    bits, family = module_choices(model, recipe.tensor_type), family_of(checkpoint.config)
    whole = load_model(checkpoint, pick_device(recipe.device.value))
    modules = {name: whole.get_submodule(family.module_name(name)) for name in bits}
    linears = {
        name for name, module in modules.items() if isinstance(module, nn.Linear)
    }  # an embedding is only rounded
    room = max(0, memory - 4 * sum(p.numel() for p in whole.parameters()))
    with exact_arithmetic():
        cost = budget.measured(
            whole, modules, bits, linears, samples, model.config, memory=room,
            progress=lambda done, total: progress("measure types", done, total),
        )  # fmt: skip
    return {n: {k: (b, cost[n][k]) for k, b in kinds.items()} for n, kinds in bits.items()}


def _weights(model: ModelPlan, names: Iterable[str]) -> dict[str, int]:
    """Number of weights of each matrix."""
    sizes = {x.name: x.out_features * x.in_features for x in model.linears}
    sizes |= {t.name.removesuffix(".weight"): prod(t.shape) for t in model.floats}
    return {name: sizes[name] for name in names}
