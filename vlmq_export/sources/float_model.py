"""MODEL is a float model: calibration samples are read, and its linears are quantized."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from vlmq_export.callbacks import Callbacks
from vlmq_export.formats.gguf.types.mix import mix_named, module_types
from vlmq_export.formats.model_plan import ModelPlan, model_plan, with_kinds
from vlmq_export.planning.mixed_widths import (
    chosen_widths,
    kinds_tried,
    planned_widths,
    spare_width_note,
)
from vlmq_export.planning.run_plan import (
    RunPlan,
    largest_group,
    memory_refusals,
    plan_memory,
    plan_run,
)
from vlmq_export.planning.run_time import Reading, plan_time, tell_time
from vlmq_export.planning.target_bpw import chosen_types, planned_types, spare_note
from vlmq_export.quantizer.arithmetic import pick_device
from vlmq_export.quantizer.config import GROUP_SIZES
from vlmq_export.quantizer.host import free_memory
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.rotation import rotated
from vlmq_export.quantizer.model.streamed import refuse_misfit
from vlmq_export.quantizer.run.memory_plan import MemoryPlan
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.run.resume import RUN
from vlmq_export.quantizer.samples.loading import count_samples
from vlmq_export.quantizer.samples.sample import Lengths
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.calibration import (
    Calibration,
    CalibrationRows,
    calibration_samples,
    limit_of,
)
from vlmq_export.sources.origin import Origin
from vlmq_export.sources.small_parts import kept_note, with_small_parts
from vlmq_export.sources.source import Filling, Source

log = logging.getLogger("vlmq_export")


class FloatModel(Source):
    """A checkpoint in the hub's layout."""

    def __init__(self, path: Path, origin: Origin, checkpoint: Checkpoint):
        super().__init__(path, origin)
        self.checkpoint = checkpoint

    @property
    def companions(self) -> list[Path]:
        return self.checkpoint.companions

    def label(self, recipe: Recipe) -> str:
        return recipe.label()

    def recipe_for(self, recipe: Recipe, data: CalibrationRows) -> Recipe:
        refuse_misfit(self.checkpoint)
        recipe = with_small_parts(recipe.with_native_types(), self.checkpoint, data)
        if recipe.group_size is not None or recipe.block_types is not None:
            return recipe
        model = model_plan(self.checkpoint, recipe.quant_config(), self.origin.name)
        return recipe.model_copy(update={"group_size": largest_group(model) or GROUP_SIZES[0]})

    def plan(self, recipe: Recipe) -> RunPlan:
        checkpoint = rotated(self.checkpoint, recipe.rotate, recipe.seed)
        model = model_plan(checkpoint, recipe.quant_config(), self.origin.name)
        if recipe.gguf_type is not None:
            mix = mix_named(recipe.gguf_type)
            model = with_kinds(model, module_types(model, mix, recipe.tensor_type), mix)
        elif recipe.types_by_cost:
            model = with_kinds(model, planned_types(model, recipe))
        elif recipe.widths_by_cost:
            model = with_kinds(model, planned_widths(model, recipe))
        return self._of_types(model, recipe)

    @staticmethod
    def _of_types(model: ModelPlan, recipe: Recipe) -> RunPlan:
        """The plan of a run on the types and widths that the model has by now."""
        plan = plan_run(model, recipe)
        spare = [*spare_note(model, recipe), *spare_width_note(model, recipe)]
        family = model.architecture.model_type
        for name, planned in plan.formats.items():
            kept = kept_note(recipe, name, family)
            planned.notes.extend([*(spare if not plan.refusals else []), *kept])
        return plan

    def foreseen(self, plan: RunPlan, recipe: Recipe, data: CalibrationRows) -> RunPlan:
        lengths, unusable = Lengths(()), ""
        if data.taken:
            limit = limit_of(recipe, self.checkpoint)
            lengths, unusable = count_samples(
                self.preprocessor, data.taken, limit, recipe.skip_bad_rows
            )
        free = free_memory(self.device(recipe), recipe.max_memory)
        memory = plan_memory(plan.model, lengths, *free)
        refused = memory_refusals(memory, recipe.max_memory)
        return replace(
            plan,
            lengths=lengths,
            memory=memory,
            unusable=[unusable] if unusable else [],
            too_large=refused,
        )

    def timed(self, plan: RunPlan, recipe: Recipe, data: CalibrationRows) -> RunPlan:
        reading = Reading(self.preprocessor, data.taken, limit_of(recipe, self.checkpoint))
        tried = kinds_tried(plan.model, recipe) if recipe.by_cost else {}
        return replace(plan, time=plan_time(plan, reading, self.device(recipe), tried))

    def device(self, recipe: Recipe) -> torch.device:
        return pick_device(recipe.device)

    def calibration(self, data: CalibrationRows, callbacks: Callbacks) -> Calibration:
        preprocessor = self.preprocessor if data.taken else None
        return calibration_samples(data, self.checkpoint, callbacks, preprocessor)

    def fill(self, folder: Path, filling: Filling) -> RunPlan:
        recipe, plan, ranks, callbacks = (
            filling.recipe,
            filling.plan,
            filling.ranks,
            filling.callbacks,
        )
        samples, planned = filling.calibration.samples, plan.memory
        assert planned is not None, "a float model's plan has a plan of memory"
        if recipe.by_cost:
            begun = folder / RUN if filling.resume else None
            model, given = plan.model, (samples, planned.host_free, ranks, begun)
            choice = model, recipe, self.checkpoint, *given, callbacks.progress
            with filling.timed("choose types"):
                chosen = chosen_types if recipe.types_by_cost else chosen_widths
                model = with_kinds(model, chosen(*choice))
            plan = replace(plan, model=model, formats=self._of_types(model, recipe).formats)
        own = Lengths.of(samples[:: ranks.size])  # of this rank: samples are shared out by length
        memory = plan_memory(plan.model, own, planned.host_free, planned.device_free)
        _tell_memory(memory)
        if ranks.first:
            tell_time(plan.model, own, self.device(recipe), memory.room)
        quantize(
            self.checkpoint,
            samples,
            plan.model.config,
            folder,
            name=plan.model.name,
            hub=(self.origin.repository, self.origin.revision),
            calibration=filling.calibration.described,
            device=recipe.device,
            resume=filling.resume,
            place=memory.place,
            room=memory.room,
            ranks=ranks,
            drop_images=True,
            progress=callbacks.progress,
            should_stop=callbacks.should_stop,
        )
        return plan


def _tell_memory(memory: MemoryPlan) -> None:
    """Log where activations rest, and warn where memory may not suffice."""
    places = {"device": "with the layer", "host": "in host memory", "disk": "on disk"}
    log.debug(
        "about %.1f GB of memory, activations of %.2f GB %s",
        memory.host / 1e9,
        memory.activations / 1e9,
        places[memory.place],
    )
    if not memory.fits:
        log.warning(
            "needs about %.1f GB of memory and %.1f GB on the GPU where %.1f and %.1f are free;"
            " it may be killed",
            memory.host / 1e9,
            memory.device / 1e9,
            memory.host_free / 1e9,
            memory.device_free / 1e9,
        )
