"""The command line: options only. `vlmq-export MODEL …` exports; `verify` and `inspect` look at what was written."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmq_export import __version__
from vlmq_export.errors import CTRL_C, PARITY_FAILED, Interrupted, UsageError, VlmqError, one_line
from vlmq_export.recipe import (
    ActOrder,
    ClassRow,
    Device,
    FormatName,
    GptqNames,
    GptqVersion,
    Method,
    MmprojType,
    OnnxDtype,
    OnnxGraph,
    OnnxProvider,
    Recipe,
    Rotate,
    load_recipe,
)

EXPORT = "export"
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: threads that spin are 10 times slower on a busy machine


class ExportByDefault(TyperGroup):
    """`vlmq-export MODEL --format gguf` means `vlmq-export export MODEL --format gguf`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        own = {*self.commands, "--version", "--install-completion", "--show-completion"}
        if not args or args[0] not in own:
            args = [EXPORT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=ExportByDefault, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vlmq-export {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Quantize a vision-language model and export it, proven in each runtime."""


_JSON = typer.Option("--json", help="Result as JSON on stdout, log on stderr.")
_QUIET = typer.Option("--quiet", "-q", help="Errors only.")
_VERBOSE = typer.Option("--verbose", "-v", count=True, help="More log.")


# fmt: off
@app.command(EXPORT, epilog="Other commands: vlmq-export verify OUT, vlmq-export inspect FILE, each with --help.")
def export(
    model: Annotated[str | None, typer.Argument(help="Model folder, artifact folder or hub id. Default: the bundled reference VLM.", show_default=False)] = None,
    format: Annotated[list[FormatName] | None, typer.Option("--format", "-f", help="Repeat for several.", show_default=False)] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.  [default: 4]", show_default=False)] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns a scale; -1 for one an output channel.  [default: 128]", show_default=False)] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Grid without or with zero-points.  [default: asym; 8 bits: sym]", show_default=False)] = None,
    method: Annotated[Method | None, typer.Option(help="[default: vlmq]", show_default=False)] = None,
    rotate: Annotated[Rotate | None, typer.Option(help="Hadamard rotations: folded into the weights, or online too, which no format holds.  [default: off]", show_default=False)] = None,
    head_bits: Annotated[int | None, typer.Option(help="Quantize the output head too, to 2, 3, 4 or 8 bits; GPTQ files cannot hold it.  [default: as it is]", show_default=False)] = None,
    act_order: Annotated[ActOrder | None, typer.Option(help="Column order of the solver.  [default: gar]", show_default=False)] = None,
    calibration: Annotated[Path | None, typer.Option(help="LLaVA/ShareGPT4V JSON or messages JSONL.  [default: bundled]", show_default=False)] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths start from.  [default: the file's own]", show_default=False)] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration rows.  [default: 512]", show_default=False)] = None,
    seq_len: Annotated[int | None, typer.Option(help="Truncate samples; one whose image would be cut is dropped.  [default: the paper's, 512]", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the samples where the file has more rows.  [default: 0]", show_default=False)] = None,
    verify_data: Annotated[Path | None, typer.Option(help="Held-out rows for the parity checks.  [default: bundled]", show_default=False)] = None,
    verify: Annotated[bool | None, typer.Option("--verify/--no-verify", help="Prove the files in their runtimes.  [default: verify]", show_default=False)] = None,
    device: Annotated[Device | None, typer.Option(help="Where to quantize.  [default: auto]", show_default=False)] = None,
    max_memory: Annotated[float | None, typer.Option(help="GB of host memory to stay within.  [default: what is free]", show_default=False)] = None,
    gptq_version: Annotated[GptqVersion | None, typer.Option(help="How zero-points are stored.  [default: v1]", show_default=False)] = None,
    gptq_names: Annotated[GptqNames | None, typer.Option(help="Tensor names; module suits GPTQModel.load.  [default: hub]", show_default=False)] = None,
    accuracy_level: Annotated[int | None, typer.Option(help="MatMulNBits attribute: 0 exact, 4 int8 activations.  [default: 0]", show_default=False)] = None,
    onnx_graph: Annotated[OnnxGraph | None, typer.Option(help="ONNX Runtime's decoder operators, the same for one prompt at a time, or standard ones.  [default: fused]", show_default=False)] = None,
    onnx_dtype: Annotated[OnnxDtype | None, typer.Option(help="Activations, cache and float weights of ONNX.  [default: float32]", show_default=False)] = None,
    onnx_provider: Annotated[OnnxProvider | None, typer.Option(help="Where the ONNX package runs.  [default: cpu]", show_default=False)] = None,
    gguf_type: Annotated[str | None, typer.Option(help="Solve on llama.cpp's own types: Q2_K … Q6_K, Q4_K_M, Q8_0; GGUF only.", show_default=False)] = None,
    target_bpw: Annotated[float | None, typer.Option(help="Choose those types by measured cost, to this many bits per weight over all matrices.", show_default=False)] = None,
    tensor_type: Annotated[list[str] | None, typer.Option(help="REGEX=TYPE on GGUF tensor names, over the mix; repeat.", show_default=False)] = None,
    emit_imatrix: Annotated[bool | None, typer.Option("--emit-imatrix", help="Also write imatrix.gguf, from the calibration images, for stock llama-quantize.", show_default=False)] = None,
    class_row: Annotated[ClassRow | None, typer.Option(help="Where InternVL's GGUF has the class token's position: last for llama.cpp b11549, first as on the hub.  [default: last]", show_default=False)] = None,
    mmproj: Annotated[MmprojType | None, typer.Option(help="Type of GGUF vision weights.  [default: f16]", show_default=False)] = None,
    split_max_size: Annotated[str | None, typer.Option(help="Split the GGUF text model into files of this size, as 2G or 500M.  [default: one file]", show_default=False)] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with the same keys; flags win.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder.  [default: named after model and recipe]", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of ours.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; read headers only.")] = False,
    as_json: Annotated[bool, _JSON] = False,
    quiet: Annotated[bool, _QUIET] = False,
    verbose: Annotated[int, _VERBOSE] = 0,
) -> None:
    """Quantize MODEL and write it for each --format, then prove each file in its runtime.

    Exit codes: 0 fine, 1 failed, 2 usage, 3 a parity gate failed; 75 or, by Ctrl-C, 130 stopped but resumable.
    """
    flags = {k: v for k, v in locals().items() if k in Recipe.model_fields and v is not None and v != []}
    _run(lambda: _export(load_recipe(recipe, flags), overwrite, resume, dry_run, as_json, quiet), as_json, quiet, verbose)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="Output folder of an earlier run.")],
    verify_data: Annotated[Path | None, typer.Option(help="Held-out rows.  [default: those of the run]", show_default=False)] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths start from.", show_default=False)] = None,
    as_json: Annotated[bool, _JSON] = False,
    quiet: Annotated[bool, _QUIET] = False,
    verbose: Annotated[int, _VERBOSE] = 0,
) -> None:
    """Run the parity checks again on what was written; exit code 3 if a gate fails."""
    _run(lambda: _verify(out, verify_data, image_root, as_json, quiet), as_json, quiet, verbose)
# fmt: on


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact, an exported folder, or one of its files.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Show what is in an artifact or an exported file: tensors, types, bits per weight, metadata."""
    _run(lambda: _inspect(path, as_json), as_json, False, 0)


def _export(recipe: Recipe, overwrite: bool, resume: bool, dry_run: bool, as_json: bool, quiet: bool) -> int:
    from vlmq_export import pipeline, terminal

    if overwrite and resume:
        raise UsageError("--overwrite and --resume exclude each other")
    if dry_run:
        plan = pipeline.dry_run(recipe)
        if as_json:
            _print_json(
                {"model": plan.model.name, "formats": plan.formats, "memory": plan.memory, "refused": plan.refusals}
            )
        else:
            terminal.print_plan(plan)
        return UsageError.exit_code if plan.refusals else 0
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one speaks
    with terminal.Stages(quiet or not first) as stages, _StopSignals() as stopped:
        result = pipeline.run(recipe, overwrite=overwrite, resume=resume, hooks=pipeline.Hooks(stages, stopped))
    return _present(result, as_json) if first else 0


def _verify(out: Path, verify_data: Path | None, image_root: Path | None, as_json: bool, quiet: bool) -> int:
    from vlmq_export import pipeline, terminal

    with terminal.Stages(quiet) as stages, _StopSignals() as stopped:
        hooks = pipeline.Hooks(stages, stopped)
        result = pipeline.verify(out, verify_data=verify_data, image_root=image_root, hooks=hooks)
    return _present(result, as_json)


def _present(result, as_json: bool) -> int:
    from vlmq_export import terminal

    parity = result.parity
    failed = parity is not None and bool(parity.failures())
    if as_json:
        formats = {name: str(result.out / name) for name in result.plan.formats}
        _print_json({"out": str(result.out), "formats": formats, "seconds": result.seconds, "parity": parity})
    else:
        if parity is not None:
            terminal.print_parity(parity)
        verdict = "not verified" if parity is None else "verified" if parity.verified else "UNVERIFIED"
        terminal.out.print(
            f"{result.out}: {verdict}; report: {result.out / 'report.html'}", highlight=False, soft_wrap=True
        )
    return PARITY_FAILED if failed else 0


def _inspect(path: Path, as_json: bool) -> int:
    from vlmq_export import terminal
    from vlmq_export.inspection import inspect_path

    found = inspect_path(path)
    if as_json:
        _print_json(found)
    else:
        terminal.print_inspection(found)
    return 0


def _print_json(value: Any) -> None:
    def plain(x: Any) -> Any:
        return dataclasses.asdict(x) if dataclasses.is_dataclass(x) else str(x)

    json.dump(value, sys.stdout, indent=1, default=plain)
    sys.stdout.write("\n")


class _StopSignals:
    """SIGTERM and Ctrl-C ask for a stop after the layer in hand; a second one stops at once. Both leave a run to resume."""

    def __enter__(self) -> _StopSignals:
        self.number: int | None = None
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __call__(self) -> bool:
        return self.number is not None

    def _ask(self, number: int, _frame) -> None:
        again, self.number = self.number is not None, number
        if again:
            raise KeyboardInterrupt

    def __exit__(self, _kind, error, _trace) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted("stopped at once; continue with --resume")
        if isinstance(error, Interrupted):
            error.exit_code = CTRL_C if self.number == signal.SIGINT else Interrupted.exit_code
            raise error from None


def _run(job, as_json: bool, quiet: bool, verbose: int) -> None:
    """Call `job`, turn what a user can meet into one line and an exit code."""
    from vlmq_export import terminal

    terminal.set_up_logging(verbose, quiet or os.environ.get("RANK", "0") != "0")
    try:
        code = _in_memory(job)
    except (VlmqError, OSError) as e:
        code = getattr(e, "exit_code", VlmqError.exit_code)
        message = one_line(e if isinstance(e, VlmqError) else f"{e.filename or 'a file'}: {e.strerror or e}")
        if e.__cause__ is not None:
            logging.getLogger("vlmq_export").debug("where it came from", exc_info=e.__cause__)
        terminal.err.print(f"error: {message}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        if as_json:
            _print_json({"error": message, "exit_code": code})
    except KeyboardInterrupt:
        terminal.err.print("stopped; --resume continues", highlight=False)
        code = CTRL_C
    raise typer.Exit(code)


def _in_memory(job) -> int:
    """job(), where running out of memory is a stop that can be resumed. Whole layers on disk are kept."""
    try:
        return job()
    except MemoryError:
        where = "memory"
    except RuntimeError as e:
        if type(e).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            where = "GPU memory"
        elif "can't allocate memory" in str(e):  # torch's allocator on the CPU
            where = "memory"
        else:
            raise
    raise Interrupted(f"out of {where}; free some, lower --samples or --seq-len, or --resume on a larger machine")


def main() -> None:
    """Entry point of the `vlmq-export` script."""
    app(prog_name="vlmq-export")
