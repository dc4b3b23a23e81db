"""Our side of the child process: a request goes in, and an answer or a line of error comes out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmq_export.errors import MissingRuntime, VlmqError
from vlmq_export.formats.proof.reference import Reference

TIMEOUT = 3600.0  # seconds a child may take
POLL = 0.5  # seconds between two looks at what it has done
Told = Callable[[int], None]  # is given the number of prompts that are done
WORKER = Path(__file__).with_name("worker.py")


class RunFailed(VlmqError):
    """llama.cpp refused a file, crashed, or returned an error. The line says at which stage."""


@dataclass(frozen=True)
class Run:
    """What a child returned."""

    folder: Path  # with the arrays
    eps: float  # the RMS epsilon of the language norms that the load log prints
    captured: list[str]  # weights whose products were kept
    prompts: list[dict]  # what was wanted of each prompt: see worker.py

    def array(self, name: str) -> np.ndarray:
        """An array by the name of its file. It is mapped, not read."""
        return np.load(self.folder / name, mmap_mode="r")

    def logits(self, i: int) -> np.ndarray:
        """The logits of prompt i, [n, vocabulary]."""
        return self.array(self.prompts[i]["logits"])

    def product(self, weight: str) -> tuple[np.ndarray, np.ndarray]:
        """Input [tokens, in] and output [tokens, out] of a weight matrix, over all prompts."""
        return self.array(f"{weight}.x.npy"), self.array(f"{weight}.y.npy")


def run(
    folder: Path,  # with the arrays that the prompts name
    model: Path,
    mmproj: Path | None,
    prompts: list[dict],  # of `Prompts`
    reference: Reference,  # whose stop tokens end an answer
    threads: int,
    answer: int,  # the most tokens of any greedy answer
    tell: Told = lambda _: None,  # is given the number of prompts that are done; may raise to stop
    timeout: float = TIMEOUT,
) -> Run:
    """One child that runs all prompts.

    Raises RunFailed where llama.cpp fails, and MissingRuntime where it cannot be used.
    """
    length = max(p["length"] for p in prompts) + answer
    request = {
        "model": str(model),
        "mmproj": str(mmproj) if mmproj else None,
        "threads": threads,
        "length": -(-length // 256) * 256,
        "image tokens": max((p.get("image tokens") or -1 for p in prompts), default=-1),
        "stop": sorted(reference.stop_ids),
        "prompts": prompts,
    }
    file = folder / "request.json"
    file.write_text(json.dumps(request), "utf-8")
    code, said = _child(file, tell, timeout)
    result = _result(folder)
    if code or "error" in result:
        raise _failure(code, said, result, folder)
    if result["eps"] is None:
        raise RunFailed(
            "llama.cpp's load log prints no f_norm_rms_eps, so the reference cannot carry it"
        )
    return Run(folder, **result)


def _child(request: Path, tell: Told, timeout: float) -> tuple[int, str]:
    """(exit code, what it said on stderr) of the finished child.

    Raises RunFailed where it takes too long, and what `tell` raises.
    """
    errors = request.with_name("stderr")
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            # With -P, the folder of the script does not come first on the path. A module of ours
            # cannot then stand in for one of the standard library.
            [sys.executable, "-P", str(WORKER), str(request)],
            # A backtrace would start a debugger.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            # Ctrl-C in a terminal reaches all of a session. It is for us to answer, and not for a
            # check to fail by.
            start_new_session=True,
        )
        try:
            began = time.monotonic()
            while time.monotonic() - began < timeout:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(POLL)
                    return code, errors.read_text("utf-8", errors="replace")
                at = re.match(r"running prompt (\d+) ", _stage(request.parent))
                tell(int(at[1]) if at else 0)
        finally:
            process.kill()  # also when we are interrupted
            process.wait()
    stage = _stage(request.parent)
    raise RunFailed(f"llama.cpp did not finish in {timeout:g} s while {stage}")


def _result(folder: Path) -> dict:
    """What the child wrote; nothing if it crashed."""
    file = folder / "result.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _stage(folder: Path) -> str:
    """What the child was doing last."""
    file = folder / "stage.txt"
    return file.read_text("utf-8") if file.is_file() else "starting the child process"


def _failure(code: int, stderr: str, result: dict, folder: Path) -> VlmqError:
    """The error of a child that failed, in one line.

    It is the child's own, or the last words of the library that ended the process, with the stage.
    """
    if result.get("kind") == "MissingRuntime":
        return MissingRuntime(result["error"])
    if "error" in result:
        return RunFailed(f"{_stage(folder)}: {result['error']}")
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    final = said[-1] if said else "no message"
    last = next((line for line in said if "GGML_ASSERT" in line), final)
    return RunFailed(f"{_stage(folder)}: llama.cpp ended the process (code {code}): {last[:300]}")
