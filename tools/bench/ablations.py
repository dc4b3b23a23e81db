"""The eight ablations of the quality bench: a method with one thing changed, against that method.

ABLATIONS has the changed methods, each like a row of METHODS, with its changes to the recipe. EIGHT
has the questions: under each title the bases, and under each base the rows that are compared with
it. Some of these rows are methods of METHODS. A row that ends in `, rotated` is the method before
it with `--rotate folded`. docs/quality.md has the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from vlmq_export.quantizer.methods import METHODS, Method, Refinement

VLMQ, GPTQ, DEFAULT = (METHODS[name] for name in ("vlmq-paper", "gptq", "vlmq"))
OURS = replace(DEFAULT, smooths=False)
# `exact` with the recipe's damping for every linear.
EXACT = replace(METHODS["exact"], damping="recipe")
CLIP = 10.0  # limit of the clipped importance, in means of g²
# `exact` with the paper's importance, of the attention block, where `vlmq` has that of the answers.
LOCAL = replace(METHODS["exact"], importance="l1", clip=CLIP)
# `exact` without its search of ranges.
BASE = Method(drift="exact", alpha=1.0, refine=Refinement(sweeps=3))
SEARCHED = Refinement(shrink=EXACT.refine.shrink)
EFFECTIVE = 16.0  # effective tokens per input that the floored importance leaves


@dataclass(frozen=True)
class Ablation:
    """A changed method, and what it changes in the recipe."""

    method: Method
    config: dict = field(default_factory=dict)  # changes to the QuantConfig
    grouped: bool = False  # whether it changes nothing where each channel is one group


ABLATIONS = {
    "exact, damping 1 %": Ablation(EXACT),
    "vlmq, local importance": Ablation(LOCAL),
    "vlmq, local importance, damping 1 %": Ablation(replace(LOCAL, damping="recipe")),
    "vlmq, local importance, per sample": Ablation(replace(LOCAL, per_sample=True)),
    "vlmq, local importance, square root": Ablation(replace(LOCAL, power=0.5)),
    "vlmq, square root": Ablation(replace(OURS, power=0.5)),
    "vlmq, not floored": Ablation(replace(OURS, effective=0.0)),
    "vlmq, not clipped": Ablation(replace(OURS, clip=0.0)),
    "vlmq, --no-smooth": Ablation(OURS),
    "vlmq, tuned": Ablation(DEFAULT, {"tune": 60}),
    "exact min-max": Ablation(BASE),
    "exact, own zero-points": Ablation(replace(EXACT, neighbours=False)),
    "exact, ranges by modality": Ablation(replace(BASE, ranges="modality")),
    "exact, ranges by modality, zero-points": Ablation(
        replace(BASE, ranges="modality", neighbours=True)
    ),
    "vlmq-paper, ranges by modality": Ablation(replace(VLMQ, ranges="modality")),
    "vlmq-paper, ranges by outcome": Ablation(replace(VLMQ, neighbours=True, refine=SEARCHED)),
    "gptq, ranges by outcome": Ablation(replace(GPTQ, neighbours=True, refine=SEARCHED)),
    "exact min-max, α 0": Ablation(replace(BASE, alpha=0.0)),
    "exact min-max, α .25": Ablation(replace(BASE, alpha=0.25)),
    "exact min-max, α held-out": Ablation(replace(BASE, alpha="held-out")),
    "vlmq-paper, α 1": Ablation(replace(VLMQ, alpha=1.0)),
    "exact min-max, ℓ1": Ablation(replace(BASE, importance="l1")),
    "exact min-max, ℓ2": Ablation(replace(BASE, importance="l2")),
    "exact min-max, ℓ1 clipped": Ablation(replace(BASE, importance="l1", clip=CLIP)),
    "exact min-max, ℓ1 floored": Ablation(replace(BASE, importance="l1", effective=EFFECTIVE)),
    "vlmq-paper, clipped": Ablation(replace(VLMQ, clip=CLIP)),
    "vlmq-paper, floored": Ablation(replace(VLMQ, effective=EFFECTIVE)),
    "exact min-max, ℓ1 on all 7": Ablation(replace(BASE, importance="l1", weighs="all")),
    "vlmq-paper, all 7": Ablation(replace(VLMQ, weighs="all")),
    "exact min-max, LoaQ residual": Ablation(replace(BASE, residual=True)),
    "exact, LoaQ residual": Ablation(replace(EXACT, residual=True)),
    "exact min-max, dynamic order": Ablation(BASE, {"act_order": "dynamic"}, grouped=True),
    "exact min-max, static order": Ablation(BASE, {"act_order": "static"}, grouped=True),
    "exact min-max, natural order": Ablation(BASE, {"act_order": "off"}),
    "exact, static order": Ablation(EXACT, {"act_order": "static"}, grouped=True),
    "vlmq-paper, dynamic order": Ablation(VLMQ, {"act_order": "dynamic"}, grouped=True),
    "exact min-max, scales refitted": Ablation(
        replace(BASE, refine=Refinement(sweeps=4, refit=True))
    ),
    "exact min-max, damping .1 %": Ablation(BASE, {"damp": 0.001}),
    "exact min-max, damping 5 %": Ablation(BASE, {"damp": 0.05}),
}

# Title → base → the rows that are compared with it.
EIGHT: dict[str, dict[str, tuple[str, ...]]] = {
    "1 ranges": {
        "exact min-max": (
            "exact, damping 1 %", "exact, own zero-points", "exact, ranges by modality",
            "exact, ranges by modality, zero-points",
        ),
        "vlmq-paper": ("vlmq-paper, ranges by modality", "vlmq-paper, ranges by outcome"),
        "gptq": ("gptq, ranges by outcome",),
    },
    "2 α": {
        "exact min-max": (
            "exact min-max, α 0", "exact min-max, α .25", "exact min-max, α held-out",
        ),
        "vlmq-paper": ("vlmq-gptq", "vlmq-paper, α 1", "vlmq-exact"),
    },
    "3 G": {
        "exact min-max": (
            "exact min-max, ℓ1", "exact min-max, ℓ2", "exact min-max, ℓ1 clipped",
            "exact min-max, ℓ1 floored",
        ),
        "vlmq-paper": ("gptaq", "vlmq-l2", "vlmq-paper, clipped", "vlmq-paper, floored"),
    },
    "4 weighed": {
        "exact min-max": ("exact min-max, ℓ1 on all 7",),
        "vlmq-paper": ("vlmq-qkv", "vlmq-paper, all 7"),
    },
    "5 residual": {
        "exact min-max": ("exact min-max, LoaQ residual",),
        "exact, damping 1 %": ("exact, LoaQ residual",),
    },
    "6 order": {
        "exact min-max": (
            "exact min-max, dynamic order", "exact min-max, static order",
            "exact min-max, natural order",
        ),
        "exact, damping 1 %": ("exact, static order",),
        "vlmq-paper": ("vlmq-paper, dynamic order",),
    },
    "7 after the loop": {"exact min-max": ("gptaq-exact", "exact min-max, scales refitted")},
    "8 rotation": {
        "exact min-max": ("exact min-max, rotated",), "vlmq-paper": ("vlmq-paper, rotated",),
    },
    "damping": {
        "exact min-max": ("exact min-max, damping .1 %", "exact min-max, damping 5 %"),
        "exact, damping 1 %": ("exact",),
        "vlmq, local importance, damping 1 %": ("vlmq, local importance",),
    },
    "importance": {
        "exact": (
            "vlmq, --no-smooth", "vlmq, not floored", "vlmq, not clipped",
            "vlmq, square root",
            "vlmq, local importance", "vlmq, local importance, per sample",
            "vlmq, local importance, square root",
        ),
    },
    "around the solve": {
        "vlmq, --no-smooth": ("vlmq, --no-smooth, rotated", "vlmq", "vlmq, rotated"),
        "vlmq": ("vlmq, tuned", "vlmq, tuned, rotated"),
    },
}  # fmt: skip


def names() -> list[str]:
    """Every row of EIGHT and every base, once."""
    held = [(base, *rows) for bases in EIGHT.values() for base, rows in bases.items()]
    return list(dict.fromkeys(name for rows in held for name in rows))


@contextmanager
def listed(name: str) -> Iterator[dict]:
    """A context in which an ablation is one of METHODS, where `quantize` looks for it.

    Gives its changes to the recipe. A name that is no ablation changes nothing.
    """
    if name not in ABLATIONS:
        yield {}
        return
    METHODS[name] = ABLATIONS[name].method
    try:
        yield ABLATIONS[name].config
    finally:
        del METHODS[name]


def ratios(cells: list[dict], field: str) -> list[dict]:
    """Each row's `field` over that of its base, on the same reference, grid and samples.

    Each ratio is a cell: `row`, which is "title: name", `grid` and `ratio`.
    """

    def key(cell: dict) -> tuple:
        return cell["reference"], cell["grid"], cell["calibration"], cell["samples"], cell["rows"]

    by_name: dict[str, dict[tuple, dict]] = {}
    for cell in cells:
        by_name.setdefault(cell["method"], {})[key(cell)] = cell
    found = []
    for title, bases in EIGHT.items():
        for base, rows in bases.items():
            for row in rows:
                for at, cell in by_name.get(row, {}).items():
                    if at in by_name.get(base, {}):
                        ratio = cell[field] / by_name[base][at][field]
                        name = f"{title}: {row}"
                        found.append({"row": name, "grid": cell["grid"], "ratio": ratio})
    return found
