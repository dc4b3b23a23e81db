"""--target-bpw: the block type of each matrix, within a budget of bits per weight.

The types are planned from shapes alone, and chosen once what each of them costs is measured.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import cast

from torch import nn

from vlmq_export.callbacks import Progress
from vlmq_export.errors import ArtifactError, UsageError
from vlmq_export.formats.gguf.types.mix import module_choices
from vlmq_export.formats.model_plan import ModelPlan
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
            "--target-bpw measures on calibration samples,"
            f" which --method {recipe.method} does not use"
        )
    bits = _choices(model, recipe)
    weights = _weights(model, bits)
    costs = {
        n: {k: (b, weights[n] * 4.0 ** -GRIDS[k].bits_per_weight) for k, b in kinds.items()}
        for n, kinds in bits.items()
    }
    return choose(costs, _budget(recipe, weights))


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
            types = _begun_with(begun, _choices(model, recipe))
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
    """Hub module → type, of the least measured cost within the budget."""
    costs = measured_costs(model, recipe, checkpoint, samples, memory, progress)
    weights = _weights(model, costs)
    types = choose(costs, _budget(recipe, weights))
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
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,
    progress: Progress,
) -> Costs:
    """The types of each matrix with what they cost. The whole model is loaded for it."""
    bits, family = _choices(model, recipe), checkpoint.architecture.family
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


def _choices(model: ModelPlan, recipe: Recipe) -> dict[str, dict[str, int]]:
    """Hub module → type → bits of the whole matrix: what may be chosen from."""
    assert recipe.target_bpw is not None, "types are chosen for a --target-bpw"
    return module_choices(model, recipe.target_bpw, recipe.tensor_type)


def _budget(recipe: Recipe, weights: Mapping[str, int]) -> int:
    """The bits that matrices of these sizes may take together."""
    assert recipe.target_bpw is not None, "types are chosen for a --target-bpw"
    return int(recipe.target_bpw * sum(weights.values()))


def _weights(model: ModelPlan, names: Iterable[str]) -> dict[str, int]:
    """The number of weights of each matrix, by the hub name of its module."""
    sizes = {x.name: x.out_features * x.in_features for x in model.linears}
    sizes |= {t.name.removesuffix(".weight"): prod(t.shape) for t in model.floats}
    return {name: sizes[name] for name in names}
