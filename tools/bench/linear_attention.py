"""8 bits for what enters the linear attentions of Qwen3.5, and the same bits spent otherwise.

    python -m tools.bench.linear_attention train OUT --minutes 40
    python -m tools.bench.linear_attention measure OUT
    python -m tools.bench.linear_attention measure OUT --first 128 --grids 2,3     # other samples

`train` makes a small Qwen3.5 of four layers, three of them with a gated delta net, as published. It
answers the reference VLM's drawn questions, which it is told in words instead of shown: its tower
has random weights and sees nothing.

Each row of `measure` is one model: all linears at a common width in groups of 128, but for those
that it names. `by cost` has the widths that `--target-bpw` chooses for as many bits as the row
above it takes, and `next width` is the next larger common width. KL is that at the answer tokens of
held-out rows, in thousandths of a nat. The first table has what a width of each kind of linear
costs by itself for a million weights, which is what `--target-bpw` chooses by.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from numpy.random import RandomState

from tools.bench.scoring import Scorer, load_model, source_weights
from tools.bench.widths import answers
from tools.reference_vlm import drawing
from tools.reference_vlm.make_data import Split, draw_row
from tools.reference_vlm.model import load_tokenizer, make_config, make_model, padded, save_model
from tools.reference_vlm.training import TRAINING_SEED, decay_groups
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.planning.mixed_widths import by_linear, costs_of
from vlmq_export.quantizer.calibration.divergence import distance_of
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.type_budget.knapsack import choose
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.locate import open_source

app = typer.Typer(add_completion=False)
ROWS = 512  # of each split of the data
LEARNING_RATE, WARM_UP = 2e-3, 50
GROUP = 128
NEXT = {2: 3, 3: 4, 4: 8}
# Kind of a linear → parts of the names of such linears.
KINDS = {
    "linear attention, in": ("linear_attn.in_proj",),
    "linear attention, out": ("linear_attn.out_proj",),
    "attention, q k v": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention, out": ("self_attn.o_proj",),
    "gate, up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# Name of a row → the kind of linears that have 8 bits there.
RAISED = {
    "linear attention's inputs at 8": "linear attention, in",
    "its output at 8": "linear attention, out",
    "gate, up at 8": "gate, up",
}

# --- the model ------------------------------------------------------------------------------------


def told(task: str, shown: drawing.Drawing) -> str:
    """What a drawing shows, in words, and the question about it.

    Characters that follow each other are one word, and a bar has the height of its top.
    """
    words: list[str] = []
    for name, _, y in shown.labels:
        if words and len(name) == 1 and (words[-1].isupper() or words[-1].isdigit()):
            words[-1] += name
        else:
            words.append(f"{name} {int(y) // 8}" if task == "bars" else name)
    return f"{' '.join(words)}\n{shown.question}"


@app.command()
def train(
    out: Path, minutes: float = 40, batch_size: int = 32, seed: int = 0, threads: int = 1
) -> None:
    """Write a small trained Qwen3.5 to OUT/hf, and its rows beside it."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    for split in Split:
        _write_rows(out / f"{split.value}.json", split)
    tokenizer = load_tokenizer()
    model = make_model(make_config("qwen3_5", tokenizer, layers=4)).train()
    model.model.visual.requires_grad_(False)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decay_groups(moving, 0.05), betas=(0.9, 0.98))
    began, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * max(0.02, 1 - progress)
        loss = model(**_batch(tokenizer, RandomState([TRAINING_SEED, seed, step]), batch_size)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}  progress {progress:.2f}", flush=True)
        step, progress = step + 1, (time.monotonic() - began) / (60 * minutes)
    save_model(model, out / "hf")
    rows = read_rows(out / "heldout.json")[:128]
    model = load_model(out / "hf", source_weights(out / "hf"))
    score = Scorer(out / "hf", model, rows).baseline
    print(f"{step} steps, exact match {score.exact:.3f}", flush=True)


def _batch(tokenizer, rng: RandomState, size: int) -> dict[str, torch.Tensor]:
    """The inputs of some training questions."""
    prompts, said = [], []
    for _ in range(size):
        task = drawing.pick_task(rng)
        shown = drawing.TASKS[task](rng, *drawing.pick(rng, drawing.SIZES))
        prompts.append(f"<|im_start|>user\n{told(task, shown)}<|im_end|>\n<|im_start|>assistant\n")
        said.append(f"{shown.answer}<|im_end|>\n")
    return padded(tokenizer, prompts, said)


def _write_rows(path: Path, split: Split) -> None:
    """Rows without images, of the drawings that the bundled rows show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(ROWS):
        task, shown = draw_row(split, 0, number)
        turns = [("human", told(task, shown)), ("gpt", shown.answer)]
        spoken = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": f"{split.value}-{number}", "task": task, "conversations": spoken})
    path.write_text(json.dumps(records, indent=1) + "\n")


# --- the measurement ------------------------------------------------------------------------------


class Bench:
    """A model, its samples and held-out rows, and what its widths cost."""

    def __init__(self, out: Path, first: int, samples: int, rows: int):
        self.folder = out / "hf"
        preprocessor, read = Preprocessor(self.folder), read_rows(out / "calibration.json")
        self.samples = [preprocessor.sample(row) for row in read[first : first + samples]]
        held = read_rows(out / "heldout.json")[:rows]
        self.held = [preprocessor.sample(row) for row in held]
        self.full = answers(load_model(self.folder, source_weights(self.folder)), self.held)
        recipe = Recipe(
            model=str(self.folder),
            format=["gptq"],
            gptq_names="module",
            group_size=GROUP,
            target_bpw=8,
        )
        self.model = open_source(recipe.model).plan(recipe).model
        checkpoint = Checkpoint(self.folder)
        self.costs = costs_of(self.model, recipe, checkpoint, self.samples, 10**10, lambda *_: None)
        self.sizes = {linear.name: linear.numel for linear in self.model.linears}

    def bits(self, widths: dict[str, int]) -> float:
        """Bits per weight, with scales and zero-points."""
        stored = sum(self.sizes[name] * (w + (16 + w) / GROUP) for name, w in widths.items())
        return stored / sum(self.sizes.values())

    def kl(self, widths: dict[str, int]) -> float:
        """KL at the answer tokens, in thousandths of a nat."""
        config: QuantConfig = replace(self.model.config, widths=widths)
        with tempfile.TemporaryDirectory() as scratch:
            given = {"name": "qwen3_5", "calibration": {}, "device": "cpu"}
            checkpoint, out = Checkpoint(self.folder), Path(scratch) / "artifact"
            quantize(checkpoint, self.samples, config, out, **given)
            found = answers(load_model(self.folder, Weights(out).items()), self.held)
        return 1e3 * float(distance_of(self.full, found).kl.mean())

    def by_cost(self, bits: float) -> dict[str, int]:
        """The widths that are measured to cost least at so many bits per weight."""
        weights = sum(self.sizes.values())
        # The costs' bits have what GPTQ stores for each input column, the same for all widths.
        smallest = self.bits(dict.fromkeys(self.sizes, 2)) * weights
        beside = sum(kinds[2][0] for kinds in self.costs.values()) - smallest
        return by_linear(choose(self.costs, int(bits * weights + beside)))

    def rows(self, width: int) -> Iterator[tuple[str, dict[str, int]]]:
        """Name and widths of each row of a common width."""
        yield "common width", dict.fromkeys(self.sizes, width)
        for name, kind in RAISED.items():
            raised = {x: 8 if _kind(x) == kind else width for x in self.sizes}
            yield name, raised
            yield "by cost, as many bits", self.by_cost(self.bits(raised))
        yield "next width", dict.fromkeys(self.sizes, NEXT[width])

    def sensitivity(self) -> Iterator[list[str]]:
        """What each width of each kind of linear costs, for a million weights."""
        cost: dict[str, dict[int, float]] = {kind: defaultdict(float) for kind in KINDS}
        numel: dict[str, int] = defaultdict(int)
        for group, widths in self.costs.items():
            kind = _kind(group[0])
            numel[kind] += sum(self.sizes[name] for name in group)
            for width, (_, found) in widths.items():
                cost[kind][width] += found
        for kind, found in cost.items():
            share = numel[kind] / sum(self.sizes.values())
            each = [f"{1e9 * found[w] / numel[kind]:.3g}" for w in (2, 3, 4, 8)]
            yield [kind, f"{share:.0%}", *each]


def _kind(name: str) -> str:
    return next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))


@app.command()
def measure(
    out: Path,
    first: Annotated[int, typer.Option(help="The first calibration row")] = 0,
    samples: int = 128,
    rows: int = 256,
    grids: Annotated[str, typer.Option(help="Common widths, comma-separated")] = "2,3,4",
) -> None:
    """Print both tables of a model that `train` made."""
    logging.disable(logging.WARNING)
    bench = Bench(out, first, samples, rows)
    _print(["kind", "share of the weights", *(f"{w} bits" for w in (2, 3, 4, 8))], head=True)
    for line in bench.sensitivity():
        _print(line)
    for width in map(int, grids.split(",")):
        _print([f"W{width} g{GROUP}", "bits per weight", "KL"], head=True)
        for name, widths in bench.rows(width):
            _print([name, f"{bench.bits(widths):.3f}", f"{bench.kl(widths):.3g}"])


def _print(cells: list[str], head: bool = False) -> None:
    print(f"{chr(10) if head else ''}| {' | '.join(cells)} |", flush=True)
    if head:
        print(f"|{'---|' * len(cells)}", flush=True)


if __name__ == "__main__":
    app()
