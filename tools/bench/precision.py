"""What the precision of the statistics costs, from the sums themselves to the loss after the solve.

    OMP_NUM_THREADS=1 python tools/bench/precision.py [--samples 128] [--json FILE]

Compared are A, D, the shift W' − W, the codes, and the weighted loss. There are two sources of
inputs:

    reference   the reference VLM at 3 bits, importance-weighted, every linear of every layer from
                the same streams
    synthetic   inputs with heavy tails: column energies over six decades, one massive activation,
                a drift of 1 %

A product in less than float32 is emulated on the CPU: its factors are rounded, and its sums are in
float32. The loss of a precision is that of its codes under the float32 statistics, against the loss
of the float32 codes. `reordered` is float32 with the tokens in reverse order, which is the noise
that any two machines have between them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmq_export import bundled
from vlmq_export.quantizer.calibration.batches import Batch, decoder_inputs
from vlmq_export.quantizer.calibration.collect import importance_factors, raw_factors
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.calibration.statistics import Precision, Statistics, tf32
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import DECODER, groups_of
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.hessian import column_term, exact_target, prepare, weighted_loss

# Row of the table → the precision of its products. `tf32 walk` has inputs from a layer that was
# computed in TF32.
PRODUCTS: dict[str, Precision] = {
    "float32": "float32",
    "reordered": "float32",
    "tf32": "tf32",
    "bf16x3": "bf16x3",
    "bf16": "bf16",
    "tf32 walk": "float32",
}
SOLVES = ("gptq", "gptaq", "exact")
BITS, GROUP = 3, 128
CPU = torch.device("cpu")

# One linear's inputs over all tokens: x and x̃ [tokens, in], and the weights g [tokens] or None.
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
# Precision → figure → one entry for each linear.
Table = dict[str, dict[str, list]]


@dataclass(frozen=True)
class Solved:
    """What one linear's statistics in one precision lead to."""

    a: torch.Tensor  # the weighted Hessian, [in, in]
    d: torch.Tensor  # the weighted drift, [in, in]
    target: torch.Tensor  # W' of the exact objective, [out, in]
    codes: list[Solution]  # of each of SOLVES


def solved(w: torch.Tensor, inputs: Inputs, precision: str) -> Solved:
    """Sum the statistics in a precision, and solve for W [out, in] with each of SOLVES."""
    group = GROUP if w.shape[1] % GROUP == 0 else w.shape[1]
    sums = sums_of(inputs, precision)
    ready = prepare(sums.hessian, sums.diagonal, group=group, act_order="gar", damp=0.01)
    assert sums.drift is not None, "these statistics have two streams"
    target = exact_target(w, ready, sums.drift, 1.0)
    aims = ((w, None), (w, column_term(ready, sums.drift, 0.25)), (target, None))
    codes = [
        solve(aim, ready, Affine(BITS), group=group, act_order="gar", block=128, column_term=term)
        for aim, term in aims
    ]
    return Solved(sums.hessian, sums.drift, target, codes)


def sums_of(inputs: Inputs, precision: str) -> Statistics:
    """The statistics of one linear's inputs, summed in a precision."""
    x, full, g = inputs
    sums = Statistics.empty(x.shape[1], drift=True, precision=PRODUCTS[precision])
    if precision == "reordered":
        x, full, g = x.flip(0), full.flip(0), None if g is None else g.flip(0)
    for i in range(0, len(x), 4096):
        sums.add(x[i : i + 4096], full[i : i + 4096], None if g is None else g[i : i + 4096])
    return sums.to_float32()


def compare(w: torch.Tensor, inputs: Inputs, walked: Inputs | None, table: Table) -> None:
    """Add the figures of one linear in every precision to the table.

    walked: its inputs from a layer computed in TF32; None leaves this row out.
    """
    first = solved(w, inputs, "float32")
    for name in PRODUCTS:
        given = walked if name == "tf32 walk" else inputs
        if given is None:
            continue
        found = first if name == "float32" else solved(w, given, name)
        row, shift = table[name], first.target - w
        row["A"].append(_change(found.a, first.a, first.a.norm()))
        row["D"].append(_change(found.d, first.d, first.d.norm()))
        row["shift"].append(_change(found.target, first.target, shift.norm()))
        row["codes"].append(float((found.codes[1].codes == first.codes[1].codes).float().mean()))
        aims = (w, first.target, first.target)
        for method, mine, base, aim in zip(SOLVES, found.codes, first.codes, aims):
            energy = weighted_loss(torch.zeros_like(aim), aim, first.a)
            losses = [weighted_loss(s.decode(), aim, first.a) / energy for s in (mine, base)]
            row[method].append(losses)


def _change(found: torch.Tensor, first: torch.Tensor, whole: torch.Tensor) -> float:
    """‖found − first‖ / whole."""
    return float((found - first).norm() / whole.clamp_min(1e-30))


def reference(samples: int) -> dict:
    """The summary of the bundled reference VLM on its calibration rows."""
    checkpoint = Checkpoint(bundled.REFERENCE_VLM)
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    rows = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:samples]]
    model = load_model(checkpoint, CPU)
    job = Job.of(
        checkpoint.architecture, QuantConfig(method="vlmq-paper", bits=BITS, group_size=GROUP)
    )
    layers: Any = model.get_submodule(job.family.module_name(job.family.layers).rstrip("."))
    batches = decoder_inputs(model, rows, two_streams=True, device=CPU)
    table: Table = defaultdict(lambda: defaultdict(list))
    for index, layer in enumerate(layers):
        if index:  # the streams of layer 0 are equal
            _compare_layer(layer, batches, table)
        walk = LayerWalk(layer, DECODER, batches, two_streams=True)
        quantize_layer(walk, job.prefix(index), job)
        walk.advance()
    return summary(table)


def _compare_layer(layer: Any, batches: list[Batch], table: Table) -> None:
    """Add the linears of one layer to the table. The batches stay at the layer's inputs."""
    hidden = [(b.quantized, b.full) for b in batches]
    names = [name for group in groups_of(DECODER) for name in group]
    weights = {n: layer.get_submodule(n).weight.detach().clone() for n in names}
    walk, method = LayerWalk(layer, DECODER, batches, two_streams=True), METHODS["vlmq-paper"]
    factors = importance_factors(walk, raw_factors(walk, method), method)
    plain = inputs_of(layer, batches, hidden)
    walked = inputs_of(layer, batches, hidden, rounded=weights)
    for stage, group in enumerate(groups_of(DECODER)):
        for name in group[: 1 if stage != 0 else 3]:
            g = torch.cat(factors[name]) if name in factors else None
            compare(weights[name], (*plain[stage], g), (*walked[stage], g), table)
    restore(batches, hidden)


def restore(batches: list[Batch], hidden) -> None:
    """Give the batches back the hidden states of both streams."""
    for batch, (quantized, full) in zip(batches, hidden):
        batch.quantized, batch.full = quantized, full


def inputs_of(
    layer: Any,
    batches: list[Batch],
    hidden: list[tuple],  # the layer's inputs, of both streams, for each batch
    rounded: dict[str, torch.Tensor] | None = None,  # linears that compute as TF32 would
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """x and x̃ of each group of linears over all tokens, with source weights throughout."""
    restore(batches, hidden)
    handles = []
    for name, weight in (rounded or {}).items():
        module = layer.get_submodule(name)
        module.weight.copy_(tf32(weight))
        handles.append(
            module.register_forward_pre_hook(lambda _m, args: (tf32(args[0].contiguous()),))
        )
    walk = LayerWalk(layer, DECODER, batches, two_streams=True)
    runs = []
    for stage in range(2 * len(DECODER)):
        found = list(walk.inputs(stage))
        runs.append((torch.cat([f.quantized for f in found]), torch.cat([f.full for f in found])))
    for handle in handles:
        handle.remove()
    for name, weight in (rounded or {}).items():
        layer.get_submodule(name).weight.copy_(weight)
    return runs


def synthetic(columns: int = 512, tokens: int = 8192) -> dict:
    """The summary of three random linears with heavy-tailed inputs."""
    table: Table = defaultdict(lambda: defaultdict(list))
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
        x = torch.randn(tokens, columns, generator=g) @ mix
        of_token = torch.randn(tokens, 1, generator=g).exp()
        x *= of_token * (torch.randn(columns, generator=g) * 1.5).exp()
        x[::97, 7] = 3000.0  # a massive activation: one column, the same value at some tokens
        noise = 0.01 * x.abs().mean(0) * torch.randn(tokens, columns, generator=g)
        full = x + noise + 0.01 * x.roll(1, dims=1)
        w = 0.02 * torch.randn(256, columns, generator=g)
        compare(w, (x, full, torch.rand(tokens, generator=g).square()), None, table)
    return summary(table)


def summary(table: Table) -> dict:
    """Each precision's worst A, D and shift, its share of equal codes, and its change of loss."""
    rows = {}
    for name, figures in table.items():
        row = {key: max(figures[key]) for key in ("A", "D", "shift")}
        row["codes"] = sum(figures["codes"]) / len(figures["codes"])
        for method in SOLVES:
            ours, base = (sum(pair[i] for pair in figures[method]) for i in (0, 1))
            row[method] = ours / base - 1
        rows[name] = row
    return rows


@torch.no_grad()
def main() -> None:
    """Print both summaries, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for title, run in (("synthetic", synthetic), ("reference", lambda: reference(args.samples))):
        results[title] = run()
        print(
            f"{title:10} worst A  worst D  worst shift  codes equal"
            "   loss: gptq  gptaq  exact target"
        )
        for name, r in results[title].items():
            print(
                f"{name:10} {r['A']:.1e}  {r['D']:.1e}  {r['shift']:.1e}      {r['codes']:8.3%}"
                f"    {r['gptq']:+.4%} {r['gptaq']:+.4%} {r['exact']:+.4%}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
