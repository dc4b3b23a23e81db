"""One process of the ONNX speed comparison: decoder graphs opened afresh, every step timed, turn by turn in random order.

A process of its own, because where a session's weights and cache come to lie in memory moves a step by up to 7 %: the
same graph opened twice differs by that much. tools/bench/onnx.py starts several and takes the median over them. Reads a
request in JSON from stdin and writes the medians to stdout; imports nothing heavy.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from enum import StrEnum

import numpy as np
import onnxruntime as ort

WARM_UP = 2  # steps after another graph's turn, which fill the processor's caches again


class Cache(StrEnum):
    shared = "shared"  # past and present one buffer, as the builder's genai_config asks for
    grown = "grown"  # a new array a step


class Decoder:
    """One decoder graph with its cache, batch of one."""

    def __init__(self, path: str, cache: Cache, threads: int, capacity: int):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.cache, self.capacity = cache, capacity
        self.past = [i.name for i in self.session.get_inputs() if i.name.startswith("past_key_values")]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.seconds = (0.0, 0.0)  # CPU of this thread and wall, of the last step

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

    def _timed(self, call):
        cpu, wall = time.thread_time(), time.perf_counter()
        found = call()
        self.seconds = time.thread_time() - cpu, time.perf_counter() - wall
        return found


def measure(request: dict) -> dict:
    """name → median (CPU, wall) seconds of a prompt and of a token, and the last logits' difference from the builder's."""
    prompt, tokens, width = request["prompt"], request["tokens"], request["width"]
    order = random.Random(request["seed"])
    names = list(request["graphs"])
    order.shuffle(names)
    cache = Cache(request["cache"])
    decoders = {n: Decoder(request["graphs"][n], cache, request["threads"], prompt + tokens) for n in names}
    embeds = (np.random.default_rng(0).standard_normal((1, prompt + tokens, width)) * 0.1).astype(np.float32)
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
