"""--target-bpw and --target-size: the block type of each matrix, within a budget of bits.

The types are planned from shapes alone, and chosen once what each of them costs is measured.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

from torch import nn

from vlmq_export.callbacks import Progress
from vlmq_export.errors import ArtifactError, UsageError
from vlmq_export.formats.model_plan import ModelPlan
from vlmq_export.planning.budget import Choices, budget_of, largest_types, weights_of
from vlmq_export.quantizer.arithmetic import exact_arithmetic, pick_device
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.storage.untrusted import read_json
from vlmq_export.quantizer.type_budget.knapsack import choose
from vlmq_export.quantizer.type_budget.sensitivity import Matrix, measured
from vlmq_export.recipes.recipe import Recipe

log = logging.getLogger("vlmq_export")
# Hub module → type → bits of the whole matrix, and KL per answer token that it would cost.
Costs = dict[str, dict[str, tuple[int, float]]]


def planned_types(model: ModelPlan, recipe: Recipe) -> dict[str, str]:
    """Hub module → type, of about the right size, before anything is measured.

    An error is taken to cost alike in every weight, and to fall to a quarter with each bit of it.
    Raises UsageError for a budget that no types meet, and for a method without samples to measure
    on.
    """
    if not model.job.method.calibrated:
        raise UsageError(
            f"{recipe.block_types} measures on calibration samples,"
            f" which --method {recipe.method} does not use"
        )
    budget = budget_of(model, recipe)
    weights = weights_of(model, budget.choices)
    costs = {
        n: {k: (b, weights[n] * 4.0 ** -GRIDS[k].bits_per_weight) for k, b in kinds.items()}
        for n, kinds in budget.choices.items()
    }
    return choose(costs, budget.bits)


def spare_note(model: ModelPlan, recipe: Recipe) -> list[str]:
    """Says so where a --target-size leaves every matrix its largest type."""
    if recipe.target_size is None or model.config.types != largest_types(model, recipe):
        return []
    return [
        f"{recipe.block_types} is more than the largest types take: every matrix has its largest,"
        " and a larger size changes nothing"
    ]


def chosen_types(
    model: ModelPlan,
    recipe: Recipe,
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,  # bytes that may be taken
    ranks: Ranks,
    begun: Path | None,  # run.json of the run that is resumed, if it is
    progress: Progress,
) -> dict[str, str]:
    """Hub module → type, the same on every rank. A resumed run keeps the types it started with."""
    types = None
    if ranks.first:
        if begun is not None and begun.is_file():
            types = _begun_with(begun, budget_of(model, recipe).choices)
        else:
            types = measured_types(model, recipe, checkpoint, samples, memory, progress)
    return ranks.broadcast_json(types, 0)


def _begun_with(file: Path, choices: Mapping[str, Collection[str]]) -> dict[str, str]:
    """The types of the run that a run.json belongs to.

    Raises ArtifactError where they are missing, or are none that this recipe could choose.
    """
    config = read_json(file, error=ArtifactError).get("config")
    found = config.get("types") if isinstance(config, dict) else None
    types = found if isinstance(found, dict) else {}
    same = types.keys() == choices.keys()
    if not same or any(kind not in [*choices[name]] for name, kind in types.items()):
        raise ArtifactError(
            f"{file}: its types are not those of this recipe; give the same --tensor-type,"
            " or start again without --resume"
        )
    return types


def measured_types(
    model: ModelPlan,
    recipe: Recipe,
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,
    progress: Progress,
) -> dict[str, str]:
    """Hub module → type, of the least measured cost within the budget.

    Nothing is measured where every matrix may have its largest type.
    """
    budget = budget_of(model, recipe)
    if budget.holds_largest:
        log.info("%s: every matrix has its largest type", recipe.block_types)
        return budget.largest
    choices = budget.choices
    costs = measured_costs(model, recipe, choices, checkpoint, samples, memory, progress)
    weights = weights_of(model, costs)
    types = choose(costs, budget.bits)
    spent, expected = (sum(costs[n][k][i] for n, k in types.items()) for i in (0, 1))
    spread = ", ".join(f"{n} {k}" for k, n in sorted(Counter(types.values()).items()))
    log.info(
        "%.4f bits per weight: %s; so would cost a KL of about %.1e",
        spent / sum(weights.values()),
        spread,
        expected,
    )
    return types


def measured_costs(
    model: ModelPlan,
    recipe: Recipe,
    bits: Choices,
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,
    progress: Progress,
) -> Costs:
    """The types of each matrix with what they cost. The whole model is loaded for it."""
    family = checkpoint.architecture.family
    whole = load_model(checkpoint, pick_device(recipe.device))
    modules = {name: cast(Matrix, whole.get_submodule(family.module_name(name))) for name in bits}
    # An embedding is only rounded.
    solved = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    room = max(0, memory - 4 * sum(p.numel() for p in whole.parameters()))
    with exact_arithmetic():
        cost = measured(
            whole,
            modules,
            bits,
            solved,
            samples,
            model.config,
            memory=room,
            progress=lambda done, total: progress("measure types", done, total),
        )
    return {n: {k: (b, cost[n][k]) for k, b in kinds.items()} for n, kinds in bits.items()}
