"""What every source can do, whatever MODEL is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import UsageError
from vlmq_export.planning.run_plan import RunPlan
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.storage.untrusted import read_json
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.calibration import Calibration, CalibrationRows
from vlmq_export.sources.origin import Origin


@dataclass(frozen=True)
class Filling:
    """How an artifact folder is filled."""

    recipe: Recipe
    plan: RunPlan
    calibration: Calibration
    ranks: Ranks
    resume: bool
    callbacks: Callbacks
    timed: Callable[[str], AbstractContextManager]  # counts the seconds of a stage


class Source(ABC):
    """A folder that an artifact can be made from."""

    def __init__(self, path: Path, origin: Origin):
        self.path = path
        self.origin = origin

    # -- what it is ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def companions(self) -> list[Path]:
        """Tokenizer and processor files."""

    @property
    def processor(self) -> Path:
        """The folder whose tokenizer and image processor the proof uses."""
        return self.path

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """That of the folder `processor`, which is read once.

        Raises CheckpointError for files that are missing or damaged.
        """
        return Preprocessor(self.processor)

    @property
    def floats(self) -> Path | None:
        """The folder of the source's own float weights, for the proof; None where there is none."""
        return self.path

    def label(self, recipe: Recipe) -> str:
        """The end of the output folder's name."""
        return "export"

    # -- what a run may do with it -------------------------------------------------------------

    @abstractmethod
    def recipe_for(self, recipe: Recipe, data: CalibrationRows) -> Recipe:
        """The recipe with the grid that the source has already, if it has one.

        data: the rows that it calibrates on, which are read only where a default depends on them.
        Raises UsageError for a flag that asks for another grid: it must not be ignored.
        """

    @abstractmethod
    def plan(self, recipe: Recipe) -> RunPlan:
        """What a run would do, from headers alone. Refusals are in the plan."""

    def foreseen(self, plan: RunPlan, recipe: Recipe, data: CalibrationRows) -> RunPlan:
        """The plan, with the memory of a run on these rows; as it is if nothing is quantized."""
        return plan

    def timed(self, plan: RunPlan, recipe: Recipe, data: CalibrationRows) -> RunPlan:
        """The plan, with the time of a run on these rows; as it is if nothing is quantized."""
        return plan

    def check_settings(self, *, verify: bool) -> None:
        """Read what would otherwise be missed after all the work.

        Raises CheckpointError for settings that are damaged, CalibrationError for a processor that
        cannot be used.
        """
        for file in self.companions:
            if file.suffix == ".json":
                read_json(file)  # every writer reads some of them
        if verify:
            _ = self.preprocessor

    def device(self, recipe: Recipe) -> torch.device:
        """Where the artifact is made. Raises UsageError for a device that is not there."""
        return torch.device("cpu")

    def calibration(self, data: CalibrationRows, callbacks: Callbacks) -> Calibration:
        """The samples that the recipe asks for; none where the integers are there already."""
        return Calibration()

    @abstractmethod
    def fill(self, folder: Path, filling: Filling) -> RunPlan:
        """Make the artifact in `folder`. Every rank calls it, and the first one writes.

        Returns the plan, with whatever was decided on the way.
        """


def fixed_grid(recipe: Recipe, config: QuantConfig, what: str) -> Recipe:
    """The recipe with the grid of integers that are there already, in `what`.

    Raises UsageError for a flag that asks for another grid.
    """
    fixed: dict[str, Any] = {
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.symmetric,
        "act_order": config.act_order,
        "rotate": config.rotate,
        "smooth": config.smooth,
        "tune": config.tune,
        "head_bits": config.head_bits,
        "embedding_bits": config.embedding_bits,
        "vision_bits": config.vision_bits,
    }
    for key, value in fixed.items():
        if key in recipe.model_fields_set and getattr(recipe, key) not in (None, value):
            flag = "--" + key.replace("_", "-")
            has = value if value or isinstance(value, bool) else "none"
            raise UsageError(
                f"{flag} {getattr(recipe, key)}: the {what} has {has} already;"
                " quantize the float model again"
            )
    return recipe.model_copy(update=fixed | {"method": config.method, "seed": config.seed})
