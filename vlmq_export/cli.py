"""The command line: options only.

`vlmq-export MODEL …` exports; `verify`, `eval` and `inspect` look at what was written. The work is
done by the functions of `vlmq_export.api`.
"""

from __future__ import annotations

import difflib
import gc
import os
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from typer.core import TyperGroup

from vlmq_export._version import __version__
from vlmq_export.errors import CTRL_C, EXIT_CODES, NOT_PROVEN, PARITY_FAILED, UsageError, one_line
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import load_recipe
from vlmq_export.result import Result
from vlmq_export.terminal import options
from vlmq_export.terminal.help import Command
from vlmq_export.terminal.running import print_error, print_json, run, speaks
from vlmq_export.terminal.stopping import StopSignals

EXPORT = "export"
# Before torch and NumPy are imported: threads that spin are 10 times slower on a busy machine.
# OpenBLAS spins 2^26 cycles otherwise, and 2^4 is the least that it takes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


class ExportByDefault(TyperGroup):
    """`vlmq-export MODEL --format gguf` means `vlmq-export export MODEL --format gguf`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        own = {*self.commands, "--version", "--install-completion", "--show-completion"}
        if not args or args[0] not in own:
            self._refuse_misspelt(args)
            args = [EXPORT, *args]
        return super().parse_args(ctx, args)

    def _refuse_misspelt(self, args: list[str]) -> None:
        """Ends the command for a MODEL that is not there and reads like a command."""
        if not args or Path(args[0]).exists():
            return
        if close := difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75):
            said = f"{args[0]}: neither a model folder nor a command; did you mean {close[0]}?"
            print_error(one_line(said))
            raise typer.Exit(UsageError.exit_code)


class ExportCommand(Command):
    """`export`, which goes by the name of the whole."""

    shown_as = "vlmq-export"
    notes: ClassVar = {"Exit codes": {str(code): meaning for code, meaning in EXIT_CODES.items()}}


app = typer.Typer(
    cls=ExportByDefault,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vlmq-export {__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_version, is_eager=True)


@app.callback()
def _root(version: Annotated[bool, _VERSION] = False) -> None:
    """Quantize a vision-language model and export it, proven in each runtime."""


_AGAIN = "run the same command again"  # after a stop of `verify` or `eval`
_OTHERS = "Other commands: vlmq-export verify OUT, eval OUT, inspect FILE, each with -h."


@app.command(EXPORT, epilog=_OTHERS, cls=ExportCommand)
def export(
    model: options.Model = None,
    format: options.Format = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = None,
    sym: options.Sym = None,
    method: options.Method = None,
    rotate: options.Rotate = None,
    smooth: options.Smooth = None,
    head_bits: options.HeadBits = None,
    embedding_bits: options.EmbeddingBits = None,
    vision_bits: options.VisionBits = None,
    act_order: options.ActOrder = None,
    tune: options.Tune = None,
    calibration: options.CalibrationFile = None,
    image_root: options.ImageRoot = None,
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    long_images: options.LongImages = None,
    skip_bad_rows: options.SkipBadRows = None,
    seed: options.Seed = None,
    gptq_version: options.GptqVersion = None,
    gptq_names: options.GptqNames = None,
    accuracy_level: options.AccuracyLevel = None,
    onnx_graph: options.OnnxGraph = None,
    onnx_dtype: options.OnnxDtype = None,
    onnx_provider: options.OnnxProvider = None,
    gguf_type: options.GgufType = None,
    target_bpw: options.TargetBpw = None,
    target_size: options.TargetSize = None,
    tensor_type: options.TensorType = None,
    emit_imatrix: options.EmitImatrix = None,
    class_row: options.ClassRow = None,
    mmproj: options.Mmproj = None,
    split_max_size: options.SplitMaxSize = None,
    verify: options.Verify = None,
    verify_data: options.VerifyData = None,
    device: options.Device = None,
    max_memory: options.MaxMemory = None,
    recipe: options.RecipePath = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    push_to_hub: options.PushToHub = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Quantize MODEL and write it for each --format, then prove each file in its runtime."""
    flags = {k: v for k, v in locals().items() if k in Recipe.model_fields and v not in (None, [])}

    def job() -> int:
        asked = load_recipe(recipe, flags)
        _refuse_both(overwrite, resume)
        if dry_run:
            return _plan(asked, push_to_hub, as_json)
        return _export(asked, overwrite, resume, push_to_hub, as_json, quiet, verbose)

    run(job, as_json, quiet, verbose)


def _refuse_both(overwrite: bool, resume: bool) -> None:
    """Raises UsageError for a run that would replace the folder that it goes on with."""
    if overwrite and resume:
        raise UsageError("--overwrite and --resume exclude each other")


@app.command(cls=Command)
def verify(
    out: options.OutFolder,
    verify_data: options.VerifyDataAgain = None,
    image_root: options.ImageRootAgain = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Run the parity checks again on what was written.

    The exit code is 3 if a gate fails, and 4 if a runtime is missing.
    """

    def job() -> int:
        from vlmq_export import api
        from vlmq_export.terminal.progress import Stages

        with Stages(quiet) as stages, StopSignals(stages.doing, again=_AGAIN) as stopped:
            result = api.verify(
                out,
                verify_data=verify_data,
                image_root=image_root,
                progress=stages,
                should_stop=stopped,
            )
        return _present(result, as_json, verbose)

    run(job, as_json, quiet, verbose)


@app.command("eval", cls=Command)
def evaluate(
    out: options.OutFolder,
    task: options.Tasks = None,
    on: options.On = None,
    baseline: options.Baseline = False,
    data: options.DataFolder = None,
    limit: options.Limit = None,
    device: options.AskedOn = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Ask the files of a run the questions of benchmarks, each in its own runtime.

    lmms-eval asks and scores. Answers are kept, so that the same command goes on after a stop.
    """

    def job() -> int:
        from vlmq_export import api
        from vlmq_export.terminal.progress import Stages
        from vlmq_export.terminal.tables import print_scores

        with Stages(quiet) as stages, StopSignals(stages.doing, again=_AGAIN) as stopped:
            found = api.evaluate(
                out,
                task or [],
                on=on or [],
                baseline=baseline,
                data=data,
                limit=limit,
                device=device or "auto",
                progress=stages,
                should_stop=stopped,
            )
        print_json(found) if as_json else print_scores(found)
        return 0

    run(job, as_json, quiet, verbose)


@app.command(cls=Command)
def inspect(path: options.InspectPath, as_json: options.AsJson = False) -> None:
    """Show what an artifact or exported file holds: tensors, types, bits per weight, metadata."""

    def job() -> int:
        from vlmq_export import api
        from vlmq_export.terminal.tables import print_inspection

        found = api.inspect(path)
        print_json(found) if as_json else print_inspection(found)
        return 0

    run(job, as_json, False, 0)


def _plan(recipe: Recipe, push_to_hub: str | None, as_json: bool) -> int:
    from vlmq_export import api
    from vlmq_export.formats.model_plan import source_parts
    from vlmq_export.terminal.tables import print_plan, samples_of

    plan = api.plan(recipe, push_to_hub=push_to_hub)
    if as_json:
        print_json(
            {
                "model": plan.model.name,
                "source": source_parts(plan.model),
                "formats": plan.formats,
                "samples": samples_of(plan),
                "memory": plan.memory,
                "time": plan.time,
                "refused": plan.refusals,
                "not_provable": plan.not_provable,
            }
        )
    else:
        print_plan(plan)
    return UsageError.exit_code if plan.refusals else 0


def _export(
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    push_to_hub: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> int:
    from vlmq_export import api
    from vlmq_export.terminal.progress import Stages

    stages = Stages(quiet or not speaks())
    with stages, StopSignals(stages.doing, tells=speaks()) as stopped:
        result = api.export(
            recipe,
            overwrite=overwrite,
            resume=resume,
            push_to_hub=push_to_hub,
            progress=stages,
            should_stop=stopped,
        )
    if not speaks():
        return 0
    not_uploaded = push_to_hub is not None and not result.verified
    return _present(result, as_json, verbose) or int(not_uploaded)


def _present(result: Result, as_json: bool, verbose: int) -> int:
    """Print the outcome. Returns the exit code."""
    from vlmq_export.report.files import files_of
    from vlmq_export.terminal.result import print_result

    if as_json:
        names = result.plan.formats
        print_json(
            {
                "out": str(result.out),
                "formats": {name: str(result.out / name) for name in names},
                "files": {name: files_of(result.out / name) for name in names},
                "source_bytes": result.source_bytes,
                "seconds": result.seconds,
                "verified": None if result.parity is None else result.verified,
                "fidelity": result.fidelity,
                "parity": result.parity,
            }
        )
    else:
        print_result(result, every_check=verbose > 0)
    if result.parity is None or result.verified:
        return 0
    return PARITY_FAILED if result.parity.failures() else NOT_PROVEN


def main() -> None:
    """Entry point of the `vlmq-export` script."""
    try:
        app(prog_name="vlmq-export")
    except KeyboardInterrupt:  # before a command has begun, or after its end
        raise SystemExit(CTRL_C) from None
    finally:
        # The interpreter would look once more through all that torch and transformers made, which
        # takes seconds that someone waits for who has stopped the command.
        gc.freeze()
