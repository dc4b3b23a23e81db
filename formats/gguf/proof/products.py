"""L2: every product of the real run against the same product with emulated activation rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np

from vlmq_export.formats.gguf.proof import emulate
from vlmq_export.formats.gguf.proof.rows import Exported, gated, worst_of
from vlmq_export.formats.gguf.runtime.runner import Run
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.proof.checks import Check
from vlmq_export.formats.proof.reference import Reference

# Most error of a row. It is ten times what a right file gives (5e-8), and a tenth of what one
# float16 scale gives that is off by one unit in the last place (3e-6): docs/verification.md.
E_ROW = 3e-7


def products(export: Exported, run: Run) -> Iterator[Check]:
    """A row for the language model, one for the vision tower, and one for what was not seen."""
    layout, weights = export.layout, export.reference.weights
    text = [name for name in run.captured if name in layout.text]
    places = ((n, layout.text[n]) for n in text)
    experts = _experts(layout, run)
    named = chain(
        ((n, p.hub, p.of_array(weights.array(p.hub))) for n, p in places),
        ((n, hub, weights.array(hub)) for n, hub in experts.items()),
    )
    yield _row_errors(export, run, "language model", named)
    vision = {n: array for n, array in export.tower() if layout.vision[n].linear}
    seen = ((n, n, vision[n]) for n in run.captured if n in vision)
    yield _row_errors(export, run, "vision tower", seen)
    linears = {f"{n}.weight" for n in weights.linears} - {p.hub for p in layout.vision.values()}
    unseen = linears - {layout.text[n].hub for n in text} - _beside(layout, experts)
    if "output.weight" in layout.text:  # the embedding's rows are taken then, and not multiplied
        unseen -= {layout.text["token_embd.weight"].hub}
    unseen |= set(vision) - set(run.captured)
    yield gated(
        "L2",
        "linears seen in the run",
        len(unseen),
        0,
        unit="missing",
        compared=len(linears) + len(vision),
        worst=", ".join(sorted(unseen)[:4]),
    )


def _experts(layout: Layout, run: Run) -> dict[str, str]:
    """Name in the run of each expert's matrix that was multiplied → its hub name."""
    stacks = {name: place.hubs for name, place in layout.text.items() if place.experts}
    named = {f"{n}.{e}": hub for n, hubs in stacks.items() for e, hub in enumerate(hubs)}
    return {name: named[name] for name in run.captured if name in named}


def _beside(layout: Layout, seen: Mapping[str, str]) -> set[str]:
    """The matrices of tensors of which some expert was seen.

    To another one perhaps no token of the run comes, and nothing is multiplied with it.
    """
    places = [place for place in layout.text.values() if place.experts]
    return {hub for p in places if not {*seen.values()}.isdisjoint(p.hubs) for hub in p.hubs}


def _row_errors(
    export: Exported,
    run: Run,
    part: str,
    # (GGUF name, name to report, what it must decode to: [out, in])
    weights: Iterable[tuple[str, str, np.ndarray]],
) -> Check:
    errors: dict[str, float] = {}
    for name, said, weight in weights:
        x, y = run.product(name)
        tensor = name if name in export.types else name.rpartition(".")[0]  # of all experts
        type_ = export.types[tensor]
        rounding = emulate.ACTIVATIONS.get(type_)
        if rounding is None or weight.shape != (y.shape[1], x.shape[1]):
            errors[f"{said} ({type_}, {y.shape[1]} × {x.shape[1]})"] = float("nan")
            continue
        offset = None
        if rounding == "Q8_1":
            offset = export.layout.text[tensor].of_array(_offset(export.reference, said))
        e = emulate.row_error(y, emulate.product(x, weight, rounding, offset), x, weight)
        errors[f"{said} row {int(e.argmax())}"] = float(e.max())
    name, value = worst_of(errors)
    by_error = sorted(errors, key=lambda n: errors[n], reverse=True)
    above = [n for n in by_error if not errors[n] <= E_ROW]
    return gated(
        "L2",
        f"every product of the {part}",
        value,
        E_ROW,
        unit="worst row",
        compared=len(errors),
        worst=", ".join(above[:8]) or name,
        detail="‖Δ row‖ / (‖w row‖ · ‖X‖) against the emulated activation rounding,"
        " on text and on an image",
    )


def _offset(reference: Reference, hub: str) -> np.ndarray:
    """m of w = d·q + m for every block of 32 columns, float32 [out, in/32].

    It is −scale · zero_point, or what the artifact keeps in its place.
    """
    module = hub.removesuffix(".weight")
    if f"{module}.dmin" in reference.weights.parts:
        return -reference.weights.tensor(f"{module}.dmin").numpy().astype(np.float32)
    parts = ("scales", "zero_points", "g_idx")
    scales, zeros, g_idx = (reference.weights.tensor(f"{module}.{k}").numpy() for k in parts)
    group = g_idx[::32]
    return -scales.astype(np.float32)[:, group] * zeros.astype(np.float32)[:, group]
