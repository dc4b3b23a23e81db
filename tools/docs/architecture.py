"""The two pictures of docs/architecture.md, drawn from the code.

    python -m tools.docs.architecture          # writes docs/rooms.svg and docs/weight.svg

`rooms.svg` has every room (a folder, or a module that stands by itself) on its floor, and an arrow
for each import that no longer way explains. Floors and arrows come from the import graph, and the
captions from the docstrings. `weight.svg` is the way of one weight, from a checkpoint to a file and
its proof. Its steps are listed here, and each must name a function that exists.

tests/tools/test_architecture.py fails where the committed pictures are not what this draws.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp
import networkx

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGE = "vlmq_export"
BANDS = {  # title of a band → the package whose rooms it shows
    "vlmq_export/: the command, and what it is given": PACKAGE,
    "formats/: the writers and their proofs": f"{PACKAGE}.formats",
    "quantizer/: from weights and samples to integers": f"{PACKAGE}.quantizer",
}
# Rooms that everything may import, and that would only add arrows.
EVERYWHERE = {"errors", "_version", "formats", "quantizer", "__main__"}

INK, PAPER, LINE, FILL, SOFT = "#1f2933", "#ffffff", "#9aa5b1", "#eef4fb", "#f7f9fb"
BOX, GAP, ROW = 176, 18, 104  # width of a box, and what lies between boxes and between floors
MARGIN, TITLE, TALL = 24, 34, 66  # tall: height of a box
CHARS = 29  # of a caption in one line of a box


@dataclass(frozen=True)
class Box:
    """A room in the picture. Its corner is the upper left one."""

    name: str
    caption: str
    x: float
    y: float


@dataclass(frozen=True)
class Band:
    """The rooms of one package, floor by floor from the top down."""

    title: str
    graph: networkx.DiGraph
    floors: list[list[str]]
    captions: dict[str, str]

    @classmethod
    def of(cls, title: str, package: str, graph: networkx.DiGraph) -> Band:
        captions = {room: caption(package, room) for room in graph}
        return cls(title, graph, floors(graph), captions)

    @property
    def width(self) -> float:
        return max(map(len, self.floors)) * (BOX + GAP) - GAP + 2 * MARGIN

    @property
    def height(self) -> float:
        return TITLE + (len(self.floors) - 1) * ROW + TALL + MARGIN

    def drawn(self, top: float, width: float) -> list[str]:
        """The band in a picture of this width: a frame, the arrows, and the boxes above them."""
        boxes: dict[str, Box] = {}
        for level, names in enumerate(self.floors):
            left = MARGIN + (width - len(names) * (BOX + GAP) + GAP) / 2  # floors are centred
            for place, name in enumerate(names):
                x, y = left + place * (BOX + GAP), top + TITLE + level * ROW
                boxes[name] = Box(name, self.captions[name], x, y)
        arrows = sorted(networkx.transitive_reduction(self.graph).edges)
        ends = [(boxes[upper], boxes[lower]) for upper, lower in arrows]
        return [
            f'<rect x="{MARGIN}" y="{top:.0f}" width="{width:.0f}" height="{self.height:.0f}"'
            f' rx="8" fill="{SOFT}" stroke="{LINE}"/>',
            f'<text x="{2 * MARGIN}" y="{top + 22:.0f}" class="title">{escape(self.title)}</text>',
            *(_arrow(a.x + BOX / 2, a.y + TALL, b.x + BOX / 2, b.y) for a, b in ends),
            *(_box(box) for box in boxes.values()),
        ]


@dataclass(frozen=True)
class Step:
    """A step on the way of a weight."""

    where: str  # module:function, below the package
    what: str  # what the weight is there


WAY = (
    Step(
        "quantizer.model.checkpoint:Checkpoint.tensor", "W of one linear, [out, in], as published"
    ),
    Step(
        "quantizer.model.streamed:StreamedModel.filled_layer", "W in float32, its layer in memory"
    ),
    Step("quantizer.calibration.layer_walk:LayerWalk.inputs", "x and x̃, what enters the linear"),
    Step(
        "quantizer.calibration.collect:collect", "A = Σ g² x xᵀ and D = Σ g² (x̃ − x) xᵀ, [in, in]"
    ),
    Step("quantizer.layers.unit:solve_unit", "the method's target and ranges for W"),
    Step("quantizer.solver.hessian:prepare", "A + λI = K·diag(d)·Kᵀ, in the order of the loop"),
    Step("quantizer.solver.column_loop:solve", "codes, scales, zero_points and g_idx"),
    Step("quantizer.calibration.layer_walk:LayerWalk.put", "Ŵ in the layer, for what follows it"),
    Step("quantizer.artifact.write:write_layer", "layer-00003.safetensors: a byte a code"),
)
FILES = {  # format → its writer of a linear, its reader, and the runtime that the proof runs
    "GPTQ": (
        Step("formats.gptq.write:pack_linear", "qweight, qzeros, scales, g_idx"),
        Step("formats.gptq.read:GptqFolder.array", "transformers + gptqmodel, AutoGPTQ"),
    ),
    "compressed-tensors": (
        Step("formats.compressed_tensors.write:pack_linear", "weight_packed, weight_zero_point, …"),
        Step("formats.compressed_tensors.read:read", "transformers + the library"),
    ),
    "ONNX": (
        Step("formats.onnx.passes.fill:fill", "a MatMulNBits node and its data"),
        Step("formats.onnx.read:OnnxFolder.weight", "ONNX Runtime, onnxruntime-genai"),
    ),
    "GGUF": (
        Step("formats.gguf.types.exact:pack_linear", "blocks of the type that holds the grid"),
        Step("formats.gguf.read:decode_ours", "llama.cpp, with the mmproj through mtmd"),
    ),
}
PROOF = (
    Step("formats.proof.weights:Weights.array", "Ŵ from the artifact, by code of its own"),
    Step("formats.proof.checks:compare_weights", "L1: every weight, bit for bit"),
    Step("formats.proof.reference:Reference.logits", "L2 and L3: products, logits and answers"),
)


def room_of(module: str, package: str) -> str | None:
    """The room of a module inside a package, or None for one outside."""
    parts, own = module.split("."), package.split(".")
    if parts[: len(own)] != own or len(parts) == len(own):
        return None
    return parts[len(own)]


def rooms(graph: grimp.ImportGraph, package: str) -> networkx.DiGraph:
    """The rooms of a package, and which of them imports which."""
    found = networkx.DiGraph()
    for module in sorted(graph.modules):
        room = room_of(module, package)
        if room is None or room in EVERYWHERE:
            continue
        found.add_node(room)
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            other = room_of(imported, package)
            if other is not None and other != room and other not in EVERYWHERE:
                found.add_edge(room, other)
    return found


def floors(graph: networkx.DiGraph) -> list[list[str]]:
    """The rooms from the top floor down. A room stands right above the highest that it imports."""
    upward = graph.reverse()
    return [sorted(floor) for floor in networkx.topological_generations(upward)][::-1]


def caption(package: str, room: str) -> str:
    """The first sentence of a room's docstring."""
    path = ROOT.joinpath(*package.split(".")) / room
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    said = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return " ".join(said.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def draw_rooms() -> str:
    """The picture of the rooms, as SVG."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    bands = [Band.of(title, package, rooms(graph, package)) for title, package in BANDS.items()]
    width, top, parts = max(band.width for band in bands), float(MARGIN), []
    for band in bands:
        parts += band.drawn(top, width)
        top += band.height + MARGIN
    return _svg(width + 2 * MARGIN, top, parts)


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<path d="M {x1:.0f} {y1:.0f} L {x2:.0f} {y2:.0f}" stroke="{LINE}" fill="none"'
        ' marker-end="url(#tip)"/>'
    )


def _box(box: Box) -> str:
    shown = textwrap.wrap(box.caption, CHARS)
    if len(shown) > 3:
        shown = [*shown[:2], shown[2].rstrip(",;:") + " …"]
    words = [
        f'<tspan x="{box.x + 8:.0f}" dy="{14 if i else 0}">{escape(line)}</tspan>'
        for i, line in enumerate(shown)
    ]
    return (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{BOX}" height="{TALL}" rx="5"'
        f' fill="{FILL}" stroke="{INK}"/>'
        f'<text x="{box.x + 8:.0f}" y="{box.y + 16:.0f}" class="name">{escape(box.name)}</text>'
        f'<text x="{box.x + 8:.0f}" y="{box.y + 31:.0f}" class="words">{"".join(words)}</text>'
    )


def checked(step: Step) -> str:
    """The name of a step's function. Raises ValueError where there is no such function."""
    module, _, name = step.where.partition(":")
    found: object = importlib.import_module(f"{PACKAGE}.{module}")
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found) or not inspect.getdoc(found):
        raise ValueError(f"{step.where}: no such function, or one without a docstring")
    return step.where.replace(".", "/", module.count(".")).replace(":", ".py: ")


def draw_weight() -> str:
    """The picture of the way of one weight, as SVG."""
    wide, x = 560, 2 * MARGIN
    parts, y = [], float(MARGIN)
    parts.append(f'<text x="{x}" y="{y + 10}" class="title">quantizer: once a linear</text>')
    y += 24
    for step in WAY:
        parts.append(_step(step, x, y, wide))
        parts.append(_arrow(x + wide / 2, y + 44, x + wide / 2, y + 60))
        y += 60
    column, split = 300, y + 6
    total = len(FILES) * (column + GAP) - GAP
    for i, (name, steps) in enumerate(FILES.items()):
        left, below = x + i * (column + GAP), split + 20
        parts.append(f'<text x="{left}" y="{split + 10}" class="title">formats: {name}</text>')
        for step in steps:
            parts.append(_step(step, left, below, column))
            parts.append(_arrow(left + column / 2, below + 44, left + column / 2, below + 60))
            below += 60
        y = below
    parts.append(f'<text x="{x}" y="{y + 16}" class="title">proof: of every file</text>')
    y += 26
    for step in PROOF:
        parts.append(_step(step, x, y, total))
        y += 52
    return _svg(x + total + MARGIN, y + MARGIN, parts)


def _step(step: Step, x: float, y: float, width: float) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="44" rx="5" fill="{FILL}"'
        f' stroke="{INK}"/>'
        f'<text x="{x + 10:.0f}" y="{y + 18:.0f}" class="name">{escape(step.what)}</text>'
        f'<text x="{x + 10:.0f}" y="{y + 34:.0f}" class="words">{escape(checked(step))}</text>'
    )


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    style = (
        "text { font-family: Helvetica, Arial, sans-serif; fill: " + INK + "; }"
        " .title { font-size: 14px; font-weight: bold; }"
        " .name { font-size: 13px; font-weight: bold; }"
        " .words { font-size: 11px; }"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
        f' orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="{LINE}"/></marker>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' width="{width:.0f}" height="{height:.0f}">\n'
        f"<style>{style}</style>\n<defs>{tip}</defs>\n"
        f'<rect width="100%" height="100%" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def main(out: Path = DOCS) -> None:
    """Write both pictures."""
    (out / "rooms.svg").write_text(draw_rooms(), "utf-8")
    (out / "weight.svg").write_text(draw_weight(), "utf-8")


if __name__ == "__main__":
    main()
