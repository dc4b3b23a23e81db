"""A decoder of more than 2 GB, which no protobuf can hold: written with bounded memory, loaded and run."""

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
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.onnx.runner import OnnxRunner
from vlmq_export.quantizer import artifact as store
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.families import family_of
from vlmq_export.reference import Weights

LAYERS, WIDTH, INNER = 13, 4096, 11008
SHAPES = {"q_proj": (WIDTH, WIDTH), "k_proj": (512, WIDTH), "v_proj": (512, WIDTH), "o_proj": (WIDTH, WIDTH),
          "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}  # fmt: skip
WRITE = """
import sys
from pathlib import Path
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.onnx.writer import write
from vlmq_export.quantizer.artifact import Artifact
import mobius, onnx, transformers
def peak():  # of this process alone: ru_maxrss starts at the parent's
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
before = peak()
write(Artifact(Path(sys.argv[1])), Path(sys.argv[2]), FormatOptions())
print((peak() - before) * 1024)
"""


def make_source(folder):
    """Config, tokenizer and every tensor that is not quantized, of a 4096-wide Qwen2.5-VL."""
    config = reference_vlm.make_config("qwen2_5_vl", reference_vlm.load_tokenizer(), layers=LAYERS, depth=3)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = WIDTH, INNER, 32, 4
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    config.vision_config.out_hidden_size = WIDTH
    with torch.device("meta"):
        model = reference_vlm.make_model(config)
    family, draw = family_of(config.to_dict()), torch.Generator().manual_seed(0)
    quantized = set(family.linear_names(LAYERS))
    tensors = {}
    for name, p in model.named_parameters():
        hub = family.hub_name(name)
        if hub.rsplit(".", 1)[0] not in quantized:
            norm = "norm" in hub or "ln_q" in hub
            tensors[hub] = (torch.ones(p.shape) if norm else 0.02 * torch.randn(p.shape, generator=draw)).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    reference_vlm.copy_tokenizer(reference_vlm.BUNDLED, folder)
    (folder / "preprocessor_config.json").write_text((reference_vlm.BUNDLED / "preprocessor_config.json").read_text())
    return folder


def random_artifact(folder, source):
    """8-bit codes drawn at random: 2.2 billion of them."""
    checkpoint, config = Checkpoint(source), QuantConfig("rtn", 8, 128, symmetric=True)
    family, draw, records = family_of(checkpoint.config), np.random.default_rng(0), []
    folder.mkdir()
    for layer in range(LAYERS):
        linears, own = [], []
        for name in (n for n in family.linear_names(LAYERS) if n.startswith(f"{family.layers}{layer}.")):
            out, columns = SHAPES[name.rsplit(".", 1)[1]]
            bias = name.endswith(("q_proj", "k_proj", "v_proj"))
            codes = torch.from_numpy(np.frombuffer(draw.bytes(out * columns), np.uint8).reshape(out, columns).copy())
            scales = torch.full((out, columns // 128), 2.0**-12, dtype=torch.float16)
            linears.append(store.QuantizedLinear(
                name, codes, scales, torch.full((out, columns // 128), 128, dtype=torch.uint8),
                (torch.arange(columns) // 128).int(), torch.zeros(out).half() if bias else None, 8, 128, True,
            ))  # fmt: skip
            own.append(store.ModuleRecord(name, layer, 8, 128, True, out, columns, bias))
        store.write_layer(folder, layer, linears, own)
        records += own
    store.write_floats(folder, checkpoint, list(checkpoint.tensors))
    store.write_source(folder, checkpoint)
    store.write_manifest(folder, store.Manifest(
        store.SCHEMA, __version__, "wide", checkpoint.model_type, checkpoint.fingerprint(), config.to_dict(), {}, records,
    ))  # fmt: skip
    return folder


@pytest.mark.slow
def test_a_graph_of_more_than_two_gigabytes(tmp_path):
    artifact = random_artifact(tmp_path / "artifact", make_source(tmp_path / "model"))
    out = tmp_path / "onnx"
    out.mkdir()
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", WRITE, artifact, out], check=True, capture_output=True, text=True)
    memory, size = int(done.stdout.split()[-1]), (out / "text.onnx.data").stat().st_size
    print(
        f"written in {time.perf_counter() - started:.0f} s, {size / 2**30:.2f} GiB, {memory / 2**20:.0f} MiB more than at start"
    )
    assert size > 2**31 and memory < size / 4
    assert sorted(f.name for f in out.glob("*.onnx*")) == sorted(
        f"{g}.onnx{end}" for g in ("vision", "embedding", "text") for end in ("", ".data")
    )
    written, weights = OnnxFolder(out), Weights(artifact)
    for name in ("model.layers.0.mlp.down_proj", f"model.layers.{LAYERS - 1}.mlp.up_proj"):
        assert np.array_equal(written.weight(f"{name}.weight"), weights.array(f"{name}.weight"))
    runner = OnnxRunner(out)
    embeds = runner.embed(np.array([[40, 41, 42]]))
    logits, _ = runner.step(embeds, np.ones((1, 3), np.int64), np.arange(3).reshape(1, 1, 3).repeat(3, axis=0), None)
    assert logits.shape[:2] == (1, 3) and np.isfinite(logits).all() and logits.std() > 0
