"""Decode and prefill speed of our text.onnx against onnxruntime-genai's builder, on the same integers.

    python -m tools.bench.onnx --out docs/onnx-speed.json     # reference VLM and a 1024-wide random model, levels 0 and 4
    python -m tools.bench.onnx --model wide --level 4 --threads 2

Both graphs hold the same 4-bit codes, scales and zero-points (the builder reads our GPTQ export), the same
accuracy_level, a float32 output matrix and a float32 cache, and take embeddings. Several processes one after the other
open all graphs and time every step, turn by turn (tools/bench/decoding.py). With one thread the clock is that thread's
CPU time, which neighbours on the machine disturb least, and wall time stands beside it; with more it is the wall's. A
ratio is the geometric mean over processes of the builder's median step over ours, with its standard error: above 1 ours
is faster.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
from vlmq_export import formats
from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.quantizer.config import QuantConfig

WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 4096}  # fmt: skip
BUILDER = ("-p", "int4", "-e", "cpu")
SAME = ("nodes_to_exclude=/lm_head/MatMul", "exclude_embeds=true", "hf_token=false")
GRAPHS = ("fused", "single", "plain")
CPU, WALL = 0, 1  # in a pair of decoding.Decoder.seconds
CLOCKS = ("thread CPU", "wall")
AGREE = 1e-4  # relative difference of the logits after the whole run: the builder's rotary tables are its own


class Source(StrEnum):
    reference = "reference"
    wide = "wide"


@dataclass(frozen=True)
class Result:
    model: str
    graph: str
    level: int
    threads: int
    cache: str
    prompt: int
    tokens: int
    clock: str  # of every figure but wall_ratio: "thread CPU" or "wall"
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
    """A random Qwen2.5-VL whose decoder is wide enough for its products to cost more than its nodes."""
    config = reference_vlm.make_config("qwen2_5_vl", reference_vlm.load_tokenizer(), layers=layers, depth=3)
    for name, value in WIDE.items():
        setattr(config.text_config, name, value)
    half = WIDE["hidden_size"] // WIDE["num_attention_heads"] // 2
    section = [half // 4, half * 3 // 8, half * 3 // 8]
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, "mrope_section": section}
    config.vision_config.out_hidden_size = WIDE["hidden_size"]
    torch.manual_seed(0)
    reference_vlm.save_model(reference_vlm.make_model(config), folder)
    return folder


def build(source: Path, folder: Path, level: int) -> dict[str, Path]:
    """name → text graph: ours of each kind, and the builder's from our GPTQ export."""
    artifact = rtn_artifact(folder / "artifact", QuantConfig("rtn", 4, 128), source)
    made = {}
    for graph in GRAPHS:
        out = folder / graph
        out.mkdir()
        formats.get("onnx").write(artifact, out, FormatOptions(onnx_accuracy_level=level, onnx_graph=graph))
        made[graph] = out / "text.onnx"
    (folder / "gptq").mkdir()
    formats.get("gptq").write(artifact, folder / "gptq", FormatOptions())
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder / "gptq", "-o", folder / "builder",
               "-c", folder / "cache", *BUILDER, "--extra_options", f"accuracy_level={level}", *SAME]  # fmt: skip
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    made["builder"] = folder / "builder" / "model.onnx"
    for graph in GRAPHS:
        assert_same_integers(made[graph], made["builder"])
    return made


def assert_same_integers(ours: Path, theirs: Path) -> None:
    """Every linear of both graphs: the same codes, scales, zero-points and level, and no other is quantized."""
    read = OnnxFolder(ours.parent)
    linears = [read.linear(name) for name in read.linears]
    mine = sorted([part.tobytes() for part in (x.weight, x.scales, x.zero_points)] for x in linears)
    model = onnx.load(theirs)
    constants = {t.name: t for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    levels = {next(a.i for a in n.attribute if a.name == "accuracy_level") for n in nodes}
    yours = sorted([numpy_helper.to_array(constants[i]).tobytes() for i in n.input[1:4]] for n in nodes)
    same = mine == yours and levels == {x.accuracy_level for x in linears}
    assert same, f"{ours} and {theirs} do not hold the same integers"


def measure(request: dict, processes: int) -> list[dict]:
    """What each process found (decoding.measure).

    glibc's threshold for maps of their own is held where it begins. Left alone, it rises with the largest constant that
    a session frees while it opens, and the weights of whatever is opened next lie on the heap: 7 % a token, for a reason
    that the graph measured has not given.
    """
    command = [sys.executable, "-m", "tools.bench.decoding"]
    environment = os.environ | {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**17}"}
    found = []
    for seed in range(processes):
        text = json.dumps(request | {"seed": seed})
        done = subprocess.run(command, input=text, env=environment, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    return found


def ratio(found: list[dict], graph: str, phase: str, clock: int) -> tuple[float, float]:
    """(geometric mean over the processes, its standard error)."""
    each = [math.log(f["builder"][phase][clock] / f[graph][phase][clock]) for f in found]
    mean = math.exp(statistics.mean(each))
    return round(mean, 3), round(mean * statistics.stdev(each) / math.sqrt(len(each)), 3)


def compare(source: Source, level: int, threads: int, prompt: int, tokens: int, rounds: int, processes: int):
    """One Result a graph of ours and kind of cache that it can have."""
    clock = CPU if threads == 1 else WALL
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = REFERENCE_VLM if source is Source.reference else wide_checkpoint(folder / "model")
        config = json.loads((checkpoint / "config.json").read_text())["text_config"]
        made = build(checkpoint, folder, level)
        for cache in Cache:
            graphs = {n: str(path) for n, path in made.items() if not (n == "plain" and cache is Cache.shared)}
            request = {
                "graphs": graphs, "cache": cache.value, "threads": threads, "prompt": prompt, "tokens": tokens, "rounds": rounds,
                "heads": config["num_key_value_heads"], "width": config["hidden_size"],
                "size": config["hidden_size"] // config["num_attention_heads"],
            }  # fmt: skip
            found = measure(request, processes)

            def median(graph: str, phase: str, found=found) -> float:
                return statistics.median(f[graph][phase][clock] for f in found)

            for graph in [n for n in graphs if n != "builder"]:
                difference = max(f[graph]["logits"] for f in found)
                assert difference <= AGREE or level, f"{graph} and the builder's graph differ by {difference}"
                yield Result(
                    source.value, graph, level, threads, cache.value, prompt, tokens, CLOCKS[clock],
                    round(1 / median(graph, "decode"), 1), round(1 / median("builder", "decode"), 1),
                    round(1e3 * median(graph, "prefill"), 2), round(1e3 * median("builder", "prefill"), 2),
                    *ratio(found, graph, "decode", clock), *ratio(found, graph, "prefill", clock),
                    ratio(found, graph, "decode", WALL)[0], difference,
                )  # fmt: skip


def show(results: list[Result], console: Console) -> None:
    table = Table(
        "model",
        "graph",
        "level",
        "threads",
        "cache",
        "tok/s",
        "builder",
        "ratio",
        "wall",
        "prefill ms",
        "builder",
        "ratio",
    )
    for r in results:
        table.add_row(r.model, r.graph, str(r.level), str(r.threads), r.cache, f"{r.decode_tokens_per_s:.0f}",
                      f"{r.builder_decode_tokens_per_s:.0f}", f"{r.decode_ratio:.3f} ± {r.decode_error:.3f}", f"{r.wall_ratio:.2f}",
                      f"{r.prefill_ms:.1f}", f"{r.builder_prefill_ms:.1f}", f"{r.prefill_ratio:.3f} ± {r.prefill_error:.3f}")  # fmt: skip
    console.print(table)


def main(
    model: Annotated[list[Source] | None, typer.Option(help="Repeat for several.  [default: both]")] = None,
    level: Annotated[list[int] | None, typer.Option(help="accuracy_level.  [default: 0 and 4]")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="[default: 1]")] = None,
    prompt: int = 128,
    tokens: int = 16,
    rounds: Annotated[int, typer.Option(help="Prompts a process; the first is thrown away.")] = 6,
    processes: Annotated[int, typer.Option(min=2)] = 16,
    out: Annotated[Path | None, typer.Option(help="Where to write the results as JSON.")] = None,
) -> None:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    results: list[Result] = []
    for source in model or list(Source):
        for n in threads or [1]:
            for at in level or [0, 4]:
                results += compare(source, at, n, prompt, tokens, rounds, processes)
                if out:  # after each, so that a long run leaves what it has
                    found = {"cpu": cpu, "python": platform.python_version(), "onnxruntime": ort.__version__, "rounds": rounds,
                             "processes": processes,
                             "cuda": "not run", "results": [asdict(r) for r in results]}  # fmt: skip
                    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    show(results, Console(width=140))


if __name__ == "__main__":
    typer.run(main)
