"""What block types may be chosen from, and the bits that the matrices may take together.

With --target-bpw the bits follow from the number of weights. With --target-size they are what the
package may weigh, less all that is not chosen: norms, biases, tokens and metadata, and the vision
tower where the recipe names its width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, floor, log10, prod
from typing import Any

from vlmq_export.errors import UsageError
from vlmq_export.formats.gguf.types.mix import module_choices
from vlmq_export.formats.model_plan import ModelPlan, with_kinds
from vlmq_export.planning.parts import open_parts, part_choices, part_weights, widest_parts
from vlmq_export.planning.run_plan import format_plan
from vlmq_export.recipes.recipe import Recipe

# Hub module → type → bits of the whole matrix; under TOWER by the bits of a weight.
Choices = dict[str, Mapping[Any, int]]
_ALL_TYPES = 0.0  # bits per weight, at which no type is too small to be chosen from
_LARGE_TYPES = 16.0  # bits per weight, at which the smallest are left out
_FILLED_TO = 8 * 32  # bits: a tensor of a GGUF is filled up to 32 bytes


@dataclass(frozen=True)
class Budget:
    """The types of each matrix, of which some fit into these bits."""

    choices: Choices
    bits: int  # that all matrices may take together

    @property
    def largest(self) -> dict[str, str | int]:
        """Hub module → its largest type. The vision tower stands under TOWER, by its bits."""
        return {name: max(kinds, key=lambda k: kinds[k]) for name, kinds in self.choices.items()}

    @property
    def holds_largest(self) -> bool:
        """Whether every matrix may have its largest type."""
        return sum(max(kinds.values()) for kinds in self.choices.values()) <= self.bits


def budget_of(model: ModelPlan, recipe: Recipe) -> Budget:
    """The budget of a recipe whose types are chosen by cost.

    Raises UsageError for a --target-size that no types meet.
    """
    if recipe.target_bpw is not None:
        choices = _of_types(model, recipe, recipe.target_bpw)
        return Budget(choices, int(recipe.target_bpw * sum(weights_of(model, choices).values())))
    assert recipe.target_bytes is not None, "types are chosen for a budget"
    # A tower is on block types where the model is.
    model = widest_parts(with_kinds(model, largest_types(model, recipe)), recipe)
    every = _filled(model, recipe, _ALL_TYPES)
    rest = _not_chosen(model, recipe)
    bits, least = 8 * recipe.target_bytes - rest, _least(every)
    if bits < least:
        raise UsageError(_too_small(model, recipe, rest + least))
    # What types are worth offering follows from the bits that parts at their most would leave.
    parts = open_parts(model, recipe)
    left = bits - sum(max(every[name].values()) for name in parts)
    weights = weights_of(model, every.keys() - parts.keys())
    choices = _filled(model, recipe, max(0, left) / sum(weights.values()))
    # With --tensor-type a few large matrices may leave little for all others.
    return Budget(choices if _least(choices) <= bits else every, bits)


def largest_types(model: ModelPlan, recipe: Recipe) -> dict[str, str | int]:
    """Hub module → the largest type that it may have."""
    return Budget(_of_types(model, recipe, _LARGE_TYPES), 0).largest


def weights_of(model: ModelPlan, names: Iterable[str]) -> dict[str, int]:
    """The number of weights of each matrix, by the hub name of its module."""
    sizes = {x.name: x.out_features * x.in_features for x in model.linears}
    sizes |= {t.name.removesuffix(".weight"): prod(t.shape) for t in model.floats}
    sizes |= part_weights(model)
    return {name: sizes[name] for name in names}


def _not_chosen(model: ModelPlan, recipe: Recipe) -> int:
    """The bits of all in the package that is not chosen: norms, tokens, metadata, and the like.

    The model has the largest types, with which a split into files adds the most.
    """
    filled = _filled(model, recipe, _LARGE_TYPES)
    whole = format_plan("gguf", model, recipe.format_options(model.name)).size_bytes
    return 8 * whole - sum(max(kinds.values()) for kinds in filled.values())


def _filled(model: ModelPlan, recipe: Recipe, bpw: float) -> Choices:
    """The choices at so many bits per weight, each matrix as large as its place in the file."""
    filled: Choices = {
        name: {kind: bits + -bits % _FILLED_TO for kind, bits in kinds.items()}
        for name, kinds in _of_types(model, recipe, bpw).items()
    }
    return {**filled, **part_choices(model, recipe)}


def _of_types(model: ModelPlan, recipe: Recipe, bpw: float) -> Choices:
    """The types of every matrix at so many bits per weight."""
    return {**module_choices(model, bpw, recipe.tensor_type)}


def _least(choices: Choices) -> int:
    """The bits of all matrices on their smallest types."""
    return sum(min(kinds.values()) for kinds in choices.values())


def _too_small(model: ModelPlan, recipe: Recipe, least: int) -> str:
    """One line for a size that cannot be met: the least that can be, and what would lower it.

    least: bits of the whole package.
    """
    said = f"{recipe.block_types}: the package takes at least {at_least(least)} GB"
    # The vision tower in Q8_0 is as large however its integers are found.
    eight = recipe.model_copy(update={"mmproj": "q8_0"})
    saved = 0 if model.tower else _not_chosen(model, recipe) - _not_chosen(model, eight)
    if saved:
        said += f", and about {at_least(least - saved)} with --vision-bits 8"
    return f"{said}; raise it"


def at_least(bits: int) -> str:
    """Bits in GB, rounded up to four digits, so that as much is enough."""
    size = ceil(bits / 8)
    digit = 10 ** max(0, floor(log10(size)) - 3)
    return f"{ceil(size / digit) * digit / 1e9:.4g}"
