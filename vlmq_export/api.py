"""The command's verbs as Python functions. They print nothing; progress comes through a callback.

    from vlmq_export import Recipe, export, plan

    recipe = Recipe(model="path/to/model", format=["gguf"], bits=4, out="out")
    print(plan(recipe).formats["gguf"].size_bytes)
    result = export(recipe)
    assert result.verified

Every function raises a subclass of `VlmqError` for what a user can meet, with one line of message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from vlmq_export.callbacks import Callbacks, Progress
from vlmq_export.recipes.recipe import Recipe

if TYPE_CHECKING:
    from vlmq_export.formats.contract import Inspection
    from vlmq_export.planning.run_plan import RunPlan
    from vlmq_export.proving.scores import Evaluation
    from vlmq_export.result import Result


def _nothing(_stage: str, _done: int, _total: int) -> None:
    pass


def _never() -> bool:
    return False


def plan(recipe: Recipe, *, push_to_hub: str | None = None) -> RunPlan:
    """What `export` would do: sizes, memory, time and refusals.

    Of the model only headers are read. The rows are tokenized, and the headers of their images
    read; for the time three of them are read whole, and the machine is measured for two seconds.

    >>> from vlmq_export import Recipe, plan
    >>> planned = plan(Recipe(format=["gguf"], bits=4))
    >>> planned.refusals
    []
    >>> round(planned.formats["gguf"].bits_per_weight, 2)
    5.09

    push_to_hub: as of `export`. UsageError is raised where nothing could be uploaded.
    """
    from vlmq_export.pipeline import dry_run

    return dry_run(recipe, push_to_hub)


def export(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    push_to_hub: str | None = None,
    progress: Progress = _nothing,
    should_stop: Callable[[], bool] = _never,
) -> Result:
    """Quantize a model, write it in every format of the recipe, and prove each file.

    overwrite: replace an output folder that an earlier run wrote.
    resume: go on with a run that was stopped. It ends with the bytes of one that was not.
    push_to_hub: a repository, ORG/NAME, that the folder is uploaded to once it is verified, without
        `artifact/`. A new repository is private.
    progress: is called with a stage, its steps done and its steps in all.
    should_stop: is asked between steps. Once it says yes, `Interrupted` is raised, and the run can
        be resumed.

    A failed check does not raise: see `Result.verified` and `Result.parity`.
    """
    from vlmq_export.pipeline import run

    return run(
        recipe,
        overwrite=overwrite,
        resume=resume,
        push_to_hub=push_to_hub,
        callbacks=Callbacks(progress, should_stop),
    )


def verify(
    out: str | PathLike[str],
    *,
    verify_data: str | PathLike[str] | None = None,
    image_root: str | PathLike[str] | None = None,
    progress: Progress = _nothing,
    should_stop: Callable[[], bool] = _never,
) -> Result:
    """Prove again the files that an earlier run wrote into `out`.

    verify_data: held-out rows in place of those that the run used.
    image_root: the folder that image paths of these rows start from.
    """
    from vlmq_export.proving.verify import verify_folder

    return verify_folder(
        Path(out),
        None if verify_data is None else Path(verify_data),
        None if image_root is None else Path(image_root),
        Callbacks(progress, should_stop),
    )


def evaluate(
    out: str | PathLike[str],
    tasks: Sequence[str],
    *,
    on: Sequence[str] = (),
    baseline: bool = False,
    data: str | PathLike[str] | None = None,
    limit: int | None = None,
    device: str = "auto",
    progress: Progress = _nothing,
    should_stop: Callable[[], bool] = _never,
) -> Evaluation:
    """Ask the files of an earlier run the questions of benchmarks, and score the answers.

    tasks: `papers`, or lmms-eval's names: `chartqa`, `docvqa_val` and others (docs/evaluation.md).
    on: `artifact`, or formats; empty: every format of the run.
    baseline: ask the source in full precision too.
    data: a folder with a folder of rows for each benchmark; None: the hub.
    limit: questions of each benchmark; None: all.
    device: where source and artifact are run: `auto`, `cpu` or `cuda`.
    """
    from vlmq_export.evaluation.evaluate import evaluate_folder

    return evaluate_folder(
        Path(out),
        tasks,
        on=on,
        baseline=baseline,
        data=None if data is None else Path(data),
        limit=limit,
        device=device,
        callbacks=Callbacks(progress, should_stop),
    )


def inspect(path: str | PathLike[str]) -> Inspection:
    """What is in an artifact, in an exported folder, or in one of its files."""
    from vlmq_export.inspection import inspect_path

    return inspect_path(Path(path))
