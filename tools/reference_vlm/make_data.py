"""Draw the bundled calibration and held-out sets, or further calibration sets disjoint from them.

    python -m tools.reference_vlm.make_data --out DIR --split calibration|heldout --rows N --set K

The same arguments give the same bytes, and the first rows of a longer set are those of a shorter one: every row has a
generator of its own, seeded by (split, set, row). Set 0 is what the package bundles. Rows are in the LLaVA/ShareGPT4V
layout; image paths are relative to DIR.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from numpy.random import RandomState

from tools.reference_vlm.drawing import HELDOUT_DIGITS, SIZES, TASKS, TRAINING_DIGITS, Drawing, pick, pick_task


class Split(StrEnum):
    calibration = "calibration"
    heldout = "heldout"


_SPLIT_SEEDS = {Split.calibration: 1, Split.heldout: 2}  # 3 is training's, which draws as it goes


def draw_row(split: Split, number: int, row: int) -> tuple[str, Drawing]:
    """Row `row` of set `number`: its task and drawing.

    The held-out rows ask the five tasks in turn and paste handwriting that training never saw; calibration asks as
    training does.
    """
    rng = RandomState([_SPLIT_SEEDS[split], number, row])
    heldout = split is Split.heldout
    task = list(TASKS)[row % len(TASKS)] if heldout else pick_task(rng)
    return task, TASKS[task](rng, *pick(rng, SIZES), pool=HELDOUT_DIGITS if heldout else TRAINING_DIGITS)


def make_data(out: Path, split: Split, rows: int, number: int = 0) -> Path:
    """Write one set under `out`; returns its JSON file, which appears last."""
    name = split.value if number == 0 else f"{split.value}-{number}"
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for row in range(rows):
        task, drawing = draw_row(split, number, row)
        identity = f"{name}-{row:04d}"
        drawing.image.save(images / f"{identity}.png", optimize=True)
        records.append(
            {
                "id": identity,
                "image": f"images/{identity}.png",
                "task": task,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{drawing.question}"},
                    {"from": "gpt", "value": drawing.answer},
                ],
            }
        )
    path = out / f"{name}.json"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(records, indent=1) + "\n")
    temporary.replace(path)
    return path


def main(
    out: Annotated[Path, typer.Option(help="Folder to write NAME.json and images/ into")],
    split: Annotated[Split, typer.Option(help="Which kind of rows to draw")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows to draw")] = 512,
    number: Annotated[int, typer.Option("--set", min=0, help="Which of the disjoint sets; 0 is the bundled one")] = 0,
) -> None:
    """Draw one set of questions about drawn images."""
    typer.echo(make_data(out, split, rows, number))


if __name__ == "__main__":
    typer.run(main)
