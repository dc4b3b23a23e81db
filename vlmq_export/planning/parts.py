"""Widths outside the decoder that are chosen together with those of its matrices.

A --target-size is that of a whole package. A part whose width the recipe leaves open then takes
part in the choice: the vision tower, and on affine grids the embedding and the output head. Each
has one width, and the vision tower with its projector counts as one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from vlmq_export.formats.model_plan import ModelPlan, parts_of, with_part
from vlmq_export.planning.run_plan import format_plan
from vlmq_export.quantizer.config import BITS, EMBEDDING_TYPES, TOWER, VISION_TYPES
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.recipes.recipe import NATIVE_TOWER_BITS, Recipe

# Below four bits a tower costs more than any decoder gains by the bytes (docs/quality.md).
_TOWER = (4, 8)
_TOWER_ON_BLOCKS = (4, 5, 6, 8)
# What a plan takes a weight to cost beside one of the decoder with as many bits. On the references
# it costs 7 to 24 times as much in towers at 4 bits, and over a hundred times in the embedding,
# which is rounded and not solved (docs/quality.md).
_DEARER = {"vision_bits": 16, "head_bits": 16, "embedding_bits": 256}


def open_parts(model: ModelPlan, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Part → the widths that it may have, of the parts that the recipe leaves to the choice."""
    family = model.architecture.family
    on_blocks = recipe.block_types is not None and fits_blocks(
        (x.out_features, x.in_features) for x in model.tower
    )
    widths = {
        TOWER: _TOWER_ON_BLOCKS if on_blocks else _TOWER,
        family.embedding: (*EMBEDDING_TYPES,),
        family.head: BITS,
    }
    return {name: widths[name] for name, key in parts_of(model).items() if key in recipe.open_parts}


def widest_parts(model: ModelPlan, recipe: Recipe) -> ModelPlan:
    """The same run with the most bits for each of these parts."""
    for name, widths in open_parts(model, recipe).items():
        model = with_part(model, name, max(widths))
    return model


def part_choices(model: ModelPlan, recipe: Recipe) -> dict[str, dict[int, int]]:
    """Part → width → bits of the part, in the format where they are the most.

    The model has each of these parts at its most bits (`widest_parts`).
    """
    options = recipe.format_options(model.name)

    def size(form: str, own: ModelPlan) -> int:
        return 8 * format_plan(form, own, options).size_bytes

    found = {}
    for name, widths in open_parts(model, recipe).items():
        rest = {f: size(f, model) - part_bits(model, recipe, f, [name]) for f in recipe.format}
        at = {bits: with_part(model, name, bits) for bits in widths}
        found[name] = {
            bits: max(size(form, own) - rest[form] for form in recipe.format)
            for bits, own in at.items()
        }
    return found


def part_bits(model: ModelPlan, recipe: Recipe, form: str, names: Iterable[str]) -> int:
    """Bits that some parts take in a format, at the widths that they have in the model."""
    sizes = format_plan(form, model, recipe.format_options(model.name)).parts
    keys = parts_of(model)
    return 8 * sum(sizes.get(keys[name].removesuffix("_bits"), 0) for name in names)


def part_weights(model: ModelPlan) -> dict[str, int]:
    """The number of weights of each part that is quantized."""
    own = {x.name: x.numel for x in model.linears if x.name in parts_of(model)}
    return own | {TOWER: sum(x.numel for x in model.tower)}


def planned_weights(model: ModelPlan, recipe: Recipe) -> dict[str, int]:
    """The same of each open part, as if it had as many more weights as one of them costs more."""
    keys, weights = parts_of(model), part_weights(model)
    return {name: _DEARER[keys[name]] * weights[name] for name in open_parts(model, recipe)}


def fits_blocks(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether the blocks of K types hold most weights of these linears, [out, in] each."""
    shapes = list(shapes)
    block = GRIDS[VISION_TYPES[NATIVE_TOWER_BITS][0]].block
    fit = sum(prod(shape) for shape in shapes if shape[-1] % block == 0)
    return 2 * fit > sum(map(prod, shapes))
