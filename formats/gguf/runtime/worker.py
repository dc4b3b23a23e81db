"""The child process that drives llama.cpp: `python -P worker.py REQUEST.json`.

A failed assertion inside llama.cpp aborts the whole process. Our own process therefore loads
nothing of it. The request names one GGUF file and a list of prompts. Arrays go in and out as .npy
files beside the request, everything else as JSON.

The request:

    model, mmproj    paths; mmproj may be null
    threads          number of threads
    length           the most tokens of a context
    image tokens     the most tokens of an image; −1 leaves that to the mmproj
    stop             token ids that end an answer
    prompts          as follows

A prompt is one of

    {"segments": [...], "next": p}    p is the position after the prompt; a segment is
                                      {"tokens": [...], "start": p} or
                                      {"embeddings": file, "positions": file}, where
                                      "both ways" says whether its rows see each other
    {"text": ..., "images": [files]}  with one <__media__> per image, and "newline": the file of a
                                      row to feed after each image, or null

with "id", and what is wanted:

    "logits": true     the logits of all positions
    "answer": n        a greedy answer of at most n tokens
    "capture": true    input and output of every product with a weight matrix

The result is in result.json. It has "eps" (the RMS epsilon that the load log prints), "captured"
(names of weights), and "prompts": for each prompt "logits" and "answer" where they are wanted, and
after images "ids" and "image", the embeddings. Where the run failed, it has "error" and "kind".
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np


def _beside(name: str) -> ModuleType:
    """A module of this folder, loaded from its file.

    To import the package would import torch, which takes seconds that a child need not spend.
    """
    file = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"gguf_worker_{name}", file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from vlmq_export.formats.gguf.runtime import llama
else:
    llama = _beside("llama")

# From twice as many tokens on, a product keeps only some of its tokens, evenly spaced.
TOKENS = 128


class Capture:
    """Keeps input and output of every product with a weight matrix, by the name of the weight.

    Of experts each has a name of its own, with its number behind that of their tensor.
    """

    def __init__(self) -> None:
        self.products: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.error = ""
        self.callback = llama.NodeCallback(self._on_node)

    def _on_node(self, address: int, ask: bool, _: int) -> bool:
        """llama.cpp asks whether it shall call again when a node is computed, and then does so."""
        try:
            node = llama.Tensor.from_address(address)
            if node.op not in (llama.MUL_MAT, llama.MUL_MAT_ID):
                return not ask
            weight = llama.Tensor.from_address(node.src[0])
            if not weight.name.endswith(".weight"):
                return not ask
            if not ask and node.op == llama.MUL_MAT_ID:
                self._keep_experts(weight.name, node)
            elif not ask:
                x = llama.Tensor.from_address(node.src[1])
                step = max(1, x.ne[1] // TOKENS)
                product = x.array()[::step], node.array()[::step]
                self.products.setdefault(weight.name, []).append(product)
        except Exception as e:
            # An exception cannot cross the C code that called this. `save` raises it.
            self.error = self.error or f"{type(e).__name__}: {e}"
        return True

    def _keep_experts(self, name: str, node: llama.Tensor) -> None:
        """The products of each expert with its own tokens."""
        x, ids = (llama.Tensor.from_address(node.src[i]).matrices() for i in (1, 2))
        y, ids = node.matrices(), ids[0]  # [tokens, k, out], int32 [tokens, k]
        x = np.broadcast_to(x, (*ids.shape, x.shape[-1]))  # all k experts may have one input
        for expert in np.unique(ids):
            own = ids == expert
            self.products.setdefault(f"{name}.{expert}", []).append((x[own], y[own]))

    def save(self, folder: Path) -> list[str]:
        """Write the files NAME.x.npy and NAME.y.npy of each weight. Returns the names.

        All products with a weight are stacked over their tokens.
        """
        if self.error:
            raise RuntimeError(f"capture failed: {self.error}")
        for name, calls in self.products.items():
            for part, arrays in zip("xy", zip(*calls)):
                np.save(folder / f"{name}.{part}.npy", np.concatenate(arrays))
        return list(self.products)


def run(request: dict, folder: Path) -> dict:
    """The result of a request. Raises RuntimeError with the first error that llama.cpp logged."""
    # What the child is doing is on disk, so that the parent can say it after a crash.
    stage = partial((folder / "stage.txt").write_text, encoding="utf-8")
    stage("loading the llama.cpp library")
    log: list[tuple[int, str]] = []
    lib = llama.load(lambda level, line: log.append((level, line)))
    try:
        capture = Capture()
        prompts = _prompts(lib, request, folder, capture, stage)
        stage("saving captures")
        eps = re.search(r"f_norm_rms_eps\s*=\s*(\S+)", "".join(line for _, line in log))
        return {
            "eps": float(eps[1]) if eps else None,
            "captured": capture.save(folder),
            "prompts": prompts,
        }
    except RuntimeError as e:
        complaints = [line.strip() for level, line in log if level == llama.LOG_ERROR]
        raise RuntimeError(f"{e}: {complaints[0]}" if complaints else str(e)) from None


def _prompts(
    lib: llama.Library,
    request: dict,
    folder: Path,
    capture: Capture,
    stage: Callable[[str], object],
) -> list[dict]:
    """Run every prompt, in a context that is watched by `capture` or in one that is not."""
    stage(f"loading {Path(request['model']).name}")
    model = llama.Model(lib, request["model"])

    @cache
    def engines(watched: bool) -> tuple[llama.Context, llama.Vision | None]:
        callback = capture.callback if watched else None
        context = llama.Context(model, request["length"], request["threads"], callback)
        if not request.get("mmproj"):
            return context, None
        stage(f"loading {Path(request['mmproj']).name}")
        return context, llama.Vision(
            model, request["mmproj"], request["threads"], request["image tokens"], callback
        )

    results = []
    for i, prompt in enumerate(request["prompts"]):
        context, vision = engines(bool(prompt.get("capture")))
        stage(f"running prompt {i} ({prompt['id']})")
        context.clear()
        results.append(_prompt(context, vision, prompt, folder, f"{i:05d}", set(request["stop"])))
    return results


def _prompt(
    context: llama.Context,
    vision: llama.Vision | None,
    prompt: dict,
    folder: Path,
    tag: str,  # start of the names of the arrays
    stop: set[int],
) -> dict:
    """Run one prompt, and write the arrays that are wanted of it."""
    every = bool(prompt.get("logits"))
    result: dict = {}
    if "segments" in prompt:
        parts = [_segment(context, s, folder, every) for s in prompt["segments"]]
        logits, past = np.concatenate(parts), prompt["next"]
    else:
        assert vision is not None, "a request with images names an mmproj"
        images = [np.load(folder / f) for f in prompt["images"]]
        newline = np.load(folder / prompt["newline"]) if prompt.get("newline") else None
        seen = vision.run(context, prompt["text"], images, newline=newline, every=every)
        logits, past = seen.logits, seen.next
        result["ids"] = seen.ids.tolist()
        result["image"] = f"{tag}.image.npy"
        np.save(folder / result["image"], seen.image)
    if every:
        result["logits"] = f"{tag}.logits.npy"
        np.save(folder / result["logits"], logits)
    if prompt.get("answer"):
        result["answer"] = _greedy(context, logits[-1], past, prompt["answer"], stop)
    return result


def _segment(context: llama.Context, segment: dict, folder: Path, every: bool) -> np.ndarray:
    """Feed tokens or embeddings. Returns the logits of all positions, or of the last one alone."""
    if "tokens" in segment:
        return context.tokens(np.array(segment["tokens"], np.int32), segment["start"], every=every)
    rows = np.load(folder / segment["embeddings"])
    positions = np.load(folder / segment["positions"])
    both_ways = segment.get("both ways", False)
    return context.embeddings(rows, positions, every=every, both_ways=both_ways)


def _greedy(
    context: llama.Context,
    logits: np.ndarray,  # [vocabulary], of the last position
    past: int,  # the position after it
    limit: int,
    stop: set[int],
) -> list[int]:
    """The most probable token again and again, up to `limit` tokens or a stop token."""
    answer: list[int] = []
    while len(answer) < limit and (token := int(logits.argmax())) not in stop:
        answer.append(token)
        if len(answer) < limit:
            logits = context.tokens(np.array([token], np.int32), past, every=False)[-1]
            past += 1
    return answer


def main(path: str) -> int:
    """Answer the request in a file. Returns the exit code."""
    request = Path(path)
    try:
        result, code = run(json.loads(request.read_text("utf-8")), request.parent), 0
    except Exception as e:
        result, code = {"error": str(e) or type(e).__name__, "kind": type(e).__name__}, 1
    (request.parent / "result.json").write_text(json.dumps(result), "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
