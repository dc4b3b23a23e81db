"""Draw the bundled calibration and held-out sets, or further calibration sets disjoint from them.

    python -m tools.reference_vlm.make_data --out DIR --split calibration|heldout --rows N --set K

Every row has a random generator of its own, seeded by (split, set, row). The same arguments
therefore give the same bytes, and a longer set begins with the rows of a shorter one. Set 0 is what
the package bundles. Rows are in the LLaVA/ShareGPT4V layout, with image paths relative to DIR.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from numpy.random import RandomState

from tools.reference_vlm.drawing import (
    HELDOUT_DIGITS,
    SIZES,
    TASKS,
    TRAINING_DIGITS,
    Drawing,
    pick,
    pick_task,
)


class Split(StrEnum):
    """What a row is for."""

    calibration = "calibration"
    heldout = "heldout"


_SPLIT_SEEDS = {Split.calibration: 1, Split.heldout: 2}  # 3 is the seed of training's drawings


def draw_row(split: Split, number: int, row: int) -> tuple[str, Drawing]:
    """Row `row` of set `number`: its task and drawing.

    The held-out rows ask the five tasks in turn, and show handwriting that training never saw.
    Calibration asks as training does.
    """
    rng = RandomState([_SPLIT_SEEDS[split], number, row])
    heldout = split is Split.heldout
    task = list(TASKS)[row % len(TASKS)] if heldout else pick_task(rng)
    pool = HELDOUT_DIGITS if heldout else TRAINING_DIGITS
    return task, TASKS[task](rng, *pick(rng, SIZES), pool=pool)


def make_data(out: Path, split: Split, rows: int, number: int = 0) -> Path:
    """Write set `number` under `out`. Returns its JSON file, which appears last."""
    name = split.value if number == 0 else f"{split.value}-{number}"
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for row in range(rows):
        task, drawing = draw_row(split, number, row)
        identity = f"{name}-{row:04d}"
        drawing.image.save(images / f"{identity}.png", optimize=True)
        turns = [
            {"from": "human", "value": f"<image>\n{drawing.question}"},
            {"from": "gpt", "value": drawing.answer},
        ]
        image = f"images/{identity}.png"
        records.append({"id": identity, "image": image, "task": task, "conversations": turns})
    path = out / f"{name}.json"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(records, indent=1) + "\n")
    temporary.replace(path)
    return path


def main(
    out: Annotated[Path, typer.Option(help="Folder to write NAME.json and images/ into")],
    split: Annotated[Split, typer.Option(help="Which kind of rows to draw")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows to draw")] = 512,
    number: Annotated[
        int, typer.Option("--set", min=0, help="Which of the disjoint sets; 0 is the bundled one")
    ] = 0,
) -> None:
    """Draw one set of questions about drawn images."""
    typer.echo(make_data(out, split, rows, number))


if __name__ == "__main__":
    typer.run(main)
