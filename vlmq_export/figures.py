"""Figures of report.html as inline SVG and images: errors by layer, low-importance shares, one image's token weights.

Numbers come from a manifest, which may be anybody's: what is not a number draws nothing.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from vlmq_export.quantizer.artifact import ModuleRecord

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 232, 132, 38, 18, 8
LAYERS_PICTURED = 4
RAMP = ((12, 20, 48), (38, 84, 124), (64, 158, 138), (250, 222, 96))  # dark: little weight; bright: much
Points = Sequence[tuple[float, float]]


def error_charts(records: Sequence[ModuleRecord]) -> list[dict]:
    """One chart a projection: its relative error by layer, beside that of rounding to nearest where it was measured."""
    found = {}
    for name in PROJECTIONS:
        mine = [r for r in records if r.name.endswith(f".{name}")]
        lines = {
            "this run": _points(mine, lambda m: m.get("relative_error", m.get("weight_error"))),
            "rounding to nearest": _points(mine, lambda m: m.get("nearest_error")),
        }
        found[name] = {label: points for label, points in lines.items() if points}
    values = [y for lines in found.values() for points in lines.values() for _, y in points if y > 0]
    if not values:
        return []
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    low = low if high > low else low / 10
    return [{"title": n, "svg": chart(lines, low, high, log=True)} for n, lines in found.items() if lines]


def low_importance_charts(records: Sequence[ModuleRecord]) -> list[dict]:
    """One chart an attention projection: the share of image tokens, and of text tokens, of low importance by layer."""
    charts = []
    for name in PROJECTIONS[:4]:
        mine = [r for r in records if r.name.endswith(f".{name}") and isinstance(r.metrics.get("importance"), dict)]
        lines = {
            label: _points(mine, lambda m, key=key: m["importance"].get(key))
            for label, key in (("image tokens", "low_vision"), ("text tokens", "low_text"))
        }
        if any(lines.values()):
            charts.append({"title": name, "svg": chart(lines, 0, 1)})
    return charts


def low_importance_ratio(records: Sequence[ModuleRecord]) -> dict[str, float] | None:
    """Means over layers and projections, the first layer, where all tokens weigh the same, left out."""
    keys = ("low_vision", "low_text", "vision_tokens", "vision_weight")
    told = [r.metrics["importance"] for r in records if r.layer > 0 and isinstance(r.metrics.get("importance"), dict)]
    told = [t for t in told if all(_number(t.get(k)) for k in keys)]
    return {k: sum(t[k] for t in told) / len(told) for k in keys} if told else None


def importance_maps(records: Sequence[ModuleRecord], shape: object) -> list[dict]:
    """Rows of pictures: a few layers, an image's weight at each of the attention's projections."""
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n <= 512 for n in shape)):
        return []
    layers: dict[int, dict[str, Markup]] = {}
    for r in records:
        told, name = r.metrics.get("importance"), r.name.rpartition(".")[2]
        text = told.get("image") if isinstance(told, dict) else None
        if name in PROJECTIONS and isinstance(text, str) and re.fullmatch(r"([0-9a-f]{2})+", text):
            tokens = np.frombuffer(bytes.fromhex(text), np.uint8)
            if len(tokens) >= shape[0] * shape[1] and len(np.unique(tokens)) > 1:  # else no weights: the first layer
                layers.setdefault(r.layer, {})[name] = _picture(tokens[: shape[0] * shape[1]].reshape(shape))
    order = sorted(layers)
    places = {round(i * (len(order) - 1) / (LAYERS_PICTURED - 1)) for i in range(LAYERS_PICTURED)} if order else ()
    return [{"layer": order[i], "pictures": layers[order[i]]} for i in sorted(places)]


def _picture(levels: np.ndarray) -> Markup:
    """A PNG of one pixel a token, in the ramp's colours."""
    steps = np.linspace(0, 255, len(RAMP))
    colours = np.stack([np.interp(levels, steps, channel) for channel in zip(*RAMP)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG", optimize=True)
    return Markup("data:image/png;base64,") + base64.b64encode(buffer.getvalue()).decode()


def chart(lines: Mapping[str, Points], low: float, high: float, *, log: bool = False) -> Markup:
    """Lines over the layers as SVG, the first in the colour of bars, the second soft and dashed; `low` < `high`."""
    layers = [x for points in lines.values() for x, _ in points]
    first, last = min(layers), max(max(layers), min(layers) + 1)

    def place(x: float, y: float) -> str:
        share = (
            (math.log(max(y, low)) - math.log(low)) / (math.log(high) - math.log(low))
            if log
            else (y - low) / (high - low)
        )
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - 8)
        return f"{across:.1f},{HEIGHT - BOTTOM - min(max(share, 0), 1) * (HEIGHT - BOTTOM - TOP):.1f}"

    parts = []
    for value in _ticks(low, high, log):
        x, y = place(first, value).split(",")
        parts.append(
            f'<path class="grid" d="M{x},{y}H{WIDTH - 8}"/><text x="{LEFT - 4}" y="{float(y) + 3:.1f}" text-anchor="end">{value:g}</text>'
        )
    for x, anchor in ((first, "start"), (last, "end")):
        parts.append(
            f'<text x="{place(x, low).split(",")[0]}" y="{HEIGHT - 4}" text-anchor="{anchor}">layer {x}</text>'
        )
    for number, (label, points) in enumerate(lines.items()):
        if points:
            where = " ".join(place(x, y) for x, y in points)
            parts.append(f'<polyline class="line{number}" points="{where}"><title>{escape(label)}</title></polyline>')
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>')


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        return [low, (low + high) / 2, high]
    return [10.0**n for n in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def _points(records: Sequence[ModuleRecord], value) -> Points:
    return [
        (r.layer, float(y)) for r in records if type(r.layer) is int and r.layer >= 0 and _number(y := value(r.metrics))
    ]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
