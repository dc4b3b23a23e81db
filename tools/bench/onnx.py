"""Decode and prefill speed of our text.onnx against onnxruntime-genai's builder, on the same integers.

    python -m tools.bench.onnx --out docs/onnx-speed.json     # reference VLM and a 1024-wide random model, levels 0 and 4
    python -m tools.bench.onnx --model wide --level 4 --threads 2

Both graphs hold the same 4-bit codes, scales and zero-points (the builder reads our GPTQ export), the same
accuracy_level, a float32 output matrix and a float32 cache, and take embeddings. They run in turns in one process
through one harness. With one thread the clock is the process's CPU time, which neighbours on the machine disturb least;
with more it is the wall's. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime as ort
import torch
import typer
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from tests.artifacts import rtn_artifact
from tools.reference_vlm import model as reference_vlm
from vlmq_export import formats
from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.formats.base import FormatOptions, relative_error
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.quantizer.config import QuantConfig

WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 4096}  # fmt: skip
BUILDER = ("-p", "int4", "-e", "cpu")
SAME = ("nodes_to_exclude=/lm_head/MatMul", "exclude_embeds=true", "hf_token=false")
AGREE = 1e-4  # relative difference of the logits after the whole run: the builder's rotary tables are its own


class Source(StrEnum):
    reference = "reference"
    wide = "wide"


class Cache(StrEnum):
    shared = "shared"  # past and present one buffer, as the builder's genai_config asks for
    grown = "grown"  # a new array a step


@dataclass(frozen=True)
class Result:
    model: str
    graph: str
    level: int
    threads: int
    cache: str
    prompt: int
    tokens: int
    decode_tokens_per_s: float
    builder_decode_tokens_per_s: float
    prefill_ms: float
    builder_prefill_ms: float
    decode_ratio: float  # median over rounds of builder's time / ours
    decode_ratio_range: tuple[float, float]
    prefill_ratio: float
    prefill_ratio_range: tuple[float, float]
    logits: float  # relative difference of the last logits


def wide_checkpoint(folder: Path, layers: int = 2) -> Path:
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


def build(source: Path, folder: Path, level: int, graphs: list[str]) -> dict[str, Path]:
    """name → text graph: ours of each kind, and the builder's from our GPTQ export."""
    artifact = rtn_artifact(folder / "artifact", QuantConfig("rtn", 4, 128), source)
    made = {}
    for graph in graphs:
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
    for graph in graphs:
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


class Decoder:
    """One decoder graph with its cache, batch of one."""

    def __init__(self, path: Path, cache: Cache, threads: int, capacity: int):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.cache, self.capacity = cache, capacity
        self.past = [i.name for i in self.session.get_inputs() if i.name.startswith("past_key_values")]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def reset(self, heads: int, size: int) -> None:
        length = self.capacity if self.cache is Cache.shared else 0
        self.values = {n: np.zeros((1, heads, length, size), np.float32) for n in self.past}
        if self.cache is Cache.shared:
            self.values = {n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in self.values.items()}

    def step(self, embeds: np.ndarray, start: int) -> np.ndarray:
        """Logits [1, S, vocabulary] of embeddings [1, S, hidden] at positions from `start` on."""
        total = start + embeds.shape[1]
        positions = np.broadcast_to(np.arange(start, total), (3, 1, embeds.shape[1])).astype(np.int64)
        feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, total), np.int64), "position_ids": positions}
        if self.cache is Cache.grown:
            out = dict(zip(self.outputs, self.session.run(self.outputs, feeds | self.values), strict=True))
            self.values = {n: out[n.replace("past_key_values", "present")] for n in self.past}
            return out["logits"]
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits")
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]


def measure(decoders: dict[str, Decoder], config: dict, prompt: int, tokens: int, rounds: int, clock) -> dict:
    """name → ([prefill seconds a round], [seconds a token a round], last logits); the first round is thrown away."""
    heads, width = config["num_key_value_heads"], config["hidden_size"]
    size = width // config["num_attention_heads"]
    embeds = (np.random.default_rng(0).standard_normal((1, prompt + tokens, width)) * 0.1).astype(np.float32)
    found: dict = {name: ([], [], None) for name in decoders}
    for round_ in range(rounds + 1):
        turn = list(decoders.items())
        for name, decoder in turn if round_ % 2 else reversed(turn):
            decoder.reset(heads, size)
            started = clock()
            logits = decoder.step(embeds[:, :prompt], 0)
            filled = clock()
            for at in range(prompt, prompt + tokens):
                logits = decoder.step(embeds[:, at : at + 1], at)
            done = clock()
            prefill, decode, _ = found[name]
            if round_:
                prefill.append(filled - started)
                decode.append((done - filled) / tokens)
            found[name] = (prefill, decode, logits)
    return found


def ratios(theirs: list[float], ours: list[float]) -> tuple[float, tuple[float, float]]:
    each = [t / o for t, o in zip(theirs, ours, strict=True)]
    return round(statistics.median(each), 3), (round(min(each), 3), round(max(each), 3))


def compare(source: Source, level: int, threads: int, prompt: int, tokens: int, rounds: int, graphs: list[str]):
    """One Result a graph of ours and kind of cache that it can have."""
    clock = time.process_time if threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = REFERENCE_VLM if source is Source.reference else wide_checkpoint(folder / "model")
        config = json.loads((checkpoint / "config.json").read_text())["text_config"]
        made = build(checkpoint, folder, level, graphs)
        for cache in Cache:
            names = [n for n in made if not (n == "plain" and cache is Cache.shared)]
            decoders = {n: Decoder(made[n], cache, threads, prompt + tokens) for n in names}
            found = measure(decoders, config, prompt, tokens, rounds, clock)
            prefill, decode, logits = found.pop("builder")
            for graph, (ours_prefill, ours_decode, ours_logits) in found.items():
                difference = relative_error(ours_logits, logits)
                assert difference <= AGREE or level, f"{graph} and the builder's graph differ by {difference}"
                yield Result(
                    source.value, graph, level, threads, cache.value, prompt, tokens,
                    round(1 / statistics.median(ours_decode), 1), round(1 / statistics.median(decode), 1),
                    round(1e3 * statistics.median(ours_prefill), 2), round(1e3 * statistics.median(prefill), 2),
                    *ratios(decode, ours_decode), *ratios(prefill, ours_prefill), difference,
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
        "range",
        "prefill ms",
        "builder",
        "ratio",
    )
    for r in results:
        span = "{:.2f}–{:.2f}".format(*r.decode_ratio_range)
        table.add_row(r.model, r.graph, str(r.level), str(r.threads), r.cache, f"{r.decode_tokens_per_s:.0f}",
                      f"{r.builder_decode_tokens_per_s:.0f}", f"{r.decode_ratio:.2f}", span, f"{r.prefill_ms:.1f}",
                      f"{r.builder_prefill_ms:.1f}", f"{r.prefill_ratio:.2f}")  # fmt: skip
    console.print(table)


def main(
    model: Annotated[list[Source] | None, typer.Option(help="Repeat for several.  [default: both]")] = None,
    level: Annotated[list[int] | None, typer.Option(help="accuracy_level.  [default: 0 and 4]")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="[default: 1]")] = None,
    prompt: int = 128,
    tokens: int = 16,
    rounds: int = 7,
    plain: Annotated[bool, typer.Option(help="Our graph of standard operators too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Where to write the results as JSON.")] = None,
) -> None:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    results: list[Result] = []
    for source in model or list(Source):
        for n in threads or [1]:
            for at in level or [0, 4]:
                results += compare(source, at, n, prompt, tokens, rounds, ["fused", *(["plain"] if plain else [])])
                if out:  # after each, so that a long run leaves what it has
                    found = {"cpu": cpu, "python": platform.python_version(), "onnxruntime": ort.__version__, "rounds": rounds,
                             "cuda": "not run", "results": [asdict(r) for r in results]}  # fmt: skip
                    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    show(results, Console(width=140))


if __name__ == "__main__":
    typer.run(main)
