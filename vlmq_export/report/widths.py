"""The picture of a mixture of widths in report.html: a cell for each matrix of the language model.

Its facts come from a manifest, which may be anybody's: a type that is not known draws nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from vlmq_export.quantizer.artifact.manifest import OUTER, VISION, ModuleRecord
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.report.figures import PROJECTIONS, RAMP

LEFT, TOP, HEIGHT = 74, 4, 17  # of the names' column, above the cells, and of a row, in pixels
WIDEST, NARROWEST, ACROSS = 30, 5, 900  # of a cell, and of all cells together where they are many
LABELLED = 20  # pixels of a cell that a number fits into
OUTSIDE = {"embed_tokens": "embedding", "lm_head": "output matrix"}


@dataclass(frozen=True)
class Cell:
    """A matrix in the picture."""

    row: str  # its projection, or what it is outside the layers
    layer: int
    kind: str  # "Q4_K", or "4 bits"
    bits: float  # of a weight


def width_map(records: Sequence[ModuleRecord]) -> dict | None:
    """The picture as SVG, and its key: kind, colour, bits of a weight and number of matrices.

    None where all linears of the layers have one width.
    """
    cells = [cell for record in records if (cell := _cell(record)) is not None]
    if len({cell.kind for cell in cells if cell.row in PROJECTIONS}) < 2:
        return None
    bits = {cell.kind: cell.bits for cell in cells}
    low, high = min(bits.values()), max(bits.values())
    colours = {kind: _colour((b - low) / (high - low or 1)) for kind, b in bits.items()}
    counts = Counter(cell.kind for cell in cells)
    key = [
        {"kind": kind, "colour": colours[kind], "bits": f"{bits[kind]:g}", "count": counts[kind]}
        for kind in sorted(bits, key=lambda kind: -bits[kind])
    ]
    return {"svg": _svg(cells, colours), "key": key}


def _cell(record: ModuleRecord) -> Cell | None:
    """The cell of a matrix; None for the vision tower, and for what has no width."""
    name = record.name.rpartition(".")[2]
    if record.layer == VISION or (name not in PROJECTIONS and name not in OUTSIDE):
        return None
    layer = 0 if name in OUTSIDE or record.layer == OUTER else record.layer
    row = OUTSIDE.get(name, name)
    if not record.type:
        return Cell(row, layer, f"{record.bits} bits", float(record.bits))
    grid = GRIDS.get(record.type)
    return None if grid is None else Cell(row, layer, record.type, grid.bits_per_weight)


def _svg(cells: Sequence[Cell], colours: dict[str, str]) -> Markup:
    """Projections from top to bottom, layers from left to right."""
    layers = 1 + max(cell.layer for cell in cells)
    width = min(WIDEST, max(NARROWEST, ACROSS // layers))
    rows = [r for r in (*PROJECTIONS, *OUTSIDE.values()) if any(cell.row == r for cell in cells)]
    parts = [
        f'<text x="{LEFT - 6}" y="{TOP + HEIGHT * i + 12}" text-anchor="end">{row}</text>'
        for i, row in enumerate(rows)
    ]
    for cell in cells:
        x, y = LEFT + width * cell.layer, TOP + HEIGHT * rows.index(cell.row)
        where = cell.row if cell.row in OUTSIDE.values() else f"layer {cell.layer}, {cell.row}"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width - 1}" height="{HEIGHT - 1}"'
            f' fill="{colours[cell.kind]}"><title>{where}: {escape(cell.kind)},'
            f" {cell.bits:g} bits per weight</title></rect>"
        )
        if width >= LABELLED:
            parts.append(
                f'<text style="fill:{_ink(colours[cell.kind])}" x="{x + width / 2 - 0.5:g}"'
                f' y="{y + 12}" text-anchor="middle">{cell.bits:.3g}</text>'
            )
    bottom = TOP + HEIGHT * len(rows) + 12
    for layer, anchor in ((0, "start"), (layers - 1, "end")):
        x = LEFT + width * (layer + (anchor == "end"))
        parts.append(f'<text x="{x}" y="{bottom}" text-anchor="{anchor}">layer {layer}</text>')
    size = f"{LEFT + width * layers + 4} {bottom + 4}"
    return Markup(
        f'<svg class="widths" viewBox="0 0 {size}" width="{size.split()[0]}" role="img">'
        f"{''.join(parts)}</svg>"
    )


def _ink(colour: str) -> str:
    """White on dark colours, and nearly black on light ones."""
    light = sum(w * int(colour[i : i + 2], 16) for w, i in ((0.3, 1), (0.6, 3), (0.1, 5)))
    return "#fff" if light < 128 else "#111"


def _colour(share: float) -> str:
    """A place on the ramp, from 0 to 1."""
    steps = np.linspace(0, 1, len(RAMP))
    return "#" + "".join(f"{round(float(np.interp(share, steps, c))):02x}" for c in zip(*RAMP))
