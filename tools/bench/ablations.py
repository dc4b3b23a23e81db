"""The eight ablations of the quality bench: a named method with one thing changed, measured against that method.

Each is a row like those of METHODS, and what it wants of the recipe; docs/quality.md tells what they gave. A title of EIGHT
has the rows that answer it, under the method that they are held against; rows of METHODS answer some. A row that ends in
`, rotated` is the method before it with `--rotate folded`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from vlmq_export.quantizer.methods import METHODS, Method, Refinement

EXACT, VLMQ = METHODS["exact"], METHODS["vlmq"]
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of min-max, tried for each row
EFFECTIVE = 16.0  # tokens for each input that a floor leaves
CLIP = 10.0  # times the mean of g²


@dataclass(frozen=True)
class Ablation:
    method: Method
    config: dict = field(default_factory=dict)  # changes to the QuantConfig
    grouped: bool = False  # whether it changes nothing per channel


def _outcome(**more) -> Method:
    return replace(EXACT, refine=replace(EXACT.refine, shrink=SHARES), **more)


ABLATIONS = {
    "exact, ranges by modality": Ablation(replace(EXACT, ranges="modality")),
    "exact, ranges by modality, zero-points": Ablation(replace(EXACT, ranges="modality", neighbours=True)),
    "exact, ranges by outcome": Ablation(_outcome()),
    "exact, ranges by outcome, zero-points": Ablation(_outcome(neighbours=True)),
    "vlmq, ranges by modality": Ablation(replace(VLMQ, ranges="modality")),
    "exact, α 0": Ablation(replace(EXACT, alpha=0.0)),
    "exact, α .25": Ablation(replace(EXACT, alpha=0.25)),
    "vlmq, α 1": Ablation(replace(VLMQ, alpha=1.0)),
    "exact, importance ℓ1": Ablation(replace(EXACT, importance="l1")),
    "exact, importance ℓ2": Ablation(replace(EXACT, importance="l2")),
    "exact, importance ℓ1 clipped": Ablation(replace(EXACT, importance="l1", clip=CLIP)),
    "exact, importance ℓ1 floored": Ablation(replace(EXACT, importance="l1", effective=EFFECTIVE)),
    "vlmq, clipped": Ablation(replace(VLMQ, clip=CLIP)),
    "vlmq, floored": Ablation(replace(VLMQ, effective=EFFECTIVE)),
    "exact, importance ℓ1, all 7": Ablation(replace(EXACT, importance="l1", weighs="all")),
    "vlmq, all 7": Ablation(replace(VLMQ, weighs="all")),
    "exact, LoaQ residual": Ablation(replace(EXACT, residual=True)),
    "exact, act-order dynamic": Ablation(EXACT, {"act_order": "dynamic"}, grouped=True),
    "exact, act-order static": Ablation(EXACT, {"act_order": "static"}, grouped=True),
    "exact, natural order": Ablation(EXACT, {"act_order": "off"}),
    "vlmq, act-order dynamic": Ablation(VLMQ, {"act_order": "dynamic"}, grouped=True),
    "vlmq, natural order": Ablation(VLMQ, {"act_order": "off"}),
    "exact, scales refitted": Ablation(replace(EXACT, refine=Refinement(sweeps=4, refit=True))),
    "exact, damping .1 %": Ablation(EXACT, {"damp": 0.001}),
    "exact, damping 5 %": Ablation(EXACT, {"damp": 0.05}),
}

EIGHT: dict[str, dict[str, tuple[str, ...]]] = {
    "1 ranges (min-max)": {
        "exact": tuple(name for name in ABLATIONS if name.startswith("exact, ranges")),
        "vlmq": ("vlmq, ranges by modality",),
    },
    "2 α (1; of vlmq .25)": {
        "exact": ("exact, α 0", "exact, α .25", "exact-held"),
        "vlmq": ("vlmq-gptq", "vlmq, α 1", "vlmq-exact"),
    },
    "3 G (none; of vlmq ℓ1)": {
        "exact": tuple(
            f"exact, importance {kind}" for kind in ("ℓ1", "ℓ2", "ℓ1 clipped", "ℓ1 floored")
        ),
        "vlmq": ("gptaq", "vlmq-l2", "vlmq, clipped", "vlmq, floored"),
    },
    "4 weighed (none; of vlmq q, k, v, o)": {
        "exact": ("exact, importance ℓ1, all 7",),
        "vlmq": ("vlmq-qkv", "vlmq, all 7"),
    },
    "5 residual (none)": {"exact": ("exact, LoaQ residual",)},
    "6 order (group-aware)": {
        "exact": ("exact, act-order dynamic", "exact, act-order static", "exact, natural order"),
        "vlmq": ("vlmq, act-order dynamic", "vlmq, natural order"),
    },
    "7 after the loop (three sweeps)": {"exact": ("gptaq-exact", "exact, scales refitted")},
    "8 rotation (none)": {"exact": ("exact, rotated",), "vlmq": ("vlmq, rotated",)},
    "damping (1 %)": {"exact": ("exact, damping .1 %", "exact, damping 5 %")},
}  # fmt: skip


def names() -> list[str]:
    """Every row of EIGHT, once, and the methods that they are held against."""
    held = [(base, *rows) for bases in EIGHT.values() for base, rows in bases.items()]
    return list(dict.fromkeys(name for rows in held for name in rows))


@contextmanager
def listed(name: str) -> Iterator[dict]:
    """While it lasts the ablation is one of METHODS, where `quantize` looks for it. Gives its changes to the recipe."""
    if name not in ABLATIONS:
        yield {}
        return
    METHODS[name] = ABLATIONS[name].method
    try:
        yield ABLATIONS[name].config
    finally:
        del METHODS[name]


def ratios(cells: list[dict], field: str) -> list[dict]:
    """Of each row of EIGHT `row`, "title: name", and `ratio`, its `field` over its base's on the same grid and samples."""

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
                        found.append({"row": f"{title}: {row}", "grid": cell["grid"], "ratio": ratio})
    return found
