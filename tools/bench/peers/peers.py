"""The peers of the quality bench: how each is asked to quantize, and how its files are read.

Each runs in a process of its own. Its script gets a request (JSON) and the samples (safetensors, a
tensor `INDEX.KEY` for each input of the model), so that it sees exactly what our quantizer sees.

AutoRound and llm-compressor need nothing of this project, and versions of their dependencies that
exclude each other. Each runs in a virtual environment of its own, whose Python the environment
variables AUTOROUND_PYTHON and LLMCOMPRESSOR_PYTHON name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlmq_export.formats.gptq.read import GptqFolder, unpack
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.storage.untrusted import read_json


@dataclass(frozen=True)
class Peer:
    """How one peer is run."""

    script: str  # beside this file
    python: str = ""  # environment variable that names the Python which has it; empty: this one
    options: tuple[tuple[str, object], ...] = ()  # of the request


EXTENDED = (("extension", True), ("sym", True))  # AutoRound's settings for 2 bits
PEERS = {
    "GPTQModel GPTQ": Peer("run_gptqmodel.py", options=(("gptaq", False),)),
    "GPTQModel GPTAQ": Peer("run_gptqmodel.py", options=(("gptaq", True),)),
    "AutoRound": Peer("run_autoround.py", "AUTOROUND_PYTHON"),
    "AutoRound extended": Peer("run_autoround.py", "AUTOROUND_PYTHON", options=EXTENDED),
    "AutoRound best": Peer(
        "run_autoround.py", "AUTOROUND_PYTHON", options=(*EXTENDED, ("iters", 1000))
    ),
    "llm-compressor GPTQ": Peer("run_llmcompressor.py", "LLMCOMPRESSOR_PYTHON"),
}
Weights = Iterator[tuple[str, np.ndarray]]  # float32, by hub name


def quantize(
    name: str, model: Path, rows: Path, samples: list[Sample], bits: int, group: int, folder: Path
) -> tuple[Weights, float]:
    """What a peer writes into `folder`: its weights, and bits per weight of the quantized linears.

    rows: the calibration file, for a peer that reads it itself.

    Raises RuntimeError with the last line that a peer that fails writes to stderr.
    """
    request = {
        "rows": str(rows.resolve()),
        "bits": bits,
        "group_size": group,
        "sym": False,
        "desc_act": group == -1,
        "act_group_aware": group != -1,
    }
    _run(name, model, samples, folder, request)
    return read(folder.resolve())


def autoround_gguf(
    model: Path, samples: list[Sample], mix: str, iterations: int | None, folder: Path
) -> Path:
    """The text model of AutoRound's GGUF export in `folder`. `iterations` None: its default.

    Raises RuntimeError as `quantize` does.
    """
    _run("AutoRound", model, samples, folder, {"gguf": f"gguf:{mix.lower()}", "iters": iterations})
    (text,) = (f for f in folder.rglob("*.gguf") if not f.name.startswith("mmproj"))
    return text


def write_decoder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the language model alone as a checkpoint, for peers that do not know the whole."""
    family, config = checkpoint.architecture.family, dict(checkpoint.config["text_config"])
    config |= {"architectures": [f"{config['model_type'].title()}ForCausalLM"], "dtype": "bfloat16"}
    prefix = family.layers.removesuffix("layers.")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    own = [name for name in checkpoint.tensors if name.startswith(prefix)]
    tensors = {f"model.{n.removeprefix(prefix)}": checkpoint.tensor(n) for n in own}
    if not checkpoint.architecture.tied:
        head = checkpoint.tensor(f"{family.head}.weight")
        config["tie_word_embeddings"], tensors["lm_head.weight"] = False, head
    save_file(tensors, folder / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint.path / file, folder)


def _run(name: str, model: Path, samples: list[Sample], folder: Path, request: dict) -> None:
    """Run a peer's script on a request, to which the model, the samples and `folder` are added."""
    peer = PEERS[name]
    python = os.environ.get(peer.python, "") if peer.python else sys.executable
    if not python:
        raise RuntimeError(f"{name} needs {peer.python}, the Python of the environment that has it")
    folder.mkdir(parents=True)
    out = folder.resolve()
    save_samples(samples, out / "samples.safetensors")
    request |= {
        "model": str(model.resolve()),
        "out": str(out),
        "samples": len(samples),
        "samples_file": str(out / "samples.safetensors"),
        **dict(peer.options),
    }
    (out / "request.json").write_text(json.dumps(request))
    script = Path(__file__).resolve().with_name(peer.script)
    # Without -P, modules beside the script would stand in for libraries of the same name. Some
    # peers leave a folder of logs where they run, hence the working directory.
    done = subprocess.run(
        [python, "-P", str(script), str(out / "request.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=out,
    )
    (out / "stderr.txt").write_text(done.stdout[-20000:] + done.stderr[-20000:])
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else f"exit status {done.returncode}"
        raise RuntimeError(f"{name} failed: {why}")


def save_samples(samples: list[Sample], file: Path) -> None:
    """Write the model's inputs of every sample, each as a tensor `INDEX.KEY`."""
    tensors = {}
    for i, sample in enumerate(samples):
        inputs = sample.model_inputs()
        tensors |= {f"{i}.{key}": value.contiguous() for key, value in inputs.items()}
    save_file(tensors, file)


def read(folder: Path) -> tuple[Weights, float]:
    """Weights and bits per weight of a GPTQ or compressed-tensors folder.

    `g_idx`, which few runtimes read, is not counted. Raises RuntimeError for another format.
    """
    # AutoRound writes into a folder of its own in this one.
    folder = next(iter(folder.rglob("config.json")), folder / "config.json").parent
    config = read_json(folder / "config.json")
    method = config["quantization_config"]["quant_method"]
    if method == "gptq":
        written = GptqFolder(folder)
        parts = {f"{m}.{p}" for m in written.linears for p in ("qweight", "qzeros", "scales")}
        size = 8 * sum(written.tensors[p].nbytes for p in parts)
        words = sum(written.tensors[f"{m}.qweight"].numel for m in written.linears)
        count = words * 32 // written.bits
        return ((name, written.array(name)) for name in written.weight_names()), size / count
    if method != "compressed-tensors":
        raise RuntimeError(f"{folder}: {method} is not readable here")
    return _compressed_tensors(folder, config)


def _compressed_tensors(folder: Path, config: dict) -> tuple[Weights, float]:
    """The same of compressed-tensors' `pack-quantized` layout, which is asymmetric here.

    A weight is scale · (code − zero_point). In the file both are offset by 2^(bits−1).
    """
    (group,) = config["quantization_config"]["config_groups"].values()
    bits, family = group["weights"]["num_bits"], Architecture.of(config).family
    with safe_open(folder / "model.safetensors", framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    suffix = ".weight_packed"
    packed = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    parts = ("weight_packed", "weight_scale", "weight_zero_point")
    size = sum(8 * tensors[f"{m}.{p}"].nbytes for m in packed for p in parts)
    count = sum(int(tensors[f"{m}.weight_shape"].prod()) for m in packed)

    def decoded() -> Weights:
        for name, value in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight_packed":
                one = {p: tensors[f"{module}.{p}"] for p in (*parts, "weight_shape")}
                yield family.hub_name(f"{module}.weight"), decode_packed(one, bits)
            elif module not in packed or leaf == "bias":
                yield family.hub_name(name), value.float().numpy()

    return decoded(), size / count


def decode_packed(parts: dict[str, torch.Tensor], bits: int) -> np.ndarray:
    """The weights of one linear, float32 [out, in].

    Codes are packed along the inputs, as one stream of bits for each row. Zero-points are packed
    along the outputs, as one stream for each group.
    """
    rows, columns = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].float().numpy()  # [out, groups]
    codes = _stream(parts["weight_packed"].numpy().T, bits).T[:, :columns]
    zeros = _stream(parts["weight_zero_point"].numpy(), bits)[:rows]
    group = np.arange(columns) // (columns // scales.shape[1])
    return (codes - zeros[:, group]).astype(np.float32) * scales[:, group]


def _stream(words: np.ndarray, bits: int) -> np.ndarray:
    """The values of each column of int32 words, with whatever fills the last words at the end."""
    padding = np.zeros((-len(words) % bits, words.shape[1]), np.int32)
    return unpack(np.concatenate([words, padding]), bits).astype(np.int16)
