"""MODEL is an artifact of ours: its integers are exported as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

from vlmq_export.errors import UsageError
from vlmq_export.formats.gguf.types.mix import mix_named
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.output.folder import publish
from vlmq_export.planning.run_plan import RunPlan, plan_run
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.origin import Origin
from vlmq_export.sources.source import Filling, Source, fixed_grid


class SavedArtifact(Source):
    """An artifact folder, perhaps made on another machine."""

    def __init__(self, path: Path, artifact: Artifact):
        manifest = artifact.manifest
        super().__init__(path, Origin(manifest.name, manifest.repository, manifest.revision))
        self.artifact = artifact

    @property
    def companions(self) -> list[Path]:
        return self.artifact.companions

    @property
    def processor(self) -> Path:
        return self.artifact.source

    @property
    def floats(self) -> Path | None:
        return None

    def recipe_for(self, recipe: Recipe, data: CalibrationRows) -> Recipe:
        config = self.artifact.config
        mix, asked = config.gguf_type, recipe.gguf_type
        types = bool(config.types) and not mix  # chosen by cost
        other = asked is not None and mix_named(asked) != mix
        other = other or (recipe.types_by_cost and not types)
        if other or (recipe.widths_by_cost and not config.widths):
            has = "types by cost" if types else f"{config.bits} bits"
            has = mix or ("mixed widths" if config.widths else has)
            raise UsageError(
                f"{recipe.block_types or recipe.by_cost}: the artifact has {has} already;"
                " quantize the model again"
            )
        return fixed_grid(recipe.model_copy(update={"gguf_type": mix or None}), config, "artifact")

    def plan(self, recipe: Recipe) -> RunPlan:
        return plan_run(artifact_plan(self.artifact), recipe)

    def fill(self, folder: Path, filling: Filling) -> RunPlan:
        if filling.ranks.first and not folder.exists():
            publish(
                folder,
                lambda place: shutil.copytree(self.artifact.path, place, dirs_exist_ok=True),
            )
        return filling.plan
