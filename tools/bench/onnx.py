"""Decode and prefill speed of our text.onnx against the graph of onnxruntime-genai's builder.

    python -m tools.bench.onnx --out docs/onnx-speed.json     # both models, levels 0 and 4
    python -m tools.bench.onnx --model wide --level 4 --threads 2

The models are the reference VLM and a random one that is 1024 wide.

Both graphs hold the same 4-bit codes, scales and zero-points, because the builder reads our GPTQ
export. Both have the same accuracy_level, a float32 output matrix and a float32 cache, and take
embeddings. Several processes, one after the other, open all graphs and time every step in turns
(tools/bench/decoding.py).

With one thread the clock is the CPU time of that thread, which other processes on the machine
disturb least; wall time stands beside it. With more threads the clock is wall time. A ratio is the
builder's median step over ours, as the geometric mean over processes with its standard error. Above
1 our graph is faster.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import onnx
import onnxruntime as ort
import torch
import typer
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from tests.artifacts import rtn_artifact
from tools.bench.decoding import Cache
from tools.reference_vlm import model as reference_vlm
from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.quantizer.config import QuantConfig

WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
# Options of the builder; SAME are those that make its graph like ours.
BUILDER = ("-p", "int4", "-e", "cpu")
SAME = ("nodes_to_exclude=/lm_head/MatMul", "exclude_embeds=true", "hf_token=false")
GRAPHS = ("fused", "single", "plain")
COLUMNS = (
    *("model", "graph", "level", "threads", "cache"),
    *("tok/s", "builder", "ratio", "wall"),
    *("prefill ms", "builder", "ratio"),
)
CPU, WALL = 0, 1  # places in a pair of decoding.Decoder.seconds
CLOCKS = ("thread CPU", "wall")
# Largest relative difference of the logits after a whole run at level 0. They are not the same,
# because the builder has rotary tables of its own.
AGREE = 1e-4


class Source(StrEnum):
    """The two models."""

    reference = "reference"
    wide = "wide"


@dataclass(frozen=True)
class Settings:
    """How a comparison is run."""

    level: int  # accuracy_level
    threads: int
    prompt: int  # tokens of the prompt
    tokens: int  # decoded after it
    rounds: int  # prompts a process; the first is thrown away
    processes: int

    @property
    def clock(self) -> int:
        """The clock of the figures: CPU or WALL."""
        return CPU if self.threads == 1 else WALL


@dataclass(frozen=True)
class Result:
    """One graph of ours against the builder's, with one kind of cache."""

    model: str  # a Source
    graph: str  # one of GRAPHS
    level: int
    threads: int
    cache: str  # a Cache
    prompt: int
    tokens: int
    clock: str  # of every figure but wall_ratio: one of CLOCKS
    decode_tokens_per_s: float
    builder_decode_tokens_per_s: float
    prefill_ms: float
    builder_prefill_ms: float
    decode_ratio: float  # geometric mean over processes of builder's time / ours
    decode_error: float  # its standard error
    prefill_ratio: float
    prefill_error: float
    wall_ratio: float  # of decoding
    logits: float  # relative difference of the last logits


def wide_checkpoint(folder: Path, layers: int = 8) -> Path:
    """Write a random Qwen2.5-VL with a decoder so wide that products cost more than nodes."""
    config: Any = reference_vlm.make_config(
        "qwen2_5_vl", reference_vlm.load_tokenizer(), layers=layers, depth=3
    )
    for name, value in WIDE.items():
        setattr(config.text_config, name, value)
    half = WIDE["hidden_size"] // WIDE["num_attention_heads"] // 2
    section = {"mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, **section}
    config.vision_config.out_hidden_size = WIDE["hidden_size"]
    torch.manual_seed(0)
    reference_vlm.save_model(reference_vlm.make_model(config), folder)
    return folder


def build(source: Path, folder: Path, level: int) -> dict[str, Path]:
    """Name → text graph: each of ours, and `builder`, which is made from our GPTQ export."""
    artifact = rtn_artifact(folder / "artifact", QuantConfig("rtn", 4, 128), source)
    made = {}
    for graph in GRAPHS:
        out = folder / graph
        out.mkdir()
        options = FormatOptions(onnx_accuracy_level=level, onnx_graph=graph)
        FORMATS["onnx"].write(artifact, out, options)
        made[graph] = out / "text.onnx"
    (folder / "gptq").mkdir()
    FORMATS["gptq"].write(artifact, folder / "gptq", FormatOptions())
    command: list[str | Path] = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", folder / "gptq", "-o", folder / "builder", "-c", folder / "cache", *BUILDER]
    command += ["--extra_options", f"accuracy_level={level}", *SAME]
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    made["builder"] = folder / "builder" / "model.onnx"
    for graph in GRAPHS:
        assert_same_integers(made[graph], made["builder"])
    return made


def assert_same_integers(ours: Path, theirs: Path) -> None:
    """Assert that both graphs quantize the same linears: same codes, scales, zero-points, level."""
    read = OnnxFolder(ours.parent)
    linears = [read.linear(name) for name in read.linears]
    mine = sorted([part.tobytes() for part in (x.weight, x.scales, x.zero_points)] for x in linears)
    model = onnx.load(theirs)
    constants = {t.name: t for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    levels = {next(a.i for a in n.attribute if a.name == "accuracy_level") for n in nodes}
    yours = sorted(
        [numpy_helper.to_array(constants[i]).tobytes() for i in n.input[1:4]] for n in nodes
    )
    same = mine == yours and levels == {x.accuracy_level for x in linears}
    assert same, f"{ours} and {theirs} do not hold the same integers"


def measure(request: dict, processes: int) -> list[dict]:
    """What decoding.measure found in each process.

    glibc serves allocations above a threshold with maps of their own, and the threshold is held
    where it begins. Left alone, it rises to the largest constant that a session frees while it
    opens. The weights of the next session then lie on the heap, which changes its time by 7 % a
    token for a reason that is not in its graph.
    """
    command = [sys.executable, "-m", "tools.bench.decoding"]
    environment = os.environ | {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**17}"}
    found = []
    for seed in range(processes):
        done = subprocess.run(
            command,
            input=json.dumps(request | {"seed": seed}),
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        found.append(json.loads(done.stdout))
    return found


def ratio(found: list[dict], graph: str, phase: str, clock: int) -> tuple[float, float]:
    """The builder's time over a graph's: geometric mean over processes, and its standard error."""
    each = [math.log(f["builder"][phase][clock] / f[graph][phase][clock]) for f in found]
    mean = math.exp(statistics.mean(each))
    return round(mean, 3), round(mean * statistics.stdev(each) / math.sqrt(len(each)), 3)


def compare(source: Source, settings: Settings) -> Iterator[Result]:
    """One Result for each graph of ours and each kind of cache that it can have."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if source is Source.reference:
            checkpoint = REFERENCE_VLM
        else:
            checkpoint = wide_checkpoint(folder / "model")
        config = json.loads((checkpoint / "config.json").read_text())["text_config"]
        made = build(checkpoint, folder, settings.level)
        for cache in Cache:
            able = [name for name in made if not (name == "plain" and cache is Cache.shared)]
            request = {
                "graphs": {name: str(made[name]) for name in able},
                "cache": cache.value,
                "threads": settings.threads,
                "prompt": settings.prompt,
                "tokens": settings.tokens,
                "rounds": settings.rounds,
                "heads": config["num_key_value_heads"],
                "width": config["hidden_size"],
                "size": config["hidden_size"] // config["num_attention_heads"],
            }
            found = measure(request, settings.processes)
            for graph in able:
                if graph != "builder":
                    yield result(source, cache, graph, found, settings)


def result(
    source: Source, cache: Cache, graph: str, found: list[dict], settings: Settings
) -> Result:
    """The figures of one graph from what every process found."""
    difference = max(f[graph]["logits"] for f in found)
    assert difference <= AGREE or settings.level, (
        f"{graph} and the builder's graph differ by {difference}"
    )
    clock = settings.clock

    def median(name: str, phase: str) -> float:
        return statistics.median(f[name][phase][clock] for f in found)

    decode_ratio, decode_error = ratio(found, graph, "decode", clock)
    prefill_ratio, prefill_error = ratio(found, graph, "prefill", clock)
    return Result(
        model=source.value,
        graph=graph,
        level=settings.level,
        threads=settings.threads,
        cache=cache.value,
        prompt=settings.prompt,
        tokens=settings.tokens,
        clock=CLOCKS[clock],
        decode_tokens_per_s=round(1 / median(graph, "decode"), 1),
        builder_decode_tokens_per_s=round(1 / median("builder", "decode"), 1),
        prefill_ms=round(1e3 * median(graph, "prefill"), 2),
        builder_prefill_ms=round(1e3 * median("builder", "prefill"), 2),
        decode_ratio=decode_ratio,
        decode_error=decode_error,
        prefill_ratio=prefill_ratio,
        prefill_error=prefill_error,
        wall_ratio=ratio(found, graph, "decode", WALL)[0],
        logits=difference,
    )


def show(results: list[Result], console: Console) -> None:
    """Print a table with a row for each result."""
    table = Table(*COLUMNS)
    for r in results:
        table.add_row(
            r.model,
            r.graph,
            str(r.level),
            str(r.threads),
            r.cache,
            f"{r.decode_tokens_per_s:.0f}",
            f"{r.builder_decode_tokens_per_s:.0f}",
            f"{r.decode_ratio:.3f} ± {r.decode_error:.3f}",
            f"{r.wall_ratio:.2f}",
            f"{r.prefill_ms:.1f}",
            f"{r.builder_prefill_ms:.1f}",
            f"{r.prefill_ratio:.3f} ± {r.prefill_error:.3f}",
        )
    console.print(table)


def processor() -> str:
    """The processor's name, or nothing where /proc/cpuinfo has none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, "")


def main(
    model: Annotated[
        list[Source] | None, typer.Option(help="Repeat for several.  [default: both]")
    ] = None,
    level: Annotated[
        list[int] | None, typer.Option(help="accuracy_level.  [default: 0 and 4]")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(help="[default: 1]")] = None,
    prompt: int = 128,
    tokens: int = 16,
    rounds: Annotated[int, typer.Option(help="Prompts a process; the first is thrown away.")] = 6,
    processes: Annotated[int, typer.Option(min=2)] = 16,
    out: Annotated[Path | None, typer.Option(help="Where to write the results as JSON.")] = None,
) -> None:
    """Run every comparison that is asked for, and print a table."""
    results: list[Result] = []
    asked = itertools.product(model or list(Source), threads or [1], level or [0, 4])
    for source, n, at in asked:
        settings = Settings(at, n, prompt, tokens, rounds, processes)
        results += compare(source, settings)
        if out:  # after each, so that a long run leaves what it has
            found = {
                "cpu": processor(),
                "python": platform.python_version(),
                "onnxruntime": ort.__version__,
                "rounds": rounds,
                "processes": processes,
                "cuda": "not run",
                "results": [asdict(r) for r in results],
            }
            out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    show(results, Console(width=140))


if __name__ == "__main__":
    typer.run(main)
