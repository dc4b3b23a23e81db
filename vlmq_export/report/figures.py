"""The figures of report.html, as inline SVG and images.

They show the answers of source and quantized model to a few images, errors by layer, shares of
tokens of low importance, and the token weights of one image. Their numbers come from a manifest,
which may be anybody's: what is not a number draws nothing.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.artifact.manifest import ModuleRecord
from vlmq_export.quantizer.samples.images import ImageBytes, load_image
from vlmq_export.quantizer.samples.rows import Row

if TYPE_CHECKING:
    from vlmq_export.proving.fidelity import Fidelity

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj")
PROJECTIONS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 232, 132, 38, 18, 8  # of a chart and its margins, in pixels
RIGHT = 8
LAYERS_PICTURED = 4
# Colours of a map of token weights, from the smallest weight to the largest.
RAMP = ((12, 20, 48), (38, 84, 124), (64, 158, 138), (250, 222, 96))
THUMBNAIL = 320  # pixels of the longer side of a row's image
Points = Sequence[tuple[float, float]]  # (layer, value)


def answer_pairs(fidelity: Fidelity | None, rows: Sequence[Row]) -> list[dict]:
    """The rows whose answers are shown, each with its first image and the number of the others.

    A row that is no longer among `rows`, as in a report of an earlier measurement, has no image.
    """
    pairs = []
    for example in fidelity.examples if fidelity is not None else ():
        row = rows[example.row] if 0 <= example.row < len(rows) else None
        # Rows of the same id were numbered: `7` became `7 (3)`.
        same = row is not None and example.id in (row.id, f"{row.id} ({example.row})")
        images = row.images if row is not None and same else ()
        pairs.append({"row": example, "image": _thumbnail(images), "more": len(images) - 1})
    return pairs


def _thumbnail(images: Sequence[Path | ImageBytes | Image.Image]) -> Markup | None:
    """The first of these images, made small; None where there is none, or none that can be read."""
    if not images:
        return None
    try:
        image = load_image(images[0])
    except CalibrationError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return _data(buffer, "jpeg")


def _data(buffer: io.BytesIO, kind: str) -> Markup:
    """An image file as a URL that holds it."""
    return Markup(f"data:image/{kind};base64,") + base64.b64encode(buffer.getvalue()).decode()


def error_charts(records: Sequence[ModuleRecord]) -> list[dict]:
    """One chart for each projection: its relative error by layer, on one scale for all charts.

    The error of rounding to nearest is drawn beside it where it was measured.
    """
    found: dict[str, dict[str, Points]] = {}
    for name in PROJECTIONS:
        mine = [r for r in records if r.name.endswith(f".{name}")]
        lines = {
            "this run": _points(mine, lambda m: m.get("relative_error", m.get("weight_error"))),
            "rounding to nearest": _points(mine, lambda m: m.get("nearest_error")),
        }
        found[name] = {label: points for label, points in lines.items() if points}
    drawn = [points for lines in found.values() for points in lines.values()]
    values = [y for points in drawn for _, y in points if y > 0]
    if not values:
        return []
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    low = low if high > low else low / 10
    return [
        {"title": n, "svg": chart(lines, low, high, log=True)}
        for n, lines in found.items()
        if lines
    ]


def low_importance_charts(records: Sequence[ModuleRecord]) -> list[dict]:
    """One chart for each attention projection: the shares of tokens of low importance by layer.

    One line is for image tokens, the other for text tokens.
    """
    charts = []
    for name in _ATTENTION:
        mine = [r for r in records if r.name.endswith(f".{name}") and _importance(r) is not None]
        lines = {
            label: _points(mine, lambda m, key=key: m["importance"].get(key))
            for label, key in (("image tokens", "low_vision"), ("text tokens", "low_text"))
        }
        if any(lines.values()):
            charts.append({"title": name, "svg": chart(lines, 0, 1)})
    return charts


def low_importance_ratio(records: Sequence[ModuleRecord]) -> dict[str, float] | None:
    """Means over layers and projections of what is recorded of token weights; None without any.

    The first layer, where all tokens weigh the same, is left out.
    """
    keys = ("low_vision", "low_text", "vision_tokens", "vision_weight")
    known = [_importance(r) for r in records if r.layer > 0]
    told = [t for t in known if t is not None and all(_number(t.get(k)) for k in keys)]
    return {k: sum(t[k] for t in told) / len(told) for k in keys} if told else None


def importance_maps(records: Sequence[ModuleRecord], shape: object) -> list[dict]:
    """Rows of pictures: for a few layers, an image's token weights at each attention projection.

    `shape` is [rows, columns] of the image's tokens. A projection whose tokens all weigh the same
    has no picture: nothing was weighed there.
    """
    if not _is_shape(shape):
        return []
    rows, columns = shape
    layers: dict[int, dict[str, Markup]] = {}
    for r in records:
        name = r.name.rpartition(".")[2]
        text = (_importance(r) or {}).get("image")
        if name in PROJECTIONS and isinstance(text, str) and re.fullmatch(r"([0-9a-f]{2})+", text):
            tokens = np.frombuffer(bytes.fromhex(text), np.uint8)
            if len(tokens) >= rows * columns and len(np.unique(tokens)) > 1:
                levels = tokens[: rows * columns].reshape(rows, columns)
                layers.setdefault(r.layer, {})[name] = _picture(levels)
    order = sorted(layers)
    if not order:
        return []
    steps = LAYERS_PICTURED - 1
    places = {round(i * (len(order) - 1) / steps) for i in range(LAYERS_PICTURED)}
    return [{"layer": order[i], "pictures": layers[order[i]]} for i in sorted(places)]


def _is_shape(shape: object) -> TypeGuard[list[int]]:
    """Whether it is a pair of numbers of tokens that an image can have."""
    if not isinstance(shape, list) or len(shape) != 2:
        return False
    return all(type(n) is int and 0 < n <= 512 for n in shape)


def _picture(levels: np.ndarray) -> Markup:
    """A PNG of uint8 levels [rows, columns]: one pixel for each token, in the ramp's colours."""
    steps = np.linspace(0, 255, len(RAMP))
    channels = [np.interp(levels, steps, channel) for channel in zip(*RAMP)]
    colours = np.stack(channels, -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG", optimize=True)
    return _data(buffer, "png")


def chart(lines: Mapping[str, Points], low: float, high: float, *, log: bool = False) -> Markup:
    """Lines over the layers as SVG, on a scale from `low` to `high`, where `low` < `high`.

    The first line has the colour of bars. The second is soft and dashed.
    """
    layers = [x for points in lines.values() for x, _ in points]
    first, last = min(layers), max(max(layers), min(layers) + 1)
    bottom = HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[str, str]:
        """Where a point is in the picture, in pixels from its upper left corner."""
        if log:
            share = (math.log(max(y, low)) - math.log(low)) / (math.log(high) - math.log(low))
        else:
            share = (y - low) / (high - low)
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f}", f"{bottom - min(max(share, 0), 1) * (bottom - TOP):.1f}"

    parts = []
    for value in _ticks(low, high, log):
        x, y = place(first, value)
        parts.append(
            f'<path class="grid" d="M{x},{y}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 4}" y="{float(y) + 3:.1f}" text-anchor="end">{value:g}</text>'
        )
    for layer, anchor in ((first, "start"), (last, "end")):
        x, _ = place(layer, low)
        parts.append(f'<text x="{x}" y="{HEIGHT - 4}" text-anchor="{anchor}">layer {layer}</text>')
    for number, (label, points) in enumerate(lines.items()):
        if points:
            where = " ".join(",".join(place(x, y)) for x, y in points)
            parts.append(
                f'<polyline class="line{number}" points="{where}">'
                f"<title>{escape(label)}</title></polyline>"
            )
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>')


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """The values that the scale names: powers of ten, or both ends and the middle."""
    if not log:
        return [low, (low + high) / 2, high]
    return [10.0**n for n in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def _points(records: Sequence[ModuleRecord], value: Callable[[dict], object]) -> Points:
    """(layer, value) of each decoder layer's record whose metrics have a number there."""
    return [
        (r.layer, float(y))
        for r in records
        if type(r.layer) is int and r.layer >= 0 and _number(y := value(r.metrics))
    ]


def _importance(record: ModuleRecord) -> dict | None:
    """What is recorded of the token weights at a projection."""
    told = record.metrics.get("importance")
    return told if isinstance(told, dict) else None


def _number(value: object) -> TypeGuard[float]:
    """Whether it is a number that a chart can show."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and value >= 0
