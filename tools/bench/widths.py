"""Mixed widths against one width for all linears, at the same number of bits.

    python -m tools.bench.widths
    python -m tools.bench.widths --reference llava_onevision --samples 64 --rows 64

A uniform grid takes so many bits per weight as GPTQ stores them. The mixed one of its row has at
most as many, chosen among 2, 3, 4 and 8 bits in groups of 128. Both are solved by the same method
on the same samples. KL is that at the answer tokens of held-out rows.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tools.bench.quality import REFERENCES
from tools.bench.scoring import batches, load_model, source_weights
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.planning.mixed_widths import by_linear, costs_of
from vlmq_export.quantizer.calibration.divergence import distance_of
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.type_budget.knapsack import choose
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.locate import open_source

# Bits and group_size of the uniform grids.
GRIDS = {"W2 g64": (2, 64), "W2 g32": (2, 32), "W3 g128": (3, 128), "W4 g128": (4, 128)}


@torch.no_grad()
def answers(model: Any, samples: list[Sample]) -> torch.Tensor:
    """Log-probabilities at the answer tokens, [tokens, vocabulary]."""
    found = []
    for part, inputs in batches(samples):
        log_p = model(**inputs, use_cache=False).logits.float().log_softmax(-1)
        found += [row[:-1][samples[i].answer[1:]] for i, row in zip(part, log_p)]
    return torch.cat(found)


def rows_of(
    reference: str, grids: list[str], samples: int, rows: int, symmetric: bool
) -> Iterator[list[str]]:
    """The rows of a reference's table: grid, bits, KL of both in thousandths, widths."""
    folder = REFERENCES[reference]
    preprocessor = Preprocessor(folder)
    read = [preprocessor.sample(row) for row in read_rows(CALIBRATION)[:samples]]
    held = [preprocessor.sample(row) for row in read_rows(HELDOUT)[:rows]]
    full = answers(load_model(folder, source_weights(folder)), held)
    given = {"gptq_names": "module", "group_size": 128, "target_bpw": 8}
    recipe = Recipe(model=str(folder), format=["gptq"], sym=symmetric, **given)
    model = open_source(recipe.model).plan(recipe).model
    costs = costs_of(model, recipe, Checkpoint(folder), read, 10**10, lambda *_: None)
    weights = {x.name: x.numel for x in model.linears}
    every = sum(weights.values())

    def kl(config: QuantConfig) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            given = {"name": "reference", "calibration": {}, "device": "cpu"}
            quantize(Checkpoint(folder), read, config, Path(scratch) / "artifact", **given)
            found = load_model(folder, Weights(Path(scratch) / "artifact").items())
            return float(distance_of(full, answers(found, held)).kl.mean())

    for grid in grids:
        bits, group = GRIDS[grid]
        uniform = replace(model.config, bits=bits, group_size=group, widths={})
        budget = bits + (16 + bits) / group
        # g_idx, which is the same for all grids, is a little more.
        stored = sum(kinds[2][0] for kinds in costs.values()) - every * (2 + 18 / 128)
        chosen = choose(costs, int(budget * every + stored))
        taken = (sum(costs[g][w][0] for g, w in chosen.items()) - stored) / every
        widths = by_linear(chosen)
        counts = ", ".join(f"{n} × {w}" for w, n in sorted(Counter(widths.values()).items()))
        figures = [1e3 * kl(uniform), 1e3 * kl(replace(model.config, widths=widths))]
        told = [f"{value:.2g}".removeprefix("0") for value in figures]
        yield [f"{budget:.3f}, {grid}", told[0], f"{taken:.3f}", told[1], counts]


def main(
    reference: Annotated[str, typer.Option(help=f"One of {', '.join(REFERENCES)}.")] = "qwen2_5_vl",
    samples: int = 128,
    rows: int = 128,
    sym: bool = False,
    grids: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(GRIDS),
) -> None:
    """Print a reference's table, row after row."""
    logging.disable(logging.WARNING)
    head = ["bits per weight, uniform grid", "its KL", "mixed, bits per weight", "KL", "widths"]
    for line in (head, ["---"] * len(head)):
        print(f"| {' | '.join(line)} |")
    for line in rows_of(reference, grids.split(","), samples, rows, sym):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
