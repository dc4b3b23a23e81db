"""One row of a paper's table: quantize, ask the eight benchmarks, print both beside each other.

    python -m tools.replication.row recipes/vlmq-table2.yaml qwen2.5-vl-7b/vlmq-paper \
        --calibration pairs.json --image-root data/ --out out

The artifact is asked, which is what the papers' fake-quantized models are. A run that was stopped
goes on with the same command. `--model` takes another model in place of the row's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.replication.tables import HEADS, SOURCE, Table, TableRow, read_table, row_named
from vlmq_export import VlmqError, evaluate, export
from vlmq_export.proving.scores import Evaluation
from vlmq_export.recipes.recipe_file import RECIPE_FILE
from vlmq_export.terminal.progress import Stages


def replicate(table: Table, row: TableRow, asked: argparse.Namespace) -> list[float]:
    """The figures of a row in percent, in the order of HEADS."""
    given = {k: getattr(asked, k) for k in ("calibration", "image_root", "samples", "device")}
    more = {k: v for k, v in given.items() if v is not None} | {"verify": False}
    if asked.model is not None:
        more["model"] = asked.model
    recipe = table.recipe_of(row, out=asked.out, **more)
    full = row.method == SOURCE
    with Stages(False) as stages:
        export(recipe, resume=(asked.out / RECIPE_FILE).is_file(), progress=stages)
        found = evaluate(
            asked.out,
            table.tasks,
            on=["artifact"],
            baseline=full,
            data=asked.data,
            limit=asked.limit,
            device=recipe.device,
            progress=stages,
        )
    return _figures(found, SOURCE if full else "artifact")


def _figures(found: Evaluation, of: str) -> list[float]:
    """The scores of one model in percent, with their mean at the end."""
    scores = [100 * s.score for s in found.scores if s.of == of]
    return [*scores, sum(scores) / len(scores)]


def _options(words: list[str] | None) -> argparse.Namespace:
    as_written = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("table", type=Path)
    parser.add_argument("row")
    parser.add_argument("--calibration", type=Path, help="rows of tools.replication.pairs")
    parser.add_argument("--image-root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the benchmarks; default: the hub")
    parser.add_argument("--limit", type=int, help="questions of each benchmark; default: all")
    parser.add_argument("--samples", type=int, help="calibration rows; default: the paper's 512")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--model", help="another model in place of the row's")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Print what was measured beside what the paper prints. Returns the exit code."""
    asked = _options(words)
    try:
        table = read_table(asked.table)
        row = row_named(table, asked.row)
        measured = replicate(table, row, asked)
    except VlmqError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(f"{table.title}, {row.name}")
    for head, printed, own in zip(HEADS, row.printed, measured, strict=True):
        print(f"{head:<8} {printed:>7.2f} printed {own:>7.2f} measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
