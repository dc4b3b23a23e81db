"""The walk and the solver at a model's true shape: random weights, true token counts, seconds and peak memory by phase and layer.

    python tools/bench/pipeline.py --shape 7b --layers 3                # one GPU; under ten minutes with both methods
    OMP_NUM_THREADS=1 python tools/bench/pipeline.py --scaling          # CPU, small: more layers, more samples
    OMP_NUM_THREADS=1 python tools/bench/pipeline.py --reference 3      # CPU: vlmq / gptaq on the bundled model, three pairs

Decoder layers only: weights are drawn on the device, layer after layer, and the decoder's inputs are random. What a run has besides
(reading shards, vision tower, writing layers) is not in the figures. The total for all layers is an extrapolation: the first
layer, whose streams are equal, once, and the mean of the others for each of the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import vlmq_export  # noqa: E402

if not hasattr(vlmq_export, "quantizer"):
    vlmq_export.__path__.append(str(ROOT))  # vlmq_export.quantizer is the folder quantizer/ when nothing is installed

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling  # noqa: E402

from vlmq_export.quantizer import layer as layer_module  # noqa: E402
from vlmq_export.quantizer import solver  # noqa: E402
from vlmq_export.quantizer.calibration import Preprocessor, read_rows  # noqa: E402
from vlmq_export.quantizer.checkpoint import Checkpoint  # noqa: E402
from vlmq_export.quantizer.config import QuantConfig  # noqa: E402
from vlmq_export.quantizer.families import DECODER_GROUPS  # noqa: E402
from vlmq_export.quantizer.methods import method_named  # noqa: E402
from vlmq_export.quantizer.model import exact_arithmetic  # noqa: E402
from vlmq_export.quantizer.quantize import quantize  # noqa: E402
from vlmq_export.quantizer.shelf import Shelf  # noqa: E402
from vlmq_export.quantizer.solving import Stack  # noqa: E402
from vlmq_export.quantizer.streams import BATCH_TOKENS, Batch  # noqa: E402
from vlmq_export.quantizer.walk import LayerWalk  # noqa: E402


@dataclass(frozen=True)
class Shape:
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int


SHAPES = {
    "7b": Shape(3584, 18944, 28, 4, 28),  # Qwen2.5-VL-7B
    "3b": Shape(2048, 11008, 16, 2, 36),
    "7b-quarter": Shape(896, 4736, 7, 1, 28),  # with a quarter of the tokens: the same shares of time, for a CPU
    "small": Shape(384, 1536, 6, 2, 8),
}


class Phases:
    """Seconds by phase; phases do not overlap: what a phase calls is taken off it."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._inner = device, defaultdict(float), [0.0]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextmanager
    def __call__(self, name: str):
        start = self.now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            total = self.now() - start
            self.seconds[name] += total - self._inner.pop()
            self._inner[-1] += total

    def watch(self, owner, function: str, name: str):
        inner = getattr(owner, function)

        def timed(*args, **kwargs):
            with self(name):
                return inner(*args, **kwargs)

        setattr(owner, function, timed)
        return lambda: setattr(owner, function, inner)


def config_of(shape: Shape):
    head = shape.hidden // shape.heads
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=shape.layers, max_window_layers=shape.layers, vocab_size=8,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head // 16 * 3, head // 16 * 3]},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def decoder_batches(shape: Shape, config, samples: int, length: int, shelf: Shelf, two_streams: bool) -> list[Batch]:
    """Random inputs with a few large columns, as residual streams have."""
    device = shelf.device
    generator = torch.Generator(device).manual_seed(0)
    scale = torch.randn(shape.hidden, generator=generator, device=device).exp()
    rotary = modeling.Qwen2_5_VLRotaryEmbedding(config).to(device)
    size = max(1, BATCH_TOKENS // length)
    batches = []
    for start in range(0, samples, size):
        count = min(size, samples - start)
        hidden = torch.randn(count, length, shape.hidden, generator=generator, device=device) * scale
        positions = torch.arange(length, device=device).view(1, 1, length).expand(3, count, length)
        kwargs = {"attention_mask": None, "position_ids": None, "position_embeddings": rotary(hidden, positions)}
        valid = torch.ones(count, dtype=torch.bool, device=device)
        batches.append(Batch(hidden, hidden if two_streams else None, kwargs, valid, shelf=shelf))
    return batches


def random_layer(config, index: int, device: torch.device) -> torch.nn.Module:
    with torch.device("meta"):
        layer = modeling.Qwen2_5_VLDecoderLayer(config, 0)
    layer = layer.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(index)
    for name, parameter in layer.named_parameters():
        if "layernorm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    return layer


def peak_memory(device: torch.device, *, reset: bool = False) -> int:
    """Bytes held at most since the last reset: on the device, or by the process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@torch.no_grad()
def run(
    shape: Shape, method: str, layers: int, samples: int, length: int, device: torch.device, place: str
) -> list[dict]:
    """One entry a layer: seconds by phase, peak memory."""
    config, quant = config_of(shape), QuantConfig(method=method, bits=4, group_size=128)
    two_streams = method_named(method).two_streams
    batches = decoder_batches(shape, config, samples, length, Shelf(device, place), two_streams)
    results = []
    for index in range(layers):
        phases = Phases(device)
        undo = [
            phases.watch(layer_module, "importance_factors", "importance"),
            phases.watch(layer_module, "collect", "walk and statistics"),
            phases.watch(Stack, "_losses", "metrics"),
            phases.watch(solver, "prepare", "factorize"),
            phases.watch(solver, "column_term", "column term"),
            phases.watch(solver, "regression", "target"),
            phases.watch(solver, "solve", "column loop"),
        ]
        peak_memory(device, reset=True)
        with exact_arithmetic(), phases("rest"):
            layer = random_layer(config, index, device)
            with phases("walk and statistics"):
                walk = LayerWalk(layer, batches, two_streams=two_streams)
            layer_module.quantize_layer(walk, "", DECODER_GROUPS, quant)
            with phases("advance"):
                walk.advance()
        for restore in undo:
            restore()
        del layer, walk
        results.append(
            {"seconds": dict(phases.seconds), "total": sum(phases.seconds.values()), "peak": peak_memory(device)}
        )
    return results


def shown(title: str, results: list[dict], of: int) -> float:
    names = sorted({n for r in results for n in r["seconds"]})
    unit = "wall s" if torch.cuda.is_available() else "CPU s"
    print(f"\n{title}, {unit}\nlayer    total  peak GB  " + "  ".join(names))
    for i, r in enumerate(results):
        parts = "  ".join(f"{r['seconds'].get(n, 0):{len(n)}.2f}" for n in names)
        print(f"{i:5} {r['total']:8.2f} {r['peak'] / 1e9:8.2f}  {parts}")
    rest = [r["total"] for r in results[1:]] or [results[0]["total"]]
    whole = results[0]["total"] + (of - 1) * sum(rest) / len(rest)
    print(f"extrapolated to {of} layers: {whole:.0f} {unit}", flush=True)
    return whole


def scaling(device: torch.device, place: str) -> dict:
    """Time against samples and layers, memory against layers, at the small shape."""
    shape, found = SHAPES["small"], {}
    run(shape, "gptaq", 1, 8, 64, device, place)  # the first call of everything
    for samples in (32, 64, 128):
        results = run(shape, "vlmq", 3, samples, 128, device, place)
        found[f"{samples} samples"] = results
        shown(f"small, vlmq, {samples} samples of 128 tokens", results, shape.layers)
    results = run(shape, "vlmq", 8, 32, 128, device, place)
    found["8 layers"] = results
    shown("small, vlmq, 32 samples, 8 layers", results, shape.layers)
    walked = ["importance", "walk and statistics", "advance"]
    for samples in (32, 64, 128):
        seconds = sum(r["seconds"][n] for r in found[f"{samples} samples"][1:] for n in walked) / 2
        print(f"walk, {samples} samples: {1000 * seconds / samples:.1f} ms a sample and layer")
    later = [r["peak"] for r in results[1:]]
    print(f"peak of layers 1-7: {min(later) / 1e9:.3f} to {max(later) / 1e9:.3f} GB")
    return found


def reference(pairs: int, samples: int, device: torch.device) -> dict:
    """The quantizer's whole job on the bundled model, methods alternated."""
    model = ROOT / "vlmq_export" / "reference_vlm"
    preprocessor = Preprocessor(model)
    rows = [preprocessor.sample(row) for row in read_rows(model / "data" / "calibration.json")[:samples]]
    methods, seconds, clock = ("gptaq", "vlmq"), defaultdict(list), Phases(device)
    for i in range(-1, pairs):
        for method in methods if i % 2 else methods[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                start = clock.now()
                quantize(
                    Checkpoint(model), rows[: 16 if i < 0 else None], QuantConfig(method=method), Path(folder) / "a",
                    name="reference", calibration={}, device=device.type,
                )  # fmt: skip
                if i >= 0:  # the first pair pays for imports
                    seconds[method].append(clock.now() - start)
                    print(f"{method}: {seconds[method][-1]:.1f}", flush=True)
    ratio = statistics.median(v / g for g, v in zip(seconds["gptaq"], seconds["vlmq"]))
    print(f"vlmq / gptaq, {len(rows)} samples, median of {pairs} pairs: {ratio:.3f}")
    return dict(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["gptaq", "vlmq"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--place", choices=["device", "host"], default="host")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--reference", type=int, metavar="PAIRS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, found, whole = torch.device(args.device), {}, {}
    place = args.place if device.type == "cuda" else "device"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name}, torch {torch.__version__}")
    if args.reference:
        found = reference(args.reference, args.samples, device)
    elif args.scaling:
        found = scaling(device, place)
    else:
        shape = SHAPES[args.shape]
        run(SHAPES["small"], "vlmq", 2, 8, 64, device, place)  # kernels are compiled, libraries loaded
        for method in args.methods:
            found[method] = run(shape, method, args.layers, args.samples, args.length, device, place)
            tokens = args.samples * args.length
            whole[method] = shown(f"{args.shape}, {method}, {tokens} tokens", found[method], shape.layers)
        if {"gptaq", "vlmq"} <= set(whole):
            print(f"\nvlmq / gptaq: {whole['vlmq'] / whole['gptaq']:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"device": name, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
