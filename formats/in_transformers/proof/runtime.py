"""Runs a folder in transformers, in a process of its own.

This is the side that starts a format's `worker.py`, waits for it, and reads the files that it
leaves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from vlmq_export.errors import VlmqError
from vlmq_export.quantizer.samples.sample import Sample

POLL = 0.2  # seconds between two looks at what the worker has done
Told = Callable[[int], None]  # is given the number of prompts that are done


def _untold(_done: int) -> None:
    pass


class RuntimeFailed(VlmqError):
    """transformers could not run the folder. The message is the worker's last line.

    kernel: class name of the quantized linears, if the model was loaded.
    """

    def __init__(self, message: str, kernel: str = ""):
        super().__init__(message)
        self.kernel = kernel


@dataclass(frozen=True)
class Request:
    """What the worker is asked to do."""

    worker: str  # module of the format that is started
    folder: str
    out: str  # folder for the results
    prompts: list[str]  # safetensors files with the model's inputs
    vocabulary: int
    limit: int  # tokens of an answer
    stop_ids: list[int]
    threads: int
    dtype: str = "float32"
    loading: dict[str, Any] = field(default_factory=dict)  # what the format's own loader is told
    # Scales are widened to float32. With logits, decoded weights and single linears are left too.
    exact: bool = False
    logits: bool = True  # whether more is wanted than the answers


@dataclass(frozen=True)
class Outcome:
    """What the worker left.

    On disk that is one file of logits per prompt, and after an exact request the model in float32.
    """

    out: Path
    kernel: str  # class name of the quantized linears
    load_seconds: float
    seconds: float
    answers: list[list[int]]  # greedy token ids of each prompt

    def logits(self, prompt: int) -> np.ndarray:
        """The logits of a prompt by its index, float32 [tokens, vocabulary]."""
        return np.load(self.out / f"logits-{prompt}.npy")

    def weight(self, module_name: str) -> np.ndarray | None:
        """A parameter in float32 as the runtime decodes it, or None if it has no such parameter."""
        file = self.out / "weights" / f"{module_name}.npy"
        return np.load(file) if file.is_file() else None

    def linear(self, module_name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Input [M, K] and output [M, N] of one quantized linear in its kernel, if it has one."""
        file = self.out / "linears" / f"{module_name}.npz"
        if not file.is_file():
            return None
        with np.load(file) as arrays:
            return arrays["x"], arrays["y"]


def save_prompts(samples: list[Sample], folder: Path) -> list[str]:
    """Write the model's inputs of every sample. Returns the files."""
    files = []
    for i, sample in enumerate(samples):
        file = folder / f"prompt-{i}.safetensors"
        save_file({k: v.contiguous().clone() for k, v in sample.model_inputs().items()}, file)
        files.append(str(file))
    return files


class Worker:
    """A process that works on requests one after the other.

    Importing a runtime takes longer than everything that a small model is asked, so that all
    requests share a process. It works while the caller does something else, until `outcome` is
    asked for. Where it dies over one request, another goes on with the next.
    """

    def __init__(self, requests: Sequence[Request]):
        for request in requests:
            out = Path(request.out)
            out.mkdir(parents=True)
            (out / "request.json").write_text(json.dumps(asdict(request)), "utf-8")
        self._waiting = list(requests)
        self._process = self._start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        # Also when we are interrupted. The compilers that it started must not outlive it.
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def pid(self) -> int:
        """The process that works now, or worked last."""
        return self._process.pid

    def outcome(self, *, timeout: float | None = None, tell: Told = _untold) -> Outcome:
        """What it left for the next request, waited for.

        timeout: in seconds from now.
        tell: is given the number of prompts that are done, again and again. It may raise to stop.

        Raises RuntimeFailed with one line if the request fails, the worker dies over it, or it
        takes too long.
        """
        request = self._waiting[0]
        out = Path(request.out)
        if self._process.poll() is not None and not _ended(_result(out)):
            self._process = self._start()
        self._waiting.pop(0)
        self._wait(out, timeout, tell)
        result = _result(out)
        if not _ended(result):
            raise RuntimeFailed(self._why_dead(), result.get("kernel", ""))
        if "failed" in result:
            raise RuntimeFailed(result["failed"], result.get("kernel", ""))
        return Outcome(
            out, result["kernel"], result["load_seconds"], result["seconds"], result["answers"]
        )

    def _start(self) -> subprocess.Popen:
        """Start the process on the requests that wait."""
        first = Path(self._waiting[0].out)
        files = [str(Path(request.out) / "request.json") for request in self._waiting]
        self._stderr = first / "stderr"
        with self._stderr.open("wb") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", self._waiting[0].worker, *files],
                env=_environment(self._waiting[0]),
                cwd=first,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def _wait(self, out: Path, timeout: float | None, tell: Told) -> None:
        """Wait until a request has ended, or the process. Raises RuntimeFailed after `timeout`."""
        began = time.monotonic()
        while not _ended(_result(out)):
            if timeout is not None and time.monotonic() - began > timeout:
                kernel = _result(out).get("kernel", "")
                raise RuntimeFailed(f"not done after {timeout:.0f} s", kernel)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(POLL)
                return
            tell(sum(1 for _ in out.glob("logits-*.npy")))

    def _why_dead(self) -> str:
        """The worker's last line, and the signal that killed it."""
        lines = self._stderr.read_text("utf-8", errors="replace").strip().splitlines()
        why = lines[-1] if lines else "no message"
        code = self._process.returncode
        return f"killed by signal {-code} ({why})" if code < 0 else why


def run(request: Request, *, timeout: float | None = None, tell: Told = _untold) -> Outcome:
    """Run one request to its end, as `Worker.outcome` does."""
    with Worker([request]) as worker:
        return worker.outcome(timeout=timeout, tell=tell)


def _environment(request: Request) -> dict[str, str]:
    """The worker's environment: offline, on the CPU, with the threads of the request."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(request.threads),
        # Threads that spin while they wait stall each other on a machine that others use.
        "OMP_WAIT_POLICY": "PASSIVE",
        # TorchLinear wraps its decoding in torch.compile, which takes 1 to 27 s for each shape and
        # computes the same.
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # gptqmodel would otherwise make it a temporary folder that all users share.
    environment.setdefault("HF_HOME", str(Path(request.out) / "hf"))
    return environment


def _ended(result: dict) -> bool:
    """Whether a request has been worked on to its end, or has failed."""
    return "seconds" in result or "failed" in result


def _result(out: Path) -> dict:
    """What the worker wrote of itself so far."""
    file = out / "result.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}
