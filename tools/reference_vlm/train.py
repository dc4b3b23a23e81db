"""Train a reference VLM on the CPU.

    python tools/reference_vlm/train.py OUT --arch qwen2_5_vl --minutes M [--resume]
    python tools/reference_vlm/train.py OUT --arch qwen2_vl --minutes M --init weights.safetensors
    python tools/reference_vlm/train.py OUT --arch llava_onevision --minutes M [--resume]
    python tools/reference_vlm/train.py OUT --arch smolvlm --minutes M [--resume]

The Qwen architectures start from scratch, or from the weights that --init names. LLaVA-OneVision
starts from the bundled model, which also teaches it. SmolVLM trains a tower before a language model
that stays as it is. OUT/hf is the model, a folder in the hub's layout (SmolVLM's is
OUT/trained.safetensors, the part that was trained); OUT/state.safetensors is what --resume
continues from. Both are replaced every few hundred steps and at the end. The training of the
bundled model took about four hours on two cores.
"""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from tools.reference_vlm import onevision, smolvlm
from tools.reference_vlm.distillation import OneVisionTrainer
from tools.reference_vlm.make_data import Split, draw_row
from tools.reference_vlm.model import BUNDLED, load_tokenizer, save_model, train_tokenizer
from tools.reference_vlm.score import exact_match
from tools.reference_vlm.smolvlm_training import SmolVLMTrainer
from tools.reference_vlm.training import BaseTrainer, Settings, Trainer, tokenizer_texts

LOG_EVERY, SAVE_EVERY, SCORE_EVERY = 50, 200, 500  # steps
# A set of the held-out split. Set 0 is the bundled one, which no decision of training may see.
VALIDATION_SET = 1
STATE = "state.safetensors"


class Arch(StrEnum):
    """What may be trained."""

    qwen2_5_vl = "qwen2_5_vl"
    qwen2_vl = "qwen2_vl"
    llava_onevision = "llava_onevision"
    smolvlm = "smolvlm"


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the model (hf/) and the training state")],
    minutes: Annotated[
        float, typer.Option(help="Length of the whole schedule, earlier parts of it included")
    ],
    arch: Annotated[Arch, typer.Option(help="Architecture")] = Arch.qwen2_5_vl,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the training in OUT")] = False,
    init: Annotated[
        Path | None, typer.Option(help="Start from these weights where they fit")
    ] = None,
    start: Annotated[
        float, typer.Option(min=0, max=1, help="Begin this far into the schedule, with --init")
    ] = 0.0,
    new_tokenizer: Annotated[
        bool, typer.Option("--new-tokenizer", help="Train a tokenizer too")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Train a reference VLM on drawn images."""
    torch.set_num_threads(threads)
    _check(out, resume)
    started = arch in (Arch.llava_onevision, Arch.smolvlm)
    if started and (init or new_tokenizer):
        raise typer.BadParameter(
            f"{arch} has its own weights and tokenizer to start from", param_hint="--arch"
        )
    if arch is Arch.llava_onevision:
        onevision.write_tokenizer(out / "tokenizer")
    elif new_tokenizer and not resume:
        train_tokenizer(tokenizer_texts(), out / "tokenizer")
    tokenizer = load_tokenizer(_tokenizer_dir(out))
    settings = Settings(arch.value, seed, batch_size, learning_rate)
    trainer = _trainer(settings, tokenizer, init)
    if resume:
        trainer.load(out / STATE)
        typer.echo(f"resumed at step {trainer.step_count}, {trainer.seconds:.0f} s")
    train(trainer, out, minutes, start)


def _trainer(settings: Settings, tokenizer, init: Path | None) -> BaseTrainer:
    """The trainer of an architecture; the Qwen architectures take the weights of `init`."""
    if settings.arch == Arch.llava_onevision:
        return OneVisionTrainer(settings, tokenizer)
    if settings.arch == Arch.smolvlm:
        return SmolVLMTrainer(settings)
    trainer = Trainer(settings, tokenizer, init=init)
    if trainer.taken:
        typer.echo("init: {} of {} tensors fit".format(*trainer.taken))
    return trainer


def _check(out: Path, resume: bool) -> None:
    """Raise BadParameter where there is a state already, or none to continue."""
    state = out / STATE
    if state.exists() and not resume:
        raise typer.BadParameter(
            f"{state} exists already\n\nhint: --resume continues it", param_hint="OUT"
        )
    if resume and not state.exists():
        raise typer.BadParameter(f"there is no {state} to continue", param_hint="--resume")


def _tokenizer_dir(out: Path) -> Path:
    """The folder of a tokenizer that was made for this training, or the bundled one."""
    own = out / "tokenizer"
    return own if own.exists() else BUNDLED


def train(trainer: BaseTrainer, out: Path, minutes: float, start: float) -> None:
    """Take steps until the training has had `minutes`, and save and score on the way.

    start: where in the schedule the training begins, from 0 to 1.
    """
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
            save(trainer, out)
        if trainer.step_count % SCORE_EVERY == 0:
            report(trainer, 100)
    save(trainer, out)
    report(trainer, 500)


def save(trainer: BaseTrainer, out: Path) -> None:
    """Replace the state and the model in `out`."""
    trainer.save(out / STATE)
    if isinstance(trainer, SmolVLMTrainer):
        trainer.write_trained(out / smolvlm.TRAINED.name)
    elif isinstance(trainer, OneVisionTrainer):
        onevision.save_model(trainer.model, out / "hf")
    else:
        save_model(trainer.model, out / "hf", tokenizer_dir=_tokenizer_dir(out))


def report(trainer: BaseTrainer, rows: int) -> None:
    """Print the exact match per task on drawings that training does not use."""
    drawn = [draw_row(Split.heldout, VALIDATION_SET, row) for row in range(rows)]
    if isinstance(trainer, SmolVLMTrainer):
        scores = trainer.exact_match(drawn)
    else:
        asked = [(task, (row.image, row.question), row.answer) for task, row in drawn]
        trainer.model.eval()
        scores = exact_match(trainer.model, trainer.tokenizer, asked)
        trainer.model.train()
    typer.echo("exact match  " + "  ".join(f"{task} {share:.3f}" for task, share in scores.items()))


if __name__ == "__main__":
    from transformers.utils import logging

    logging.disable_progress_bar()
    typer.run(main)
