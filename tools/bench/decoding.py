"""One process of the ONNX speed comparison: opens decoder graphs and times every step of each.

tools/bench/onnx.py starts several such processes and takes the median over them. One process is not
enough: where a session's weights and cache lie in memory changes the time of a step by up to 7 %,
and the same graph opened twice differs by as much. In a process the graphs take turns in random
order.

The request is JSON on stdin, and the medians are JSON on stdout. Nothing heavy is imported.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np
import onnxruntime as ort

WARM_UP = 2  # steps after another graph's turn, which fill the processor's caches again


class Cache(StrEnum):
    """How a graph's cache of keys and values is held."""

    shared = "shared"  # past and present are one buffer, as the builder's genai_config asks for
    grown = "grown"  # every step makes new arrays


class Decoder:
    """One decoder graph with its cache, for a batch of one."""

    def __init__(self, path: str, cache: Cache, threads: int, capacity: int):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.cache, self.capacity = cache, capacity
        inputs = [i.name for i in self.session.get_inputs()]
        self.past = [name for name in inputs if name.startswith("past_key_values")]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.seconds = (0.0, 0.0)  # of the last step: CPU time of this thread, and wall time

    def reset(self, heads: int, size: int) -> None:
        """Empty the cache, whose arrays are [1, heads, length, size]."""
        length = self.capacity if self.cache is Cache.shared else 0
        self.values = {n: np.zeros((1, heads, length, size), np.float32) for n in self.past}
        if self.cache is Cache.shared:
            self.values = {n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in self.values.items()}

    def step(self, embeds: np.ndarray, start: int) -> np.ndarray:
        """Logits [1, S, vocabulary] of embeddings [1, S, hidden], at positions from `start` on."""
        length = embeds.shape[1]
        total = start + length
        positions = np.broadcast_to(np.arange(start, total), (3, 1, length))
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": positions.astype(np.int64),
        }
        if self.cache is Cache.grown:
            given = feeds | self.values
            out = self._timed(lambda: self.session.run(self.outputs, given))
            out = dict(zip(self.outputs, out, strict=True))
            self.values = {n: out[n.replace("past_key_values", "present")] for n in self.past}
            return out["logits"]
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits")
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self._timed(lambda: self.session.run_with_iobinding(binding))
        return binding.copy_outputs_to_cpu()[0]

    def _timed(self, call: Callable[[], Any]) -> Any:
        """What `call` returns; its seconds are kept."""
        cpu, wall = time.thread_time(), time.perf_counter()
        found = call()
        self.seconds = time.thread_time() - cpu, time.perf_counter() - wall
        return found


def measure(request: dict) -> dict:
    """The figures of each graph, by its name.

    prefill, decode: median seconds of a prompt and of a token, of the CPU and of the wall clock.
    logits: the last logits' difference from the builder's graph, relative to the latter.
    """
    prompt, tokens, width = request["prompt"], request["tokens"], request["width"]
    order = random.Random(request["seed"])
    names = list(request["graphs"])
    order.shuffle(names)
    cache = Cache(request["cache"])
    capacity, threads = prompt + tokens, request["threads"]
    decoders = {n: Decoder(request["graphs"][n], cache, threads, capacity) for n in names}
    embeds = np.random.default_rng(0).standard_normal((1, capacity, width)) * 0.1
    embeds = embeds.astype(np.float32)
    prefill, decode, logits = {n: [] for n in names}, {n: [] for n in names}, {}
    for _ in range(request["rounds"]):
        order.shuffle(names)
        for name in names:
            decoder = decoders[name]
            decoder.reset(request["heads"], request["size"])
            decoder.step(embeds[:, :prompt], 0)
            prefill[name].append(decoder.seconds)
            for at in range(prompt, prompt + tokens):
                logits[name] = decoder.step(embeds[:, at : at + 1], at).astype(np.float64)
                if at >= prompt + WARM_UP:
                    decode[name].append(decoder.seconds)
    base = logits["builder"]
    return {
        name: {
            "prefill": [statistics.median(x) for x in zip(*prefill[name][1:])],
            "decode": [statistics.median(x) for x in zip(*decode[name])],
            "logits": float(np.linalg.norm(logits[name] - base) / np.linalg.norm(base)),
        }
        for name in decoders
    }


if __name__ == "__main__":
    json.dump(measure(json.load(sys.stdin)), sys.stdout)
