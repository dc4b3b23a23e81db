"""A decoder of more than 2 GB, which no protobuf can hold, is written in bounded memory and run."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tools.reference_vlm import model as reference_vlm
from vlmq_export import __version__
from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.manifest import SCHEMA, Manifest, ModuleRecord
from vlmq_export.quantizer.artifact.write import (
    write_floats,
    write_layer,
    write_manifest,
    write_source,
)
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.checkpoint import Checkpoint

LAYERS, WIDTH, INNER = 13, 4096, 11008
GROUP = 128
SHAPES = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (512, WIDTH),
    "v_proj": (512, WIDTH),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (INNER, WIDTH),
    "up_proj": (INNER, WIDTH),
    "down_proj": (WIDTH, INNER),
}
# Writes an artifact, and prints by how many bytes the most memory in use grew. That is read from
# VmHWM, because ru_maxrss begins with what the parent process used.
WRITE = """
import re, sys
from pathlib import Path
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.onnx.write import write
from vlmq_export.quantizer.artifact.read import Artifact
import mobius, onnx, transformers
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
write(Artifact(Path(sys.argv[1])), Path(sys.argv[2]), FormatOptions())
print((peak() - before) * 1024)
"""


def make_source(folder):
    """A wide Qwen2.5-VL: config, tokenizer and every tensor that is not quantized."""
    tokenizer = reference_vlm.load_tokenizer()
    config = reference_vlm.make_config("qwen2_5_vl", tokenizer, layers=LAYERS, depth=3)
    text = config.text_config
    text.hidden_size, text.intermediate_size = WIDTH, INNER
    text.num_attention_heads, text.num_key_value_heads = 32, 4
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    config.vision_config.out_hidden_size = WIDTH
    with torch.device("meta"):
        model = reference_vlm.make_model(config)
    architecture, draw = Architecture.of(config.to_dict()), torch.Generator().manual_seed(0)
    family, quantized = architecture.family, set(architecture.linears)
    tensors = {}
    for name, p in model.named_parameters():
        hub = family.hub_name(name)
        if hub.rsplit(".", 1)[0] in quantized:
            continue
        if "norm" in hub or "ln_q" in hub:
            tensors[hub] = torch.ones(p.shape).bfloat16()
        else:
            tensors[hub] = (0.02 * torch.randn(p.shape, generator=draw)).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    reference_vlm.copy_tokenizer(reference_vlm.BUNDLED, folder)
    preprocessor = (reference_vlm.BUNDLED / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(preprocessor)
    return folder


def random_linear(name, draw):
    """A linear with 8-bit codes drawn at random."""
    kind = name.rsplit(".", 1)[1]
    out, columns = SHAPES[kind]
    codes = np.frombuffer(draw.bytes(out * columns), np.uint8).reshape(out, columns).copy()
    solution = Solution(
        torch.from_numpy(codes),
        torch.full((out, columns // GROUP), 2.0**-12, dtype=torch.float16),
        torch.full((out, columns // GROUP), 128, dtype=torch.uint8),
        (torch.arange(columns) // GROUP).int(),
    )
    bias = torch.zeros(out).half() if kind in ("q_proj", "k_proj", "v_proj") else None
    return QuantizedLinear(name, solution, bias, 8, GROUP, True)


def random_artifact(folder, source):
    """An artifact of 2.2 billion codes."""
    checkpoint, config = Checkpoint(source), QuantConfig("rtn", 8, GROUP, symmetric=True)
    family, draw, records = checkpoint.architecture.family, np.random.default_rng(0), []
    folder.mkdir()
    for layer in range(LAYERS):
        prefix = f"{family.layers}{layer}."
        names = [n for n in checkpoint.architecture.linears if n.startswith(prefix)]
        linears = [random_linear(name, draw) for name in names]
        own = [ModuleRecord.of(linear, layer, {}) for linear in linears]
        write_layer(folder, layer, linears, own)
        records += own
    write_floats(folder, checkpoint, list(checkpoint.tensors))
    write_source(folder, checkpoint)
    manifest = Manifest(
        schema=SCHEMA,
        version=__version__,
        name="wide",
        model_type=checkpoint.model_type,
        source=checkpoint.fingerprint(),
        config=config.to_dict(),
        calibration={},
        modules=records,
    )
    write_manifest(folder, manifest)
    return folder


@pytest.mark.slow
def test_a_graph_of_more_than_two_gigabytes(tmp_path):
    artifact = random_artifact(tmp_path / "artifact", make_source(tmp_path / "model"))
    out = tmp_path / "onnx"
    out.mkdir()
    started = time.perf_counter()
    command = [sys.executable, "-c", WRITE, artifact, out]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    memory, size = int(done.stdout.split()[-1]), (out / "text.onnx.data").stat().st_size
    print(
        f"written in {seconds:.0f} s, {size / 2**30:.2f} GiB, "
        f"{memory / 2**20:.0f} MiB more than at start"
    )
    assert size > 2**31 and memory < size / 4
    graphs = [f"{name}.onnx" for name in ("vision", "embedding", "text")]
    files = {*graphs, *(f"{graph}.data" for graph in graphs)}
    assert {f.name for f in out.glob("*.onnx*")} == files
    written, weights = OnnxFolder(out), Weights(artifact)
    for name in ("model.layers.0.mlp.down_proj", f"model.layers.{LAYERS - 1}.mlp.up_proj"):
        assert np.array_equal(written.weight(f"{name}.weight"), weights.array(f"{name}.weight"))
    runner = OnnxRunner(out)
    embeds = runner.embed(np.array([[40, 41, 42]]))
    positions = np.arange(3).reshape(1, 1, 3).repeat(3, axis=0)
    logits, _ = runner.step(embeds, np.ones((1, 3), np.int64), positions, None)
    assert logits.shape[:2] == (1, 3) and np.isfinite(logits).all() and logits.std() > 0
