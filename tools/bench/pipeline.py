"""The walk and the solver at a model's true shape: seconds and peak memory by phase and layer.

    python tools/bench/pipeline.py --shape 7b --layers 3              # a GPU; under ten minutes
    OMP_NUM_THREADS=1 python tools/bench/pipeline.py --scaling        # CPU: more layers and samples
    OMP_NUM_THREADS=1 python tools/bench/pipeline.py --reference 3    # CPU: vlmq-paper / gptaq

A run has random weights and the model's true number of tokens. It has decoder layers only, whose
weights are drawn on the device, layer by layer, and the decoder's inputs are random. What else a
real run does (reading shards, the vision tower, writing layers) is not in the figures.

The total for all layers is an extrapolation: the first layer once, whose two streams are equal, and
the mean of the others for each of the rest. `--reference` is the quantizer's whole job on the
bundled model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling  # noqa: E402

from vlmq_export.quantizer.arithmetic import exact_arithmetic  # noqa: E402
from vlmq_export.quantizer.calibration.batches import BATCH_TOKENS, HELD_OUT, Batch  # noqa: E402
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk  # noqa: E402
from vlmq_export.quantizer.calibration.offload import Place, Shelf  # noqa: E402
from vlmq_export.quantizer.config import QuantConfig  # noqa: E402
from vlmq_export.quantizer.job import Job  # noqa: E402
from vlmq_export.quantizer.layers import attempt, decoder_layer, measures  # noqa: E402
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer  # noqa: E402
from vlmq_export.quantizer.model.architecture import Architecture  # noqa: E402
from vlmq_export.quantizer.model.checkpoint import Checkpoint  # noqa: E402
from vlmq_export.quantizer.model.families import DECODER  # noqa: E402
from vlmq_export.quantizer.run.quantize import quantize  # noqa: E402
from vlmq_export.quantizer.samples.preprocessor import Preprocessor  # noqa: E402
from vlmq_export.quantizer.samples.rows import read_rows  # noqa: E402
from vlmq_export.quantizer.solver import hessian  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """The size of a decoder."""

    hidden: int  # hidden_size
    mlp: int  # intermediate_size
    heads: int
    kv_heads: int
    layers: int


SHAPES = {
    "7b": Shape(3584, 18944, 28, 4, 28),  # Qwen2.5-VL-7B
    "3b": Shape(2048, 11008, 16, 2, 36),
    # With a quarter of the tokens, its phases take the same shares of time as at 7b: for a CPU.
    "7b-quarter": Shape(896, 4736, 7, 1, 28),
    "small": Shape(384, 1536, 6, 2, 8),
}
# Module, function, phase. A function is watched where it is looked up when it is called.
WATCHED = (
    (decoder_layer, "raw_factors", "importance"),
    (decoder_layer, "collect", "walk and statistics"),
    (measures, "losses", "metrics"),
    (hessian, "prepare", "factorize"),
    (hessian, "column_term", "column term"),
    (hessian, "regression", "target"),
    (attempt, "solve", "column loop"),
    (attempt, "best_range", "judging ranges"),
    (attempt, "solve_blocks", "block types"),
    (attempt, "descend", "descent"),
)


class Phases:
    """Seconds by phase. They do not overlap: a phase inside another is taken off the outer one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # seconds of the phases inside each open one, the outermost first

    def now(self) -> float:
        """Wall time on CUDA, where it waits for the device; CPU time of the process elsewhere."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A context whose seconds belong to phase `name`."""
        start = self.now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            total = self.now() - start
            self.seconds[name] += total - self._inner.pop()
            self._inner[-1] += total

    def watch(self, owner: Any, function: str, name: str) -> Callable[[], None]:
        """Make every call of `owner.function` a phase. Returns what undoes it."""
        inner = getattr(owner, function)

        def timed(*args, **kwargs):
            with self(name):
                return inner(*args, **kwargs)

        setattr(owner, function, timed)
        return lambda: setattr(owner, function, inner)


def config_of(shape: Shape):
    """transformers' config of a Qwen2.5-VL decoder of this shape."""
    head = shape.hidden // shape.heads
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        max_window_layers=shape.layers,
        vocab_size=8,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head // 8, head // 16 * 3, head // 16 * 3],
        },
    )
    config._attn_implementation = "sdpa"
    return config


def decoder_batches(
    shape: Shape, config, samples: int, length: int, shelf: Shelf, two_streams: bool
) -> list[Batch]:
    """Random inputs of the decoder, with a few large columns as residual streams have."""
    device = shelf.device
    generator = torch.Generator(device).manual_seed(0)
    scale = torch.randn(shape.hidden, generator=generator, device=device).exp()
    rotary = modeling.Qwen2_5_VLRotaryEmbedding(config).to(device)
    size = max(1, BATCH_TOKENS // length)
    batches = []
    for start in range(0, samples, size):
        count = min(size, samples - start)
        noise = torch.randn(count, length, shape.hidden, generator=generator, device=device)
        hidden = noise * scale
        positions = torch.arange(length, device=device).view(1, 1, length).expand(3, count, length)
        kwargs = {
            "attention_mask": None,
            "position_ids": None,
            "position_embeddings": rotary(hidden, positions),
        }
        valid = torch.ones(count, dtype=torch.bool, device=device)
        image = torch.zeros(count, length, dtype=torch.bool, device=device)
        held = torch.arange(start, start + count, device=device) % HELD_OUT == HELD_OUT // 2
        full = hidden if two_streams else None
        batches.append(Batch(hidden, full, kwargs, valid, shelf=shelf, image=image, held=held))
    return batches


def random_layer(config, index: int, device: torch.device) -> torch.nn.Module:
    """Decoder layer `index` with random weights, drawn on the device."""
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
    """The most bytes held since the last reset, on a CUDA device or else by the process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def run_each(
    shape: Shape,
    method: str,
    layers: int,  # how many are run
    samples: int,
    length: int,  # tokens of a sample
    device: torch.device,
    place: Place,  # where the batches lie between layers
) -> Iterator[dict]:
    """Quantize some layers. Yields of each the seconds by phase, total, peak memory and loss."""
    config = config_of(shape)
    source = {"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": shape.layers}}
    job = Job.of(Architecture.of(source), QuantConfig(method=method, bits=4, group_size=128))
    two_streams = job.method.two_streams
    batches = decoder_batches(shape, config, samples, length, Shelf(device, place), two_streams)
    for index in range(layers):
        phases = Phases(device)
        peak_memory(device, reset=True)
        with exact_arithmetic(), watched(phases), phases("rest"):
            layer = random_layer(config, index, device)
            with phases("walk and statistics"):
                walk = LayerWalk(layer, DECODER, batches, two_streams=two_streams)
            solved, _ = quantize_layer(walk, job.prefix(index), job)
            with phases("advance"):
                walk.advance()
        del layer, walk
        yield {
            "seconds": dict(phases.seconds),
            "total": sum(phases.seconds.values()),
            "peak": peak_memory(device),
            "loss": sum(metrics.get("loss", 0.0) for _, metrics in solved),
        }


def run(*arguments: Any) -> list[dict]:
    """All layers of `run_each`, with the same arguments."""
    return list(run_each(*arguments))


@contextmanager
def watched(phases: Phases) -> Iterator[None]:
    """A context in which the quantizer's functions are phases. What is in none is `rest`."""
    undo = [phases.watch(owner, function, name) for owner, function, name in WATCHED]
    try:
        yield
    finally:
        for restore in undo:
            restore()


def shown(title: str, results: list[dict], of: int) -> float:
    """Print the layers of a run. Returns the seconds that `of` layers would take."""
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


def scaling(device: torch.device, place: Place) -> dict:
    """Print time against samples and layers, and memory against layers, at the small shape."""
    shape, found = SHAPES["small"], {}
    run(shape, "gptaq", 1, 8, 64, device, place)  # the first call of everything is slower
    for samples in (32, 64, 128):
        results = run(shape, "vlmq-paper", 3, samples, 128, device, place)
        found[f"{samples} samples"] = results
        shown(f"small, vlmq-paper, {samples} samples of 128 tokens", results, shape.layers)
    results = run(shape, "vlmq-paper", 8, 32, 128, device, place)
    found["8 layers"] = results
    shown("small, vlmq-paper, 32 samples, 8 layers", results, shape.layers)
    walked = ["importance", "walk and statistics", "advance"]
    for samples in (32, 64, 128):
        seconds = sum(r["seconds"][n] for r in found[f"{samples} samples"][1:] for n in walked) / 2
        print(f"walk, {samples} samples: {1000 * seconds / samples:.1f} ms a sample and layer")
    later = [r["peak"] for r in results[1:]]
    print(f"peak of layers 1-7: {min(later) / 1e9:.3f} to {max(later) / 1e9:.3f} GB")
    return found


def reference(pairs: int, samples: int, device: torch.device) -> dict:
    """Print the seconds of the quantizer's whole job on the bundled model, methods in turns."""
    model = ROOT / "vlmq_export" / "reference_vlm"
    preprocessor = Preprocessor(model)
    calibration = read_rows(model / "data" / "calibration.json")[:samples]
    rows = [preprocessor.sample(row) for row in calibration]
    methods, seconds, clock = ("gptaq", "vlmq-paper"), defaultdict(list), Phases(device)
    for i in range(-1, pairs):
        for method in methods if i % 2 else methods[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                start = clock.now()
                quantize(
                    Checkpoint(model),
                    rows[: 16 if i < 0 else None],
                    QuantConfig(method=method),
                    Path(folder) / "a",
                    name="reference",
                    calibration={},
                    device=device.type,
                )
                if i >= 0:  # the first pair pays for imports
                    seconds[method].append(clock.now() - start)
                    print(f"{method}: {seconds[method][-1]:.1f}", flush=True)
    ratio = statistics.median(v / g for g, v in zip(seconds["gptaq"], seconds["vlmq-paper"]))
    print(f"vlmq-paper / gptaq, {len(rows)} samples, median of {pairs} pairs: {ratio:.3f}")
    return dict(seconds)


def compare(shape: str, args: argparse.Namespace, device: torch.device, place: Place) -> dict:
    """Print a run of each method at one shape, and the ratio of vlmq-paper and gptaq."""
    of, found, whole = SHAPES[shape], {}, {}
    # Kernels are compiled and libraries loaded here.
    run(SHAPES["small"], "vlmq-paper", 2, 8, 64, device, place)
    tokens = args.samples * args.length
    for method in args.methods:
        found[method] = run(of, method, args.layers, args.samples, args.length, device, place)
        whole[method] = shown(f"{shape}, {method}, {tokens} tokens", found[method], of.layers)
    if {"gptaq", "vlmq-paper"} <= set(whole):
        print(f"\nvlmq-paper / gptaq: {whole['vlmq-paper'] / whole['gptaq']:.3f}")
    return found


def main() -> None:
    """Print what the command line asks for, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["gptaq", "vlmq-paper"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--place", choices=["device", "host"], default="host")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--reference", type=int, metavar="PAIRS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        place, name = args.place, torch.cuda.get_device_name(device)
    else:
        place, name = "device", f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name}, torch {torch.__version__}")
    if args.reference:
        found = reference(args.reference, args.samples, device)
    elif args.scaling:
        found = scaling(device, place)
    else:
        found = compare(args.shape, args, device, place)
    if args.json:
        args.json.write_text(json.dumps({"device": name, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
