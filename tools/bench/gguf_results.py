"""What gguf.py shows of its cells: tables, and the curve of KL at answers against bits a weight."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from tools.bench.drift import STYLE
from tools.bench.tables import table

DEFAULT = "vlmq"  # with whatever a recipe has where nothing is said
ROTATED = ", rotated"
OURS = (
    DEFAULT, "vlmq, types by cost", "vlmq, --no-smooth", "vlmq, rotated",
    "exact", "exact, types by cost", "vlmq-paper", "vlmq-paper, types by cost",
)  # fmt: skip
PLAIN = "llama.cpp"
TEXT, IMAGE = "llama.cpp + text imatrix", "llama.cpp + image imatrix"
EMITTED = "llama.cpp + our imatrix"
AUTOROUND = {"AutoRound": None, "AutoRound, 0 iterations": 0}  # iterations; None: its default, 200
# Nothing is quantized here; its KL is that of llama.cpp's own deviations.
FLOOR = "full precision, float32 file"
UNCALIBRATED = (FLOOR, PLAIN)  # the same for every calibration set, and run on the first only
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M")
I_MIXES = ("IQ2_XXS", "IQ2_XS", "IQ2_M", "IQ3_XXS", "IQ3_S", "IQ4_XS")
BY_COST = ", types by cost"
DECODED = ", decoded to float32"
# Contender → colour. Each has one line for the K types and one for the I types.
LINES = {
    IMAGE: "#c2571a",
    "exact": "#1f6fb2",
    "vlmq": "#2a8c4a",
    "exact" + BY_COST: "#8a4fa3",
}
KINDS = {"K types": ("o", "-"), "I types": ("^", "--")}  # marker and dashes
Point = tuple[float, float, str]  # bits per weight, KL in nats, mix


def all_tables(cells: list[dict]) -> dict[str, str]:
    """Name of a table → markdown, with a row for each contender and a column for each mix.

        FIELD MODEL             ours and llama.cpp's on K types
        I types FIELD MODEL     the same on I types
        AutoRound FIELD MODEL   AutoRound, and who was measured on the same mix and samples
        decoded kl MODEL        contenders whose weights were decoded to float32

    The field `ratio` is the KL over that of llama.cpp with the image imatrix of the same set.
    """

    def place(cell: dict) -> tuple:
        return cell["model"], cell["mix"], cell["calibration"]

    base = {place(c): c["kl"] for c in cells if c["contender"] == IMAGE}
    cells = [c | {"ratio": c["kl"] / k if (k := base.get(place(c))) else None} for c in cells]
    order = ("Q2_K_S", *MIXES, *I_MIXES, FLOOR, *OURS, *AUTOROUND, PLAIN, TEXT, EMITTED, IMAGE)
    tables = {}
    for model in dict.fromkeys(c["model"] for c in cells):
        own = [c for c in cells if c["model"] == model and c["contender"] != FLOOR]
        decoded = [c for c in own if c["contender"].endswith(DECODED)]
        tables[f"decoded kl {model}"] = table(decoded, "contender", "mix", "kl", order)
        own = [c for c in own if not c["contender"].endswith(DECODED)]
        mixed = [c for c in own if c["mix"] in MIXES and c["contender"] not in AUTOROUND]
        points = [c for c in own if c["mix"] in I_MIXES and c["contender"] not in AUTOROUND]
        theirs = [c for c in own if c["contender"] in AUTOROUND]
        beside = [c for c in own if c["contender"] in (*OURS, *AUTOROUND, IMAGE)]
        beside = [c for c in beside if any(_alike(c, other) for other in theirs)]
        for field in ("kl", "exact", "ratio", "bits"):
            tables[f"{field} {model}"] = table(mixed, "contender", "mix", field, order)
            tables[f"I types {field} {model}"] = table(points, "contender", "mix", field, order)
            tables[f"AutoRound {field} {model}"] = table(beside, "contender", "mix", field, order)
    return tables


def _alike(cell: dict, other: dict) -> bool:
    """Whether two cells have the same calibration samples and types."""
    return all(cell[key] == other[key] for key in ("mix", "calibration", "samples"))


def lines(cells: list[dict], model: str) -> dict[tuple[str, str], list[Point]]:
    """(contender, kind of type) → its points by size. A point is the mean over calibration sets."""
    found: dict[tuple[str, str], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if cell["model"] == model and cell["contender"] in LINES and cell["samples"] == 128:
            kind = "I types" if cell["mix"].startswith("IQ") else "K types"
            found[cell["contender"], kind][cell["mix"]].append(cell)
    return {
        key: sorted(
            (fmean(c["bits"] for c in alike), fmean(c["kl"] for c in alike), mix)
            for mix, alike in mixes.items()
        )
        for key, mixes in found.items()
    }


def draw(cells: list[dict], file: Path) -> None:
    """Draw a panel for each model. The same numbers give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    models = [m for m in dict.fromkeys(c["model"] for c in cells) if lines(cells, m)]
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            1, len(models), figsize=(4.2 * len(models), 4.2), squeeze=False
        )
        for axis, model in zip(axes[0], models):
            _draw_model(axis, lines(cells, model))
            axis.set(yscale="log", title=model, xlabel="bits per weight, embedding included")
            axis.grid(which="both", alpha=0.25)
        axes[0][0].set_ylabel("KL at answers, nats")
        shown = {}
        for axis in axes[0]:
            handles, names = axis.get_legend_handles_labels()
            shown |= dict(zip(names, handles))
        names = sorted(shown)
        handles = [shown[name] for name in names]
        figure.legend(handles, names, loc="lower center", ncols=2, frameon=False)
        figure.tight_layout(rect=(0, 0.22, 1, 1))
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def _draw_model(axis: Any, found: dict[tuple[str, str], list[Point]]) -> None:
    """The lines of one model. The largest line of each kind names its types."""
    for kind, (marker, dashes) in KINDS.items():
        for contender, colour in LINES.items():
            points = found.get((contender, kind), [])
            if not points:
                continue
            bits, kl, mixes = zip(*points)
            label = f"{'' if contender == IMAGE else 'ours: '}{contender}, {kind}"
            axis.plot(bits, kl, dashes, marker=marker, color=colour, label=label, linewidth=1.3)
            if contender == next(iter(LINES)):
                for x, y, mix in zip(bits, kl, mixes):
                    axis.annotate(mix, (x, y), (3, 4), textcoords="offset points", fontsize=6)
