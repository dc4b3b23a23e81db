"""What the precision of the statistics costs: in A, D, the shift W' − W, the codes, and the weighted loss after the solve.

    OMP_NUM_THREADS=1 python tools/bench/precision.py [--samples 128] [--json FILE]

The reference VLM (3 bits, importance-weighted, every linear of every layer from the same streams) and synthetic inputs with
heavy tails: column energies over six decades, one massive activation, a drift of 1 %. Products are emulated on the CPU: factors
rounded, sums in float32. Losses are those of the exact statistics, of the codes that the rounded ones lead to, against float32:
"reordered" is float32 with the tokens the other way round, the noise that any two machines have between them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch

from vlmq_export import bundled
from vlmq_export.quantizer import solver
from vlmq_export.quantizer.calibration import Preprocessor, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.families import DECODER_GROUPS, family_of
from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.layer import importance_factors, quantize_layer
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model import load_model
from vlmq_export.quantizer.statistics import Statistics, tf32
from vlmq_export.quantizer.streams import decoder_inputs
from vlmq_export.quantizer.walk import LayerWalk

PRECISIONS = ("float32", "reordered", "tf32", "bf16x3", "bf16", "tf32 walk")
BITS, GROUP = 3, 128


def sums_of(parts, precision: str) -> Statistics:
    """parts: (x, x̃, g) of each batch."""
    x, full, g = parts
    exact = precision in ("float32", "reordered", "tf32 walk")
    sums = Statistics.empty(x.shape[1], drift=True, precision="float32" if exact else precision)
    if precision == "reordered":
        x, full, g = x.flip(0), full.flip(0), None if g is None else g.flip(0)
    for i in range(0, len(x), 4096):
        sums.add(x[i : i + 4096], full[i : i + 4096], None if g is None else g[i : i + 4096])
    return sums.rounded()


def compare(w: torch.Tensor, parts, walked, table) -> None:
    """Add one linear's figures for every precision; `walked` are its inputs after a layer computed in TF32."""
    group = GROUP if w.shape[1] % GROUP == 0 else w.shape[1]
    first = None
    for name in PRECISIONS:
        if name == "tf32 walk" and walked is None:
            continue
        sums = sums_of(walked if name == "tf32 walk" else parts, name)
        a, d = sums.hessian, sums.drift
        ready = solver.prepare(a, sums.diagonal, group=group, act_order="gar", damp=0.01)
        target = solver.exact_target(w, ready, d, 1.0)
        codes = [
            solver.solve(w, ready, Affine(BITS), group=group, act_order="gar", block=128, columns=columns)
            for columns in (None, solver.column_term(ready, d, 0.25))
        ]
        codes.append(solver.solve(target, ready, Affine(BITS), group=group, act_order="gar", block=128))
        if first is None:
            first = a.clone(), d.clone(), target, codes
        aims = (w, first[2], first[2])
        row = table[name]
        row["A"].append(float((a - first[0]).norm() / first[0].norm()))
        row["D"].append(float((d - first[1]).norm() / first[1].norm().clamp_min(1e-30)))
        row["shift"].append(float((target - first[2]).norm() / (first[2] - w).norm().clamp_min(1e-30)))
        row["codes"].append(float((codes[1].codes == first[3][1].codes).float().mean()))
        for method, solution, base, aim in zip(("gptq", "gptaq", "exact"), codes, first[3], aims):
            energy = solver.weighted_loss(torch.zeros_like(aim), aim, first[0])
            row[method].append([solver.weighted_loss(s.decode(), aim, first[0]) / energy for s in (solution, base)])


def reference(samples: int) -> dict:
    checkpoint, preprocessor = Checkpoint(bundled.REFERENCE_VLM), Preprocessor(bundled.REFERENCE_VLM)
    rows = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:samples]]
    model, family = load_model(checkpoint, torch.device("cpu")), family_of(checkpoint.config)
    layers = list(model.get_submodule(family.module_name(family.layers).rstrip(".")))
    batches = decoder_inputs(model, layers[0], rows, two_streams=True, device=torch.device("cpu"))
    table: dict = defaultdict(lambda: defaultdict(list))
    config = QuantConfig(method="vlmq", bits=BITS, group_size=GROUP)
    for index, layer in enumerate(layers):
        if index:  # the streams of layer 0 are equal
            hidden = [(b.quantized, b.full) for b in batches]
            weights = {n: layer.get_submodule(n).weight.detach().clone() for g in DECODER_GROUPS for n in g}
            factors = importance_factors(LayerWalk(layer, batches, two_streams=True), METHODS["vlmq"])
            runs = [inputs_of(layer, batches, hidden), inputs_of(layer, batches, hidden, rounded=weights)]
            for stage, group in enumerate(DECODER_GROUPS):
                for name in group[: 1 if stage != 0 else 3]:
                    g = torch.cat(factors[name]) if name in factors else None
                    compare(weights[name], (*runs[0][stage], g), (*runs[1][stage], g), table)
            restore(batches, hidden)
        walk = LayerWalk(layer, batches, two_streams=True)
        quantize_layer(walk, "", family.groups, config)
        walk.advance()
    return summary(table)


def restore(batches, hidden) -> None:
    for batch, (quantized, full) in zip(batches, hidden):
        batch.quantized, batch.full = quantized, full


def inputs_of(layer, batches, hidden, rounded=None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, x̃) of each group over all tokens, source weights throughout; `rounded`: linears compute as TF32 would."""
    restore(batches, hidden)
    handles = []
    for name, weight in (rounded or {}).items():
        module = layer.get_submodule(name)
        module.weight.copy_(tf32(weight))
        handles.append(module.register_forward_pre_hook(lambda _m, args: (tf32(args[0].contiguous()),)))
    walk = LayerWalk(layer, batches, two_streams=True)
    runs = []
    for stage in range(len(DECODER_GROUPS)):
        pairs = list(walk.inputs(stage))
        runs.append(tuple(torch.cat([p[i] for p in pairs]) for i in (0, 1)))
    for handle in handles:
        handle.remove()
    for name, weight in (rounded or {}).items():
        layer.get_submodule(name).weight.copy_(weight)
    return runs


def synthetic(columns: int = 512, tokens: int = 8192) -> dict:
    table: dict = defaultdict(lambda: defaultdict(list))
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
        x = torch.randn(tokens, columns, generator=g) @ mix
        x *= torch.randn(tokens, 1, generator=g).exp() * (torch.randn(columns, generator=g) * 1.5).exp()
        x[::97, 7] = 3000.0  # a massive activation: one column, the same value at some tokens
        full = x + 0.01 * x.abs().mean(0) * torch.randn(tokens, columns, generator=g) + 0.01 * x.roll(1, dims=1)
        w = 0.02 * torch.randn(256, columns, generator=g)
        compare(w, (x, full, torch.rand(tokens, generator=g).square()), None, table)
    return summary(table)


def summary(table: dict) -> dict:
    rows = {}
    for name, columns in table.items():
        row = {key: max(columns[key]) for key in ("A", "D", "shift")} | {
            "codes": sum(columns["codes"]) / len(columns["codes"])
        }
        for method in ("gptq", "gptaq", "exact"):
            ours, base = (sum(pair[i] for pair in columns[method]) for i in (0, 1))
            row[method] = ours / base - 1
        rows[name] = row
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for title, run in (("synthetic", synthetic), ("reference", lambda: reference(args.samples))):
        results[title] = run()
        print(f"{title:10} worst A  worst D  worst shift  codes equal   loss: gptq  gptaq  exact target")
        for name, r in results[title].items():
            print(
                f"{name:10} {r['A']:.1e}  {r['D']:.1e}  {r['shift']:.1e}      {r['codes']:8.3%}"
                f"    {r['gptq']:+.4%} {r['gptaq']:+.4%} {r['exact']:+.4%}", flush=True,
            )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
