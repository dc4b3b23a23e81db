"""What block types may be chosen from, and the bits that the matrices may take together.

With --target-bpw the bits follow from the number of weights. With --target-size they are what the
package may weigh, less all that is not chosen: vision, norms, biases, tokens and metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, floor, log10, prod

from vlmq_export.errors import UsageError
from vlmq_export.formats.gguf.types.mix import module_choices
from vlmq_export.formats.model_plan import ModelPlan, with_types
from vlmq_export.planning.run_plan import format_plan
from vlmq_export.recipes.recipe import Recipe

Choices = dict[str, dict[str, int]]  # hub module → type → bits of the whole matrix
_ALL_TYPES = 0.0  # bits per weight, at which no type is too small to be chosen from
_LARGE_TYPES = 16.0  # bits per weight, at which the smallest are left out
_FILLED_TO = 8 * 32  # bits: a tensor of a GGUF is filled up to 32 bytes


@dataclass(frozen=True)
class Budget:
    """The types of each matrix, of which some fit into these bits."""

    choices: Choices
    bits: int  # that all matrices may take together

    @property
    def largest(self) -> dict[str, str]:
        """Hub module → its largest type."""
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
        choices = module_choices(model, recipe.target_bpw, recipe.tensor_type)
        return Budget(choices, int(recipe.target_bpw * sum(weights_of(model, choices).values())))
    assert recipe.target_bytes is not None, "types are chosen for a budget"
    every = _filled(model, recipe, _ALL_TYPES)
    rest = _not_chosen(model, recipe)
    bits, least = 8 * recipe.target_bytes - rest, _least(every)
    if bits < least:
        raise UsageError(_too_small(model, recipe, rest + least))
    choices = _filled(model, recipe, bits / sum(weights_of(model, every).values()))
    # With --tensor-type a few large matrices may leave little for all others.
    return Budget(choices if _least(choices) <= bits else every, bits)


def largest_types(model: ModelPlan, recipe: Recipe) -> dict[str, str]:
    """Hub module → the largest type that it may have."""
    return Budget(module_choices(model, _LARGE_TYPES, recipe.tensor_type), 0).largest


def weights_of(model: ModelPlan, names: Iterable[str]) -> dict[str, int]:
    """The number of weights of each matrix, by the hub name of its module."""
    sizes = {x.name: x.out_features * x.in_features for x in model.linears}
    sizes |= {t.name.removesuffix(".weight"): prod(t.shape) for t in model.floats}
    return {name: sizes[name] for name in names}


def _not_chosen(model: ModelPlan, recipe: Recipe) -> int:
    """The bits of all in the package that is not chosen: vision, norms, tokens, metadata."""
    # A split into files adds the most with the largest types.
    types, filled = largest_types(model, recipe), _filled(model, recipe, _LARGE_TYPES)
    options = recipe.format_options(model.name)
    whole = format_plan("gguf", with_types(model, types), options).size_bytes
    return 8 * whole - sum(filled[name][kind] for name, kind in types.items())


def _filled(model: ModelPlan, recipe: Recipe, bpw: float) -> Choices:
    """The choices at so many bits per weight, each matrix as large as its place in the file."""
    choices = module_choices(model, bpw, recipe.tensor_type)
    return {
        name: {kind: bits + -bits % _FILLED_TO for kind, bits in kinds.items()}
        for name, kinds in choices.items()
    }


def _least(choices: Mapping[str, Mapping[str, int]]) -> int:
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
