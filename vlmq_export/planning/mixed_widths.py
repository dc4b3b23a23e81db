"""--target-bpw and --target-size on affine grids: a width for each group of linears.

Linears of one input (q, k and v; gate and up) have one width, because programs fuse them. What a
width takes is what a format stores for it, scales and zero-points included. Where several formats
are written the largest counts, so that each of them keeps the budget. A size is met by the planned
size of each format: what is not chosen is known from a plan, and the rest is the budget.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from math import ceil
from pathlib import Path

from vlmq_export.callbacks import Progress
from vlmq_export.errors import UsageError
from vlmq_export.formats.contract import FORMATS
from vlmq_export.formats.model_plan import LinearSpec, ModelPlan, parts_of, with_kinds
from vlmq_export.planning.budget import at_least
from vlmq_export.planning.budget import budget_of as types_budget
from vlmq_export.planning.parts import (
    open_parts,
    part_bits,
    part_choices,
    part_weights,
    planned_weights,
    widest_parts,
)
from vlmq_export.planning.run_plan import format_plan, plan_run
from vlmq_export.planning.target_bpw import (
    begun_with,
    measured_costs,
    on_every_rank,
    require_samples,
)
from vlmq_export.quantizer.config import BITS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.type_budget.knapsack import choose
from vlmq_export.recipes.recipe import Recipe

log = logging.getLogger("vlmq_export")
Group = tuple[str, ...]  # hub names of linears with one input, or the name of a part
Widths = dict[str, int]  # hub module, or a part of parts.py → bits
Choices = dict[Group, dict[int, int]]  # group → width → bits that its linears take


def planned_widths(model: ModelPlan, recipe: Recipe) -> Widths:
    """Widths of about the right size, before anything is measured.

    An error is taken to cost alike in every weight, and to fall to a quarter with each bit of it.
    Raises UsageError for a budget that no widths meet, and for a method without samples to measure
    on.
    """
    require_samples(model, recipe)
    unlimited = recipe.model_copy(update={"target_size": None})
    widest = _widest(model, recipe)
    if plan_run(widest, unlimited).refusals:  # which the plan says: there is nothing to choose
        return widest.config.widths
    choices = choices_of(model, recipe)
    weights = _weights(model) | planned_weights(model, recipe)
    costs = {
        group: {w: (b, sum(weights[n] for n in group) * 4.0**-w) for w, b in widths.items()}
        for group, widths in choices.items()
    }
    return by_linear(choose(costs, budget_of(model, recipe, choices)))


def choices_of(model: ModelPlan, recipe: Recipe) -> Choices:
    """The widths of each group with the bits that they take."""
    linears = {x.name: x for x in model.linears}
    return {
        group: {w: _bits(model, w, [linears[n] for n in group], recipe) for w in BITS}
        for group in _groups(model)
    } | {(name,): widths for name, widths in part_choices(_widest(model, recipe), recipe).items()}


def _widest(model: ModelPlan, recipe: Recipe) -> ModelPlan:
    """The same run with the most bits for every linear of the decoder, and for each open part."""
    widths = {name: max(BITS) for group in _groups(model) for name in group}
    return widest_parts(with_kinds(model, widths), recipe)


def budget_of(model: ModelPlan, recipe: Recipe, choices: Choices) -> int:
    """Bits that all linears may take together.

    Raises UsageError with the least that would do, where the smallest widths take more.
    """
    least = sum(min(widths.values()) for widths in choices.values())
    if recipe.target_bytes is not None:
        rest = _not_chosen(model, recipe)
        budget, told = 8 * recipe.target_bytes - rest, f"{at_least(rest + least)} GB"
    else:
        assert recipe.target_bpw is not None, "widths are chosen for a budget"
        weights = sum(_weights(model)[name] for group in choices for name in group)
        budget = int(recipe.target_bpw * weights)
        told = f"{ceil(1000 * least / weights) / 1000:g} bits per weight"
    if least > budget:
        what = "the linears take" if recipe.target_bytes is None else "the files take"
        raise UsageError(
            f"{recipe.by_cost}: {what} at least {told} in {' and '.join(recipe.format)},"
            " scales and zero-points included; raise it"
        )
    return budget


def _not_chosen(model: ModelPlan, recipe: Recipe) -> int:
    """The bits of all that is not chosen, in the format where that is the most."""
    options = recipe.format_options(model.name)
    widest, rest = _widest(model, recipe), []
    for name in recipe.format:
        own = (x for x in widest.linears if x.name in widest.config.widths)
        linears = [FORMATS[name].linear_bits(x, widest.config.of(x.name), options) for x in own]
        chosen = sum(bits or 0 for bits in linears)
        chosen += part_bits(widest, recipe, name, open_parts(widest, recipe))
        rest.append(8 * format_plan(name, widest, options).size_bytes - chosen)
    return max(rest)


def spare_width_note(model: ModelPlan, recipe: Recipe) -> list[str]:
    """Says so where the budget leaves every linear the most bits."""
    config = model.config
    most = [*config.widths.values(), *(getattr(config, key) for key in recipe.open_parts)]
    if not recipe.widths_by_cost or {*most} != {max(BITS)}:
        return []
    return [f"{recipe.by_cost} is as much as {max(BITS)} bits take: every linear has these"]


def _groups(model: ModelPlan) -> list[Group]:
    """The linears of the decoder by the input that they share, in order."""
    job = model.job
    return [
        tuple(job.prefix(layer) + name for name in names)
        for layer in range(job.layers)
        for names in job.groups(layer)
    ]


def chosen_widths(
    model: ModelPlan,
    recipe: Recipe,
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,  # bytes that may be taken
    ranks: Ranks,
    begun: Path | None,  # run.json of the run that is resumed, if it is
    progress: Progress,
) -> Widths:
    """The widths, the same on every rank. A resumed run keeps those that it started with."""
    allowed = {name: BITS for group in _groups(model) for name in group}
    allowed |= open_parts(model, recipe)
    return on_every_rank(
        ranks,
        begun,
        lambda run: begun_with(run, "widths", allowed, model),
        lambda: measured_widths(model, recipe, checkpoint, samples, memory, progress),
    )


def measured_widths(
    model: ModelPlan,
    recipe: Recipe,
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,
    progress: Progress,
) -> Widths:
    """The widths of the least measured cost within the budget.

    Nothing is measured where every linear may have the most bits.
    """
    choices = choices_of(model, recipe)
    budget = budget_of(model, recipe, choices)
    if _holds_widest(choices, budget):
        log.info("%s: every linear has %d bits", recipe.by_cost, max(BITS))
        return by_linear(dict.fromkeys(choices, max(BITS)))
    costs = costs_of(model, recipe, checkpoint, samples, memory, progress)
    chosen = choose(costs, budget)
    spent, expected = (sum(costs[g][w][i] for g, w in chosen.items()) for i in (0, 1))
    widths, weights = by_linear(chosen), _weights(model)
    named = ((key, widths.get(name)) for name, key in parts_of(model).items())
    parts = [f"{key.removesuffix('_bits')} {bits} bits" for key, bits in named if bits]
    log.info(
        "%.4f bits per weight%s; so would cost a KL of about %.1e",
        spent / sum(weights[name] for name in widths),
        f" ({', '.join(parts)})" if parts else "",
        expected,
    )
    return widths


def costs_of(
    model: ModelPlan,
    recipe: Recipe,
    checkpoint: Checkpoint,
    samples: list[Sample],
    memory: int,
    progress: Progress,
) -> dict[Group, dict[int, tuple[int, float]]]:
    """The widths of each group with their bits, and the KL per answer token that they would cost.

    The costs of the linears of a group are taken to add up.
    """
    choices = choices_of(model, recipe)
    each = {name: widths for group, widths in choices.items() for name in group}
    cost = measured_costs(model, recipe, each, checkpoint, samples, memory, progress)
    return {
        group: {w: (bits, sum(cost[n][w][1] for n in group)) for w, bits in widths.items()}
        for group, widths in choices.items()
    }


def kinds_tried(model: ModelPlan, recipe: Recipe) -> dict[str, list[str | int]]:
    """Hub module → block types or widths whose cost a run will measure; empty where it need not."""
    if recipe.types_by_cost:
        budget = types_budget(model, recipe)
        each = {} if budget.holds_largest else budget.choices
        return {name: [*kinds] for name, kinds in each.items()}
    choices = choices_of(model, recipe)
    if _holds_widest(choices, budget_of(model, recipe, choices)):
        return {}
    return {name: [*widths] for group, widths in choices.items() for name in group}


def _holds_widest(choices: Choices, budget: int) -> bool:
    """Whether every linear may have the most bits."""
    return sum(max(widths.values()) for widths in choices.values()) <= budget


def _bits(model: ModelPlan, width: int, linears: Iterable[LinearSpec], recipe: Recipe) -> int:
    """Bits of some linears at a width, each in the format that stores it the largest.

    A format that cannot hold one does not count: its plan is refused with a reason.
    """
    config, options = model.config.at(width), recipe.format_options(model.name)
    return sum(
        max(FORMATS[name].linear_bits(x, config, options) or 0 for name in recipe.format)
        for x in linears
    )


def _weights(model: ModelPlan) -> dict[str, int]:
    """The number of weights of each linear, and of each part."""
    return {x.name: x.numel for x in model.linears} | part_weights(model)


def by_linear(chosen: Mapping[Group, int]) -> Widths:
    """The width of each linear, from that of its group."""
    return {name: width for group, width in chosen.items() for name in group}
