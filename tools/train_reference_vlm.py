"""Train a reference VLM on the CPU.

    python tools/train_reference_vlm.py OUT --arch qwen2_5_vl|qwen2_vl --minutes M [--resume] [--init weights.safetensors]
    python tools/train_reference_vlm.py OUT --arch llava_onevision --minutes M [--resume]

The Qwen architectures start from scratch, LLaVA-OneVision from the bundled model, which also teaches it. OUT/hf is the
model, a folder in the hub's layout; OUT/state.safetensors is what --resume continues from. Both are replaced every few
hundred steps and at the end. The bundled model took about four hours on two cores.
"""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

from tools.reference_vlm import onevision
from tools.reference_vlm.distillation import OneVisionTrainer
from tools.reference_vlm.make_data import Split, draw_row
from tools.reference_vlm.model import BUNDLED, load_tokenizer, save_model, train_tokenizer
from tools.reference_vlm.score import exact_match
from tools.reference_vlm.training import BaseTrainer, Settings, Trainer, tokenizer_texts

LOG_EVERY, SAVE_EVERY, SCORE_EVERY = 50, 200, 500  # steps
VALIDATION_SET = 1  # of the held-out split; set 0 is the bundled one, which no decision of training may see


class Arch(StrEnum):
    qwen2_5_vl = "qwen2_5_vl"
    qwen2_vl = "qwen2_vl"
    llava_onevision = "llava_onevision"


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the model (hf/) and the training state")],
    minutes: Annotated[float, typer.Option(help="Length of the whole schedule, earlier parts of it included")],
    arch: Annotated[Arch, typer.Option(help="Architecture")] = Arch.qwen2_5_vl,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the training in OUT")] = False,
    init: Annotated[Path | None, typer.Option(help="Start from these weights where they fit")] = None,
    start: Annotated[float, typer.Option(min=0, max=1, help="Begin this far into the schedule, with --init")] = 0.0,
    new_tokenizer: Annotated[bool, typer.Option("--new-tokenizer", help="Train a tokenizer too")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Train a reference VLM on drawn images."""
    torch.set_num_threads(threads)
    state = out / "state.safetensors"
    if state.exists() and not resume:
        raise typer.BadParameter(f"{state} exists already\n\nhint: --resume continues it", param_hint="OUT")
    if resume and not state.exists():
        raise typer.BadParameter(f"there is no {state} to continue", param_hint="--resume")

    distilled = arch is Arch.llava_onevision
    if distilled and (init or new_tokenizer):
        raise typer.BadParameter("llava_onevision starts from the bundled model and its tokenizer", param_hint="--arch")

    if distilled:
        onevision.write_tokenizer(out / "tokenizer")
    elif new_tokenizer and not resume:
        train_tokenizer(tokenizer_texts(), out / "tokenizer")
    tokenizer_dir = out / "tokenizer" if (out / "tokenizer").exists() else BUNDLED
    settings = Settings(arch.value, seed, batch_size, learning_rate)
    tokenizer = load_tokenizer(tokenizer_dir)
    trainer = OneVisionTrainer(settings, tokenizer) if distilled else Trainer(settings, tokenizer, init=init)
    if init:
        typer.echo("init: {} of {} tensors fit".format(*trainer.taken))
    if resume:
        trainer.load(state)
        typer.echo(f"resumed at step {trainer.step_count}, {trainer.seconds:.0f} s")

    def save() -> None:
        trainer.save(state)
        if distilled:
            onevision.save_model(trainer.model, out / "hf")
        else:
            save_model(trainer.model, out / "hf", tokenizer_dir=tokenizer_dir)

    out.mkdir(parents=True, exist_ok=True)
    losses = []
    while trainer.seconds < 60 * minutes:
        began = time.monotonic()
        progress = start + (1 - start) * trainer.seconds / (60 * minutes)
        losses.append(trainer.step(progress))
        trainer.seconds += time.monotonic() - began
        if trainer.step_count % LOG_EVERY == 0:
            answer, vision = (sum(part) / len(part) for part in zip(*losses))
            typer.echo(
                f"step {trainer.step_count}  loss {answer:.3f}  vision {vision:.3f}  "
                f"progress {progress:.2f}  {trainer.seconds:.0f} s"
            )
            losses = []
        if trainer.step_count % SAVE_EVERY == 0:
            save()
        if trainer.step_count % SCORE_EVERY == 0:
            report(trainer, 100)
    save()
    report(trainer, 500)


def report(trainer: BaseTrainer, rows: int) -> None:
    """Print the exact match per task on drawings that training does not use."""
    drawn = [draw_row(Split.heldout, VALIDATION_SET, row) for row in range(rows)]
    asked = [(task, (row.image, row.question), row.answer) for task, row in drawn]
    trainer.model.eval()
    scores = exact_match(trainer.model, trainer.tokenizer, asked)
    trainer.model.train()
    typer.echo("exact match  " + "  ".join(f"{task} {share:.3f}" for task, share in scores.items()))


if __name__ == "__main__":
    from transformers.utils import logging

    logging.disable_progress_bar()
    typer.run(main)
