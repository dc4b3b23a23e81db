"""The widths outside the decoder layers, where a recipe says nothing of them.

Vision tower, embedding and output head get 8 bits where every format of the run holds them, and
the tower 6 beside a decoder on smaller block types
(docs/decisions/0011-eight-bits-outside-the-decoder.md).
"""

from __future__ import annotations

from vlmq_export.formats.compressed_tensors.runtimes import with_towers
from vlmq_export.formats.gguf.types.mix import MIXES, mix_named
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.planning.parts import fits_blocks
from vlmq_export.quantizer.config import EMBEDDING_GROUP
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import tower_linears
from vlmq_export.quantizer.vision.stage import tower_names
from vlmq_export.recipes.recipe import HOLD_OUTSIDE, NATIVE_TOWER_BITS, OUTSIDE_BITS, Recipe
from vlmq_export.sources.calibration import CalibrationRows


def with_small_parts(recipe: Recipe, checkpoint: Checkpoint, data: CalibrationRows) -> Recipe:
    """The recipe, with a width for each part that it leaves open; 0 where the part stays float.

    With --target-size a part that can be quantized stays open: its width is chosen by cost.

    data: the rows that it calibrates on. They are read only to see whether any has an image.
    Raises CalibrationError for rows that cannot be used.
    """
    # A mix of block types names a type for the embedding and for the output head.
    affine = recipe.holds_outside and recipe.block_types is None
    architecture = checkpoint.architecture
    width = architecture.text["hidden_size"]
    able = {
        "vision_bits": lambda: recipe.holds_outside and _tower_can(recipe, checkpoint, data),
        "embedding_bits": lambda: affine and width % EMBEDDING_GROUP == 0,
        "head_bits": lambda: affine and not architecture.tied,
    }
    small: dict[str, int] = {}
    for key, can in able.items():
        if getattr(recipe, key) is not None:
            continue
        if not can():
            small[key] = 0
        elif key not in recipe.open_parts:
            small[key] = _tower_bits(recipe, checkpoint) if key == "vision_bits" else OUTSIDE_BITS
    return recipe.model_copy(update=small)


def _tower_bits(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Bits of a quantized vision tower where the recipe leaves them open.

    Fewer pay only where blocks of 256 hold most of it.
    """
    decoder = recipe.target_bpw or 0.0
    if recipe.gguf_type is not None:
        decoder = TYPES[MIXES[mix_named(recipe.gguf_type)]].bits_per_weight
    if recipe.block_types is None or decoder >= NATIVE_TOWER_BITS:
        return OUTSIDE_BITS
    shapes = (checkpoint.info(f"{name}.weight").shape for name in tower_linears(checkpoint))
    return NATIVE_TOWER_BITS if fits_blocks(shapes) else OUTSIDE_BITS


def kept_note(recipe: Recipe, name: str, model_type: str) -> list[str]:
    """What a format could hold smaller: were it not for another format of the run, or if asked."""
    if recipe.holds_outside or recipe.vision_bits:
        return []
    if name == "compressed-tensors" and (servers := with_towers(model_type)):
        return [
            f"the vision tower stays as it is; --vision-bits {OUTSIDE_BITS} makes it smaller,"
            f" for transformers and {servers} alone"
        ]
    if name not in HOLD_OUTSIDE:
        return []
    others = " and ".join(other for other in recipe.format if other not in HOLD_OUTSIDE)
    return [
        f"vision tower, embedding and output head stay as they are, because {others} cannot hold"
        f" them all quantized; without {others} they take {OUTSIDE_BITS} bits"
    ]


def _tower_can(recipe: Recipe, checkpoint: Checkpoint, data: CalibrationRows) -> bool:
    """Whether the vision tower has linears to quantize, and images to calibrate them on."""
    short = recipe.model_copy(update={"vision_bits": OUTSIDE_BITS}).quant_config().vision_short
    if recipe.tower_type_named or not tower_names(checkpoint, short=short):
        return False
    method = METHODS[recipe.method]
    if recipe.calibration is None or not method.solves:
        return True
    return any(row.images for row in data.taken)
