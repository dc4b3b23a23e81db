"""What of the proof cannot run on this machine, known before anything is quantized."""

from __future__ import annotations

from vlmq_export.formats.contract import FORMATS
from vlmq_export.formats.model_plan import ModelPlan
from vlmq_export.formats.proof.reference import too_large
from vlmq_export.quantizer.arithmetic import pick_device
from vlmq_export.quantizer.host import free_memory
from vlmq_export.recipes.recipe import Recipe


def not_provable(recipe: Recipe, model: ModelPlan) -> dict[str, str]:
    """Format → why its files would be written and not proven; empty where nothing stands against.

    A recipe that asks for no proof misses none.
    """
    if not recipe.verify:
        return {}
    memory, _ = free_memory(pick_device("cpu"), recipe.max_memory)
    weights = sum(x.out_features * x.in_features for x in model.linears)
    weights += sum(t.numel for t in model.floats)
    whole = too_large(weights, memory)
    found: dict[str, str] = {}
    for name in recipe.format:
        if lacking := FORMATS[name].missing():
            found[name] = f"{lacking} not installed; pip install 'vlmq-export[{name}]'"
        elif whole:
            found[name] = whole
    return found
