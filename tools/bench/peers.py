"""The peers of the quality bench: how each is asked to quantize, in a process of its own, and how its files are read.

A peer's script gets a request (JSON) and the samples (safetensors, one tensor `INDEX.KEY` an input of the model), so that it
sees exactly what our own quantizer sees and needs nothing of this project. AutoRound and llm-compressor want versions of
their dependencies that exclude each other: each runs in a virtual environment of its own, whose Python is named here.
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
from vlmq_export.quantizer.calibration import Sample
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.untrusted import read_json


@dataclass(frozen=True)
class Peer:
    script: str  # beside this file
    python: str = ""  # environment variable naming the Python that has it; empty: this one
    options: tuple[tuple[str, object], ...] = ()  # of the request


PEERS = {
    "GPTQModel GPTQ": Peer("gptqmodel_quantize.py", options=(("gptaq", False),)),
    "GPTQModel GPTAQ": Peer("gptqmodel_quantize.py", options=(("gptaq", True),)),
    "AutoRound": Peer("autoround_quantize.py", "AUTOROUND_PYTHON"),
    "llm-compressor GPTQ": Peer("llmcompressor_quantize.py", "LLMCOMPRESSOR_PYTHON"),
}
Weights = Iterator[tuple[str, np.ndarray]]


def quantize(
    name: str, model: Path, rows: Path, samples: list[Sample], bits: int, group: int, folder: Path
) -> tuple[Weights, float]:
    """(weights by hub name, bits per weight of the quantized linears) of what a peer writes into `folder`.

    Raises RuntimeError with the peer's last line of complaint.
    """
    request = {
        "rows": str(rows.resolve()), "bits": bits, "group_size": group, "sym": False,
        "desc_act": group == -1, "act_group_aware": group != -1,
    }  # fmt: skip
    _run(name, model, samples, folder, request)
    return read(folder.resolve())


def autoround_gguf(model: Path, samples: list[Sample], mix: str, iterations: int | None, folder: Path) -> Path:
    """The text model of AutoRound's GGUF export in `folder`; `iterations` None: its default.

    Raises RuntimeError with its last line of complaint.
    """
    _run("AutoRound", model, samples, folder, {"gguf": f"gguf:{mix.lower()}", "iters": iterations})
    (text,) = (f for f in folder.rglob("*.gguf") if not f.name.startswith("mmproj"))
    return text


def write_decoder(checkpoint: Checkpoint, folder: Path) -> None:
    """The language model alone as a checkpoint of its own architecture, for peers that do not know the whole one's."""
    family, config = family_of(checkpoint.config), dict(checkpoint.config["text_config"])
    config |= {"architectures": [f"{config['model_type'].title()}ForCausalLM"], "dtype": "bfloat16"}
    prefix = family.layers.removesuffix("layers.")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    own = [name for name in checkpoint.tensors if name.startswith(prefix)]
    save_file({f"model.{n.removeprefix(prefix)}": checkpoint.tensor(n) for n in own}, folder / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint.path / file, folder)


def _run(name: str, model: Path, samples: list[Sample], folder: Path, request: dict) -> None:
    peer = PEERS[name]
    python = os.environ.get(peer.python, "") if peer.python else sys.executable
    if not python:
        raise RuntimeError(f"{name} needs {peer.python}, the Python of the environment that has it")
    folder.mkdir(parents=True)
    out = folder.resolve()
    save_samples(samples, out / "samples.safetensors")
    request |= {
        "model": str(model.resolve()), "out": str(out), "samples": len(samples),
        "samples_file": str(out / "samples.safetensors"), **dict(peer.options),
    }  # fmt: skip
    (out / "request.json").write_text(json.dumps(request))
    script = Path(__file__).resolve().with_name(peer.script)
    # -P: this folder's gguf.py and onnx.py must not stand in for the libraries. Some leave a folder of logs where they run.
    done = subprocess.run(
        [python, "-P", str(script), str(out / "request.json")], capture_output=True, text=True, check=False, cwd=out
    )
    (out / "stderr.txt").write_text(done.stdout[-20000:] + done.stderr[-20000:])
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"{name} failed: {lines[-1] if lines else f'exit status {done.returncode}'}")


def save_samples(samples: list[Sample], file: Path) -> None:
    inputs = ((i, sample.model_inputs()) for i, sample in enumerate(samples))
    save_file({f"{i}.{key}": value.contiguous() for i, one in inputs for key, value in one.items()}, file)


def read(folder: Path) -> tuple[Weights, float]:
    """Weights and bits per weight of a GPTQ or compressed-tensors folder; `g_idx`, which few runtimes read, not counted."""
    folder = next(
        iter(folder.rglob("config.json")), folder / "config.json"
    ).parent  # AutoRound names a folder of its own in there
    config = read_json(folder / "config.json")
    method = config["quantization_config"]["quant_method"]
    if method == "gptq":
        written = GptqFolder(folder)
        parts = {f"{m}.{p}" for m in written.linears for p in ("qweight", "qzeros", "scales")}
        size = 8 * sum(written.tensors[p].nbytes for p in parts)
        count = sum(written.tensors[f"{m}.qweight"].numel for m in written.linears) * 32 // written.bits
        return ((name, written.array(name)) for name in written.weight_names()), size / count
    if method != "compressed-tensors":
        raise RuntimeError(f"{folder}: {method} is not readable here")
    return _compressed_tensors(folder, config)


def _compressed_tensors(folder: Path, config: dict) -> tuple[Weights, float]:
    """The `pack-quantized` layout, asymmetric: scale · (code − zero_point), both offset by 2^(bits−1) in the file."""
    (group,) = config["quantization_config"]["config_groups"].values()
    bits, family = group["weights"]["num_bits"], family_of(config)
    with safe_open(folder / "model.safetensors", framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
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
    """float32 [out, in] of one linear: the bits of a row are one stream, those of the zero-points one along the outputs."""
    rows, columns = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].float().numpy()  # [out, groups]
    codes = _stream(parts["weight_packed"].numpy().T, bits).T[:, :columns]
    zeros = _stream(parts["weight_zero_point"].numpy(), bits)[:rows]
    group = np.arange(columns) // (columns // scales.shape[1])
    return (codes - zeros[:, group]).astype(np.float32) * scales[:, group]


def _stream(words: np.ndarray, bits: int) -> np.ndarray:
    """The values of each column, and whatever fills its last words."""
    padding = np.zeros((-len(words) % bits, words.shape[1]), np.int32)
    return unpack(np.concatenate([words, padding]), bits).astype(np.int16)
