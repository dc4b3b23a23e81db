"""One layer's linears through our solver and through GPTQModel's, in turns.

    OMP_NUM_THREADS=1 python tools/bench/solver.py [--columns 256 1024] [--repeat 3] [--json FILE]

Both get the same weights, grid and column order, and the same float32 Hessian, already summed. Both
factorize it once for the linears that share an input, GPTQModel through its own shared cache, and
both give back decoded weights.

The figures are the median over pairs of runs of our CPU seconds / theirs, and the ratio of the
weighted losses tr((Ŵ − W)·A·(Ŵ − W)ᵀ), summed over the linears. On a GPU seconds are wall time.
Where GPTQModel is not installed, our solver alone is measured, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start on two cores otherwise
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.hessian import prepare, weighted_loss

# Column order → our `act_order`, and GPTQModel's options.
ORDERS = {
    "natural": ("off", {}),
    "act_order": ("dynamic", {"desc_act": True}),
    "gar": ("gar", {"act_group_aware": True}),
}
DAMP = 0.01


@dataclass(frozen=True)
class Group:
    """Linears of one layer that share an input."""

    names: tuple[str, ...]
    rows: tuple[int, ...]  # out_features of each
    columns: int  # in_features of all


def layer_groups(columns: int) -> list[Group]:
    """The linears of a decoder layer of Qwen2's kind, with `columns` inputs each.

    K and V have an eighth of the outputs. The MLP is only as wide as its input, unlike that of a
    real layer, so that every Hessian has the size that the run is about.
    """
    kv = max(columns // 8, 32)
    return [
        Group(("q", "k", "v"), (columns, kv, kv), columns),
        Group(("o",), (columns,), columns),
        Group(("gate", "up"), (columns, columns), columns),
        Group(("down",), (columns,), columns),
    ]


def hessian(
    columns: int, generator: torch.Generator, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = XᵀX and Σx² of random inputs that are heavy-tailed and correlated.

    As in real layers a few columns are far larger than the rest.
    """
    tokens = 2 * columns
    scale = torch.randn(columns, generator=generator).exp()
    x = torch.randn(tokens, columns, generator=generator) * scale
    left = torch.randn(tokens, 8, generator=generator)
    shared = left @ torch.randn(8, columns, generator=generator)
    x += x.roll(1, dims=1) * 0.5 + shared
    x = x.to(device)
    return x.T @ x, x.square().sum(0)


def ours(
    weights: list[torch.Tensor], a: torch.Tensor, diagonal: torch.Tensor, bits: int, order: str
) -> list[torch.Tensor]:
    """The decoded weights of linears that share an input, from our solver."""
    act_order, group = ORDERS[order][0], 128
    ready = prepare(a, diagonal, group=group, act_order=act_order, damp=DAMP)
    stacked = torch.cat(weights)
    solution = solve(stacked, ready, Affine(bits), group=group, act_order=act_order, block=128)
    return list(solution.decode().split([len(w) for w in weights]))


def theirs(
    weights: list[torch.Tensor], a: torch.Tensor, bits: int, order: str, tokens: int
) -> list[torch.Tensor]:
    """The same from GPTQModel's, which also wants the number of tokens in `a`."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ, SharedHessianFactorCache

    options = {"desc_act": False, "act_group_aware": False} | ORDERS[order][1]
    config = QuantizeConfig(
        bits=bits, group_size=128, sym=False, damp_percent=DAMP, offload_to_disk=False, **options
    )
    cache = SharedHessianFactorCache(0, "layer")
    decoded = []
    for w in weights:
        module = nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device)
        module.weight.data = w.clone()
        task = GPTQ(module, config)
        task.quantizer.configure(perchannel=True)
        task.H, task._hessian_total_samples, task.nsamples = a.clone(), tokens, tokens
        task.attach_shared_hessian_cache(cache)
        decoded.append(task.quantize()[0].float())
    return decoded


def cpu_seconds(call: Callable[[], list[torch.Tensor]]) -> tuple[float, float, list[torch.Tensor]]:
    """CPU seconds of the process, wall seconds, and what `call` returns.

    On a GPU the first is wall time too.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return (wall if torch.cuda.is_available() else cpu), wall, result


def measure(
    columns: int, order: str, bits: int, repeat: int, device: str, *, both: bool = True
) -> dict:
    """One row of the table: `repeat` pairs of runs over all linears of a layer.

    Without `both` our solver runs alone, and everything that compares is None.
    """
    generator = torch.Generator().manual_seed(columns)
    totals = [[0.0, 0.0] for _ in range(repeat)]
    losses = [0.0, 0.0]
    for group in layer_groups(columns):
        a, diagonal = hessian(columns, generator, device)
        shapes = [(rows, columns) for rows in group.rows]
        weights = [(torch.randn(s, generator=generator) * 0.02).to(device) for s in shapes]
        calls = (
            lambda w=weights, a=a, d=diagonal: ours(w, a, d, bits, order),
            lambda w=weights, a=a: theirs(w, a, bits, order, 2 * columns),
        )
        for i in range(repeat):
            for which in ((0, 1) if i % 2 == 0 else (1, 0)) if both else (0,):
                seconds, _, decoded = cpu_seconds(calls[which])
                totals[i][which] += seconds
                if i == 0:
                    losses[which] += sum(weighted_loss(q, w, a) for q, w in zip(decoded, weights))
    return {
        "columns": columns,
        "order": order,
        "bits": bits,
        "ours": statistics.median(t[0] for t in totals),
        "theirs": statistics.median(t[1] for t in totals) if both else None,
        "ratio": statistics.median(t[0] / t[1] for t in totals) if both else None,
        "ratios": [round(t[0] / t[1], 3) for t in totals] if both else None,
        "loss": losses[0] / losses[1] if both else None,
    }


def line_of(row: dict) -> str:
    """A row of the table."""
    start = f"{row['columns']:7} {row['order']:9} {row['ours']:7.2f}"
    if row["ratio"] is None:
        return f"{start}         -      -         -   -"
    compared = f"{row['theirs']:9.2f} {row['ratio']:6.3f} {row['loss']:9.5f}   {row['ratios']}"
    return f"{start} {compared}"


def main() -> None:
    """Print the table, a row for each width and order, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[256, 896, 1536, 3584])
    parser.add_argument("--orders", nargs="+", choices=list(ORDERS), default=["gar"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    both = find_spec("gptqmodel") is not None
    if not both:
        print("gptqmodel is not installed here: our solver alone is measured, nothing is compared")
    # The first call of each side pays for imports.
    with torch.no_grad():
        measure(256, "natural", args.bits, 1, args.device, both=both)
    rows = []
    print("columns order      ours s  theirs s  ratio   loss ours/theirs   pairs")
    for columns in args.columns:
        for order in args.orders:
            with torch.no_grad():
                row = measure(columns, order, args.bits, args.repeat, args.device, both=both)
            rows.append(row)
            print(line_of(row), flush=True)
    if args.json:
        found = {"device": args.device, "threads": torch.get_num_threads(), "rows": rows}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
