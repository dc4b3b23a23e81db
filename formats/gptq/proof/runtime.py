"""Runs a GPTQ folder in transformers with gptqmodel, in a process of its own.

This is the side that starts `worker.py`, waits for it, and reads the files that it leaves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from vlmq_export.errors import VlmqError
from vlmq_export.quantizer.samples.sample import Sample

POLL = 0.5  # seconds between two looks at what the worker has done
Told = Callable[[int], None]  # is given the number of prompts that are done


def _untold(_done: int) -> None:
    pass


class RuntimeFailed(VlmqError):
    """transformers with gptqmodel could not run the folder. The message is the worker's last line.

    kernel: class name of the quantized linears, if the model was loaded.
    """

    def __init__(self, message: str, kernel: str = ""):
        super().__init__(message)
        self.kernel = kernel


@dataclass(frozen=True)
class Request:
    """What the worker is asked to do."""

    folder: str
    out: str  # folder for the results
    bits: int
    prompts: list[str]  # safetensors files with the model's inputs
    vocabulary: int
    limit: int  # tokens of an answer
    stop_ids: list[int]
    threads: int
    dtype: str = "float32"
    backend: str | None = None  # kernel of gptqmodel; None: what the loader picks
    # Scales are widened to float32. Decoded weights and single linears are left in files too.
    exact: bool = False


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


def run(request: Request, *, timeout: float | None = None, tell: Told = _untold) -> Outcome:
    """Run the worker to its end.

    timeout: in seconds.
    tell: is given the number of prompts that are done, again and again. It may raise to stop.

    Raises RuntimeFailed with one line if the worker fails, dies or takes too long.
    """
    out = Path(request.out)
    out.mkdir(parents=True)
    (out / "request.json").write_text(json.dumps(asdict(request)), "utf-8")
    code = _exit_code(out, _environment(request), timeout, tell)
    result = _result(out)
    if code:
        lines = (out / "stderr").read_text("utf-8", errors="replace").strip().splitlines()
        why = lines[-1] if lines else "no message"
        if code < 0:
            why = f"killed by signal {-code} ({why})"
        raise RuntimeFailed(why, result.get("kernel", ""))
    return Outcome(
        out, result["kernel"], result["load_seconds"], result["seconds"], result["answers"]
    )


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


def _exit_code(out: Path, environment: dict[str, str], timeout: float | None, tell: Told) -> int:
    """Start the worker on out/request.json and wait for it.

    Raises RuntimeFailed after `timeout` seconds, and what `tell` raises.
    """
    worker = "vlmq_export.formats.gptq.proof.worker"
    with (out / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", worker, str(out / "request.json")],
            env=environment,
            cwd=out,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            began = time.monotonic()
            while timeout is None or time.monotonic() - began < timeout:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL)
                tell(sum(1 for _ in out.glob("logits-*.npy")))
            kernel = _result(out).get("kernel", "")
            raise RuntimeFailed(f"not done after {timeout:.0f} s", kernel)
        finally:
            # Also when we are interrupted. The compilers that it started must not outlive it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _result(out: Path) -> dict:
    """What the worker wrote of itself so far."""
    file = out / "result.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}
