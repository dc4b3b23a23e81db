"""MODEL is a GPTQ checkpoint that others made: its integers are taken over as they are."""

from __future__ import annotations

from pathlib import Path

from vlmq_export.errors import UsageError
from vlmq_export.formats.gptq.imports.checkpoint import GptqCheckpoint, write_artifact
from vlmq_export.formats.model_plan import model_plan
from vlmq_export.output.folder import publish
from vlmq_export.planning.run_plan import RunPlan, plan_run
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.origin import Origin
from vlmq_export.sources.source import Filling, Source, fixed_grid


class GptqModel(Source):
    """A checkpoint of AutoGPTQ, GPTQModel or llm-compressor (docs/import.md)."""

    def __init__(self, path: Path, origin: Origin, checkpoint: GptqCheckpoint):
        super().__init__(path, origin)
        self.checkpoint = checkpoint

    @property
    def companions(self) -> list[Path]:
        return self.checkpoint.companions

    def recipe_for(self, recipe: Recipe, data: CalibrationRows) -> Recipe:
        if asked := recipe.block_types or recipe.by_cost:
            raise UsageError(
                f"{asked}: the checkpoint has its integers already; quantize the float model again"
            )
        return fixed_grid(recipe, self.checkpoint.quant_config, "checkpoint")

    def plan(self, recipe: Recipe) -> RunPlan:
        model = model_plan(self.checkpoint, recipe.quant_config(), self.origin.name)
        return plan_run(model, recipe)

    def fill(self, folder: Path, filling: Filling) -> RunPlan:
        if filling.ranks.first and not folder.exists():
            made = self.origin
            publish(
                folder,
                lambda place: write_artifact(
                    self.checkpoint,
                    place,
                    made.name,
                    repository=made.repository,
                    revision=made.revision,
                ),
            )
        return filling.plan
