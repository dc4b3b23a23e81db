"""--target-bpw and --target-size: the block type of each matrix, within a budget of bits.

The types are planned from shapes alone, and chosen once what each of them costs is measured.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from vlmq_export.callbacks import Progress
from vlmq_export.errors import ArtifactError, UsageError
from vlmq_export.formats.model_plan import ModelPlan, parts_of
from vlmq_export.planning.budget import budget_of, largest_types, weights_of
from vlmq_export.planning.parts import open_parts, planned_weights
from vlmq_export.planning.run_plan import shapes_of
from vlmq_export.quantizer.arithmetic import exact_arithmetic, pick_device
from vlmq_export.quantizer.calibration.offload import Place, Shelf
from vlmq_export.quantizer.config import TOWER
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.rotation import rotated
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.samples.sample import Lengths, Sample
from vlmq_export.quantizer.storage.untrusted import read_json
from vlmq_export.quantizer.type_budget.knapsack import choose
from vlmq_export.quantizer.type_budget.sensitivity import kept_bytes, measured
from vlmq_export.recipes.recipe import OUTSIDE_BITS, Recipe

log = logging.getLogger("vlmq_export")
# What the decoder's matrices cost together, of the sum of what each costs alone: each is solved to
# make up for those before it. Eight measurements gave .13 to 1.1, and this as their geometric mean
# (docs/widths.md). What lies outside the decoder is not made up for.
_TOGETHER = 0.4
# Hub module → block type; under TOWER the bits of the vision tower, where they are chosen too.
Types = dict[str, str | int]


def planned_types(model: ModelPlan, recipe: Recipe) -> Types:
    """Hub module → type, of about the right size, before anything is measured.

    An error is taken to cost alike in every weight, and to fall to a quarter with each bit of it.
    Raises UsageError for a budget that no types meet, and for a method without samples to measure
    on.
    """
    require_samples(model, recipe)
    budget = budget_of(model, recipe)
    weights = weights_of(model, budget.choices) | planned_weights(model, recipe)
    costs = {
        n: {k: (b, weights[n] * 4.0 ** -_bits_of(k)) for k, b in kinds.items()}
        for n, kinds in budget.choices.items()
    }
    return choose(costs, budget.bits)


def _bits_of(kind: str | int) -> float:
    """Bits per weight of a block type, or of a width."""
    return GRIDS[kind].bits_per_weight if isinstance(kind, str) else kind


def require_samples(model: ModelPlan, recipe: Recipe) -> None:
    """Raises UsageError where no cost can be measured: without samples, and of experts."""
    if model.architecture.family.sparse:
        raise UsageError(
            f"{recipe.by_cost} is not there for experts, which {model.architecture.model_type} has;"
            " leave it out, or choose a dense model of the family"
        )
    if not model.job.method.calibrated:
        raise UsageError(
            f"{recipe.by_cost} measures on calibration samples,"
            f" which --method {recipe.method} does not use"
        )


def spare_note(model: ModelPlan, recipe: Recipe) -> list[str]:
    """Says so where a --target-size leaves every matrix its largest type."""
    if (
        recipe.target_size is None
        or recipe.widths_by_cost
        or model.config.types != largest_types(model, recipe)
        or (TOWER in open_parts(model, recipe) and model.config.vision_bits < OUTSIDE_BITS)
    ):
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
) -> Types:
    """Hub module → type, the same on every rank. A resumed run keeps the types it started with."""
    return on_every_rank(
        ranks,
        begun,
        lambda run: begun_with(run, "types", budget_of(model, recipe).choices, model),
        lambda: measured_types(model, recipe, checkpoint, samples, memory, progress),
    )


def on_every_rank(
    ranks: Ranks,
    begun: Path | None,  # run.json of the run that is resumed, if it is
    kept: Callable[[Path], dict[str, Any]],  # reads the choice of that run
    measure: Callable[[], dict[str, Any]],  # makes the choice
) -> dict[str, Any]:
    """A choice for each matrix: the one of a begun run, or what the first rank measures."""
    found = None
    if ranks.first:
        found = kept(begun) if begun is not None and begun.is_file() else measure()
    return ranks.broadcast_json(found, 0)


def begun_with(
    file: Path,
    key: Literal["types", "widths"],
    choices: Mapping[str, Collection[Any]],
    model: ModelPlan,
) -> dict[str, Any]:
    """The types or widths of the run that a run.json belongs to.

    Raises ArtifactError where they are missing, or are none that this recipe could choose.
    """
    config = read_json(file, error=ArtifactError).get("config")
    config = config if isinstance(config, dict) else {}
    found = config.get(key)
    parts = {name: config.get(own) for name, own in parts_of(model).items() if name in choices}
    chosen = parts | found if isinstance(found, dict) else {}
    same = chosen.keys() == choices.keys()
    kinds = {name: {*each} for name, each in choices.items()}
    if not same or any(
        type(kind) not in (str, int) or kind not in kinds[name] for name, kind in chosen.items()
    ):
        raise ArtifactError(
            f"{file}: its {key} are not those of this recipe; give the same flags,"
            " or start again without --resume"
        )
    return chosen


def measured_types(
    model: ModelPlan,
    recipe: Recipe,
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,
    progress: Progress,
) -> Types:
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
    tower = {name: types[name] for name in (TOWER,) if name in types}
    counts = Counter(str(kind) for name, kind in types.items() if name not in tower)
    spread = [f"{n} {kind}" for kind, n in sorted(counts.items())]
    spread += [f"the vision tower {bits} bits" for bits in tower.values()]
    log.info(
        "%.4f bits per weight: %s; so would cost a KL of about %.1e",
        spent / sum(weights.values()),
        ", ".join(spread),
        expected,
    )
    return types


def measured_costs(
    model: ModelPlan,
    recipe: Recipe,
    bits: Mapping[str, Mapping[Any, int]],
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,
    progress: Progress,
) -> dict[str, dict[Any, tuple[int, float]]]:
    """The types or widths of each matrix with what they cost beside the others, layer by layer.

    bits: hub module → type or width → bits of the whole matrix.
    memory: bytes that are free. Of activations that would take half of them, files are made.
    """
    turned, device = rotated(checkpoint, recipe.rotate, recipe.seed), pick_device(recipe.device)
    job = Job.of(turned.architecture, model.config)
    shapes, streamed = shapes_of(model), StreamedModel(turned, device)
    vision = turned.architecture.vision
    changed = len(bits.get(TOWER, ())) * (1 + len(vision.get("deepstack_visual_indexes", ())))
    kept = kept_bytes(shapes.layers + changed, shapes.hidden, Lengths.of(samples))
    with TemporaryDirectory() as scratch, exact_arithmetic():
        place: Place = "disk" if kept > memory / 2 else "host"
        cost = measured(
            streamed,
            job,
            bits,
            samples,
            Shelf(device, place, Path(scratch)),
            lambda done, total: progress("measure costs", done, total),
        )
    layers = turned.architecture.family.layers
    share = {name: _TOGETHER if name.startswith(layers) else 1.0 for name in bits}
    return {
        name: {kind: (size, share[name] * cost[name][kind]) for kind, size in kinds.items()}
        for name, kinds in bits.items()
    }
