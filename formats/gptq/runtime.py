"""The other side of worker.py: start it, wait for it, read what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from vlmq_export.errors import VlmqError
from vlmq_export.quantizer.calibration import Sample

PACKAGES = ("optimum", "gptqmodel", "torchao")


class RuntimeFailed(VlmqError):
    """transformers + gptqmodel could not run the folder; the message is the worker's last line."""

    def __init__(self, message: str, kernel: str = ""):
        super().__init__(message)
        self.kernel = kernel  # the class that was picked, if it came that far


@dataclass(frozen=True)
class Request:
    """What the worker is asked. `exact`: scales upcast to float32, and weights and single linears left in files too."""

    folder: str
    out: str
    bits: int
    prompts: list[str]  # safetensors files with the model's inputs
    vocabulary: int
    limit: int  # tokens of an answer
    stop_ids: list[int]
    threads: int
    dtype: str = "float32"
    backend: str | None = None  # None: what the loader picks
    exact: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the worker left. Disk: the float32 model once if the request was exact, and one logits file a prompt."""

    out: Path
    kernel: str  # class name of the quantized linears
    load_seconds: float
    seconds: float
    answers: list[list[int]]

    def logits(self, prompt: int) -> np.ndarray:
        """float32 [S, vocabulary]"""
        return np.load(self.out / f"logits-{prompt}.npy")

    def weight(self, module_name: str) -> np.ndarray | None:
        file = self.out / "weights" / f"{module_name}.npy"
        return np.load(file) if file.is_file() else None

    def linear(self, module_name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Input [M, K] and output [M, N] of one quantized linear in its kernel."""
        file = self.out / "linears" / f"{module_name}.npz"
        if not file.is_file():
            return None
        with np.load(file) as arrays:
            return arrays["x"], arrays["y"]


def missing() -> str | None:
    """The packages that are not installed, or None. Nothing is imported: gptqmodel changes the process it is in."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    return ", ".join(absent) or None


def save_prompts(samples: list[Sample], folder: Path) -> list[str]:
    files = []
    for i, sample in enumerate(samples):
        file = folder / f"prompt-{i}.safetensors"
        save_file({k: v.contiguous().clone() for k, v in sample.model_inputs().items()}, file)
        files.append(str(file))
    return files


def run(request: Request, *, timeout: float | None = None) -> Outcome:
    """Run the worker to its end. Raises RuntimeFailed with one line when it fails, dies or takes over `timeout` s."""
    out = Path(request.out)
    out.mkdir(parents=True)
    (out / "request.json").write_text(json.dumps(asdict(request)), "utf-8")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(request.threads),
        # TorchLinear wraps its decoding in torch.compile: 1 to 27 s a shape for the same function.
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads stall each other when the machine is shared
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.setdefault("HF_HOME", str(out / "hf"))  # gptqmodel would point it to a shared temporary folder
    command = [sys.executable, "-m", "vlmq_export.formats.gptq.worker", str(out / "request.json")]
    with (out / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, cwd=out, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeFailed(f"not done after {timeout:.0f} s", _result(out).get("kernel", "")) from None
        finally:
            if process.poll() is None:  # also when we are interrupted: the compilers it started must not outlive it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result = _result(out)
    if code:
        lines = (out / "stderr").read_text("utf-8", errors="replace").strip().splitlines()
        why = lines[-1] if lines else "no message"
        raise RuntimeFailed(why if code > 0 else f"killed by signal {-code} ({why})", result.get("kernel", ""))
    return Outcome(out, result["kernel"], result["load_seconds"], result["seconds"], result["answers"])


def _result(out: Path) -> dict:
    file = out / "result.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}
