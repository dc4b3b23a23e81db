"""The child process that drives llama.cpp: `python -P worker.py REQUEST.json`.

A failed assertion inside llama.cpp aborts the whole process, so nothing of it is ever loaded by ours. The request names
one GGUF and a list of prompts; arrays go in and out as .npy files beside the request, everything else as JSON.

Request: model, mmproj (or null), threads, length, stop (ids), prompts. A prompt is
    {"segments": [{"tokens": [...], "start": p} | {"embeddings": file, "positions": file}], "next": p}  or
    {"text": with one <__media__> an image, "images": [files], "newline": file of a row to feed behind each (or null)},
with "logits": true (all positions), "answer": most tokens of a greedy answer (0: none), "capture": true (every product
with a weight matrix is kept: input and output).

Result: eps (the RMS epsilon that the load log prints), prompts: [{logits, image, ids, answer}].
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np


def _beside(name: str):
    """A module of this folder by its file: importing the package would import torch, seconds that a child need not pay."""
    spec = importlib.util.spec_from_file_location(f"gguf_worker_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


llama = _beside("llama")
TOKENS = 128  # of a call that are kept, evenly spaced: fewer than twice as many


class Capture:
    """Keeps input and output of every MUL_MAT with a weight matrix, by the weight's name."""

    def __init__(self):
        self.products: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.error = ""
        self.callback = llama.NodeCallback(self._on_node)

    def _on_node(self, address: int, ask: bool, _) -> bool:
        try:
            node = llama.Tensor.from_address(address)
            if node.op != llama.MUL_MAT:
                return not ask
            weight = llama.Tensor.from_address(node.src[0])
            if not weight.name.endswith(".weight"):
                return not ask
            if not ask:
                x = llama.Tensor.from_address(node.src[1])
                step = max(1, x.ne[1] // TOKENS)
                self.products.setdefault(weight.name, []).append((x.array()[::step], node.array()[::step]))
        except Exception as e:  # an exception cannot cross the C caller
            self.error = self.error or f"{type(e).__name__}: {e}"
        return True

    def save(self, folder: Path) -> list[str]:
        """One file pair a weight, all calls stacked over tokens; returns the weights' names."""
        if self.error:
            raise RuntimeError(f"capture failed: {self.error}")
        for name, calls in self.products.items():
            for part, arrays in zip("xy", zip(*calls)):
                np.save(folder / f"{name}.{part}.npy", np.concatenate(arrays))
        return list(self.products)


class Stage:
    """What the child is doing, on disk, so that the parent can name it after a crash."""

    def __init__(self, file: Path):
        self.file = file

    def __call__(self, what: str) -> None:
        self.file.write_text(what, "utf-8")


def run(request: dict, folder: Path) -> dict:
    stage = Stage(folder / "stage.txt")
    stage("loading the llama.cpp library")
    log: list[tuple[int, str]] = []
    lib = llama.load(lambda level, line: log.append((level, line)))
    try:
        stage(f"loading {Path(request['model']).name}")
        model = llama.Model(lib, request["model"])
        capture = Capture()

        @cache
        def engines(watched: bool) -> tuple[llama.Context, llama.Vision | None]:
            callback = capture.callback if watched else None
            context, vision = llama.Context(model, request["length"], request["threads"], callback), None
            if request.get("mmproj"):
                stage(f"loading {Path(request['mmproj']).name}")
                vision = llama.Vision(model, request["mmproj"], request["threads"], callback)
            return context, vision

        results = []
        for i, prompt in enumerate(request["prompts"]):
            context, vision = engines(bool(prompt.get("capture")))
            stage(f"running prompt {i} ({prompt['id']})")
            context.clear()
            results.append(_prompt(context, vision, prompt, folder, f"{i:05d}", set(request["stop"])))
        stage("saving captures")
        eps = re.search(r"f_norm_rms_eps\s*=\s*(\S+)", "".join(line for _, line in log))
        return {"eps": float(eps[1]) if eps else None, "captured": capture.save(folder), "prompts": results}
    except RuntimeError as e:
        complaints = [line.strip() for level, line in log if level == llama.LOG_ERROR]
        raise RuntimeError(f"{e}: {complaints[0]}" if complaints else str(e)) from None


def _prompt(
    context: llama.Context, vision: llama.Vision | None, prompt: dict, folder: Path, tag: str, stop: set[int]
) -> dict:
    every = bool(prompt.get("logits"))
    result: dict = {}
    if "segments" in prompt:
        parts = [_segment(context, s, folder, every) for s in prompt["segments"]]
        logits, past = np.concatenate(parts), prompt["next"]
    else:
        images = [np.load(folder / f) for f in prompt["images"]]
        newline = np.load(folder / prompt["newline"]) if prompt.get("newline") else None
        out = vision.run(context, prompt["text"], images, newline=newline, every=every)
        logits, past = out["logits"], out["next"]
        result["ids"] = out["ids"].tolist()
        result["image"] = f"{tag}.image.npy"
        np.save(folder / result["image"], out["image"])
    if every:
        result["logits"] = f"{tag}.logits.npy"
        np.save(folder / result["logits"], logits)
    if prompt.get("answer"):
        result["answer"] = _greedy(context, logits[-1], past, prompt["answer"], stop)
    return result


def _segment(context: llama.Context, segment: dict, folder: Path, every: bool) -> np.ndarray:
    if "tokens" in segment:
        return context.tokens(np.array(segment["tokens"], np.int32), segment["start"], every=every)
    rows, positions = np.load(folder / segment["embeddings"]), np.load(folder / segment["positions"])
    return context.embeddings(rows, positions, every=every)


def _greedy(context: llama.Context, logits: np.ndarray, past: int, limit: int, stop: set[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < limit and (token := int(logits.argmax())) not in stop:
        answer.append(token)
        if len(answer) < limit:
            logits = context.tokens(np.array([token], np.int32), past, every=False)[-1]
            past += 1
    return answer


def main(path: str) -> int:
    request = Path(path)
    try:
        result, code = run(json.loads(request.read_text("utf-8")), request.parent), 0
    except Exception as e:
        result, code = {"error": str(e) or type(e).__name__, "kind": type(e).__name__}, 1
    (request.parent / "result.json").write_text(json.dumps(result), "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
