"""Our side of the child process: prompts into requests, one child a request, its answer or one line of what went wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from vlmq_export.errors import MissingRuntime, VlmqError
from vlmq_export.formats.gguf.families import graphs_of
from vlmq_export.formats.gguf.names import vision_to_hub
from vlmq_export.quantizer.calibration import Row, Sample
from vlmq_export.reference import Reference

MARKER = "<__media__>"
TIMEOUT = 3600  # seconds a child may take


class RunFailed(VlmqError):
    """llama.cpp refused the file, crashed, or returned an error: one line with the stage it was in."""


@dataclass(frozen=True)
class Run:
    """What a child returned."""

    folder: Path
    eps: float  # RMS epsilon of the language norms by the load log
    captured: list[str]  # weights whose products were kept
    prompts: list[dict]

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="r")

    def logits(self, i: int) -> np.ndarray:
        return self.array(self.prompts[i]["logits"])

    def product(self, weight: str) -> tuple[np.ndarray, np.ndarray]:
        """Input [tokens, in] and output [tokens, out] of one weight matrix, over all captured prompts."""
        return self.array(f"{weight}.x.npy"), self.array(f"{weight}.y.npy")


def run(
    folder: Path, model: Path, mmproj: Path | None, prompts: list[dict], reference: Reference, threads: int, answer: int
) -> Run:
    """One child over `prompts`, in a folder that holds the arrays they name. Raises RunFailed or MissingRuntime."""
    length = max(p.pop("length") for p in prompts) + answer
    request = {
        "model": str(model), "mmproj": str(mmproj) if mmproj else None, "threads": threads, "length": -(-length // 256) * 256,
        "stop": sorted(reference.stop_ids), "prompts": prompts,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request), "utf-8")
    env = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # a backtrace would start a debugger
    # -P: this folder's types.py and inspect.py must not stand in for the standard library's.
    command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(folder / "request.json")]
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"llama.cpp did not finish in {TIMEOUT} s while {_stage(folder)}") from None
    result = _result(folder)
    if done.returncode or "error" in result:
        raise _failure(done, result, folder)
    if result["eps"] is None:
        raise RunFailed("llama.cpp's load log prints no f_norm_rms_eps, so the reference cannot carry it")
    return Run(folder, **result)


def _result(folder: Path) -> dict:
    file = folder / "result.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _stage(folder: Path) -> str:
    file = folder / "stage.txt"
    return file.read_text("utf-8") if file.is_file() else "starting the child process"


def _failure(done: subprocess.CompletedProcess, result: dict, folder: Path) -> VlmqError:
    """One line: the child's own error, or the last words of the library that aborted it, and the stage."""
    if result.get("kind") == "MissingRuntime":
        return MissingRuntime(result["error"])
    if "error" in result:
        return RunFailed(f"{_stage(folder)}: {result['error']}")
    said = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    last = next((line for line in said if "GGML_ASSERT" in line), said[-1] if said else "no message")
    return RunFailed(f"{_stage(folder)}: llama.cpp ended the process (code {done.returncode}): {last[:300]}")


def exact_prompt(reference: Reference, sample: Sample, folder: Path, tag: str, **wanted) -> dict:
    """A prompt in segments: token ids as text, the reference's own vision features as embeddings with their positions.

    What a model adds to its image tokens behind its first layers stands beside them in the same rows.
    """
    ids, vision = sample.input_ids.numpy(), sample.vision.numpy()
    sections = graphs_of(reference.config)[0].sections
    if sections and vision.any():
        positions = reference.position_ids(sample)[:, 0]  # [3, S]
    else:
        positions = np.tile(np.arange(len(ids)), (3 if sections else 1, 1))
    features = image_rows(reference, sample) if vision.any() else None
    segments, taken = [], 0
    for run_ids, run_vision, where in _runs(ids, vision, positions):
        if not run_vision:
            segments.append({"tokens": run_ids.tolist(), "start": int(where[0, 0])})
            continue
        names = {"embeddings": f"{tag}-{len(segments)}.rows.npy", "positions": f"{tag}-{len(segments)}.pos.npy"}
        np.save(folder / names["embeddings"], features[taken : taken + len(run_ids)].astype(np.float32))
        axes = np.concatenate([where, np.zeros_like(where[:1])]) if sections else where[0]
        np.save(folder / names["positions"], axes.astype(np.int32))
        segments.append(names)
        taken += len(run_ids)
    return {"id": sample.id, "segments": segments, "next": int(positions.max()) + 1, "length": len(ids), **wanted}


def image_rows(reference: Reference, sample: Sample) -> np.ndarray:
    """float32 [image tokens, width]: vision features, and beside them what is added after layers 0, 1, …"""
    return np.concatenate([reference.vision_features(sample), *reference.added_features(sample)], axis=1)


def _runs(ids: np.ndarray, vision: np.ndarray, positions: np.ndarray):
    """Maximal runs of text or image tokens: (ids, is vision, positions [3, n])."""
    cuts = [0, *(np.flatnonzero(np.diff(vision.astype(np.int8))) + 1), len(ids)]
    for a, b in pairwise(cuts):
        yield ids[a:b], bool(vision[a]), positions[:, a:b]


def mtmd_prompt(reference: Reference, sample: Sample, folder: Path, tag: str, **wanted) -> dict:
    """The same prompt as an application gives it: text with a marker an image, and the images' pixels."""
    names = []
    for i, image in enumerate(sample.images):
        names.append(f"{tag}-{i}.pixels.npy")
        np.save(folder / names[-1], np.asarray(image.convert("RGB"), np.uint8))
    graph = graphs_of(reference.config)[1]
    text = re.sub(graph.image, MARKER, sample.text)  # mtmd writes the tokens around an image itself
    newline = None
    if graph.newline:
        newline = f"{tag}.newline.npy"
        row = reference.weights.array(vision_to_hub(reference.config)[graph.newline])
        np.save(folder / newline, row[None].astype(np.float32))
    return {
        "id": sample.id, "text": text, "images": names, "newline": newline, "length": len(sample.input_ids), **wanted,
    }  # fmt: skip


def text_only(reference: Reference, sample: Sample) -> Sample:
    """The prompt's conversation without its images."""
    row = sample.row
    messages = tuple({**m, "content": [p for p in m["content"] if p["type"] != "image"]} for m in row.messages)
    return reference.preprocessor.sample(Row(f"{row.id}-text", messages, (), row.task), prompt_only=True)
