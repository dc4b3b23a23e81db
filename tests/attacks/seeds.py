"""Small valid inputs of every reader: what mutations start from."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save, save_file

from tests.artifacts import GRIDS, rtn_artifact
from tests.test_gguf_hostile import ARCH, ARRAY, STRING, U32, array, container, key, string, tensor
from vlmq_export import bundled
from vlmq_export.formats import gptq
from vlmq_export.formats.base import FormatOptions
from vlmq_export.quantizer import artifact as store
from vlmq_export.quantizer.checkpoint import read_header
from vlmq_export.quantizer.config import QuantConfig

CONFIG = json.loads((bundled.REFERENCE_VLM / "config.json").read_text("utf-8"))
LINEARS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
SIDE, GROUP = 64, 32


def safetensors() -> bytes:
    return save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int64), "c": torch.ones(2, 2).bfloat16()})


def checkpoint(folder: Path) -> None:
    """Two shards, an index, a config."""
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.zeros(2, 3)}, folder / names[0])
    save_file({"b": torch.zeros(4)}, folder / names[1])
    index = {"metadata": {"total_size": 40}, "weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))


def headers(folder: Path) -> None:
    """The reference model's config and header over a file of holes: all that a dry run reads."""
    folder.mkdir()
    header = read_header(bundled.REFERENCE_VLM / "model.safetensors")
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + max(info["data_offsets"][1] for info in header.values()))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def artifact(folder: Path) -> None:
    """Two linears of one layer, a few floats."""
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "config.json").write_text(json.dumps(CONFIG))
    config = QuantConfig("rtn", 4, GROUP)
    draw = torch.Generator().manual_seed(0)
    linears = [
        store.QuantizedLinear(
            name, torch.randint(0, 16, (SIDE, SIDE), dtype=torch.uint8, generator=draw), torch.ones(SIDE, 2).half(),
            torch.full((SIDE, 2), 8, dtype=torch.uint8), torch.arange(SIDE, dtype=torch.int32) // GROUP,
            torch.zeros(SIDE).half() if "q_proj" in name else None, 4, GROUP, False,
        )
        for name in LINEARS
    ]  # fmt: skip
    records = [store.ModuleRecord(q.name, 0, 4, GROUP, False, SIDE, SIDE, q.bias is not None) for q in linears]
    store.write_layer(folder, 0, linears, records)
    save_file({"model.norm.weight": torch.ones(SIDE)}, folder / "float-00001.safetensors")
    manifest = store.Manifest(1, "test", "tiny", "qwen2_5_vl", {}, config.to_dict(), {"rows": 0}, records)
    store.write_manifest(folder, manifest)


def gptq_folder(folder: Path) -> None:
    artifact(folder.with_name("artifact-of-gptq"))
    folder.mkdir()
    gptq.write(
        store.Artifact(folder.with_name("artifact-of-gptq")), folder, FormatOptions(name="x", gptq_shard_bytes=3500)
    )


def gptq_model(folder: Path) -> None:
    """The reference model as a GPTQ checkpoint: a MODEL that is taken over."""
    whole = rtn_artifact(folder.with_name("artifact-of-model"), GRIDS["w4g128"])
    folder.mkdir()
    gptq.write(whole, folder, FormatOptions(name="x"))


def onnx_folder(folder: Path) -> None:
    """Three graphs; the text graph has a quantized linear and a float whose bytes lie in a data file."""
    folder.mkdir()
    for name in ("vision", "embedding", "text"):
        (folder / f"{name}.onnx").write_bytes(_graph(folder, name))


def _graph(folder: Path, name: str) -> bytes:
    floats = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), f"{name}.weight")
    initializers, nodes = [floats], []
    if name == "text":
        module = LINEARS[0]
        packed = numpy_helper.from_array(np.zeros((8, 2, 16), np.uint8), f"{module}.qweight")
        scales = numpy_helper.from_array(np.ones((8, 2), np.float32), f"{module}.scales")
        zeros = numpy_helper.from_array(np.zeros((8, 1), np.uint8), f"{module}.qzeros")
        inputs = ["x", packed.name, scales.name, zeros.name]
        nodes.append(
            helper.make_node(
                "MatMulNBits", inputs, ["y"], domain="com.microsoft", K=64, N=8, bits=4, block_size=32, accuracy_level=0
            )
        )
        data = floats.raw_data
        floats.ClearField("raw_data")
        floats.data_location = TensorProto.EXTERNAL
        for k, v in {"location": "text.onnx.data", "offset": "0", "length": str(len(data))}.items():
            floats.external_data.add(key=k, value=v)
        (folder / "text.onnx.data").write_bytes(data)
        initializers += [packed, scales, zeros]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    graph = helper.make_graph(nodes, name, [x], [], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()


def onnx_file() -> bytes:
    model = onnx.load_model_from_string(_graph(Path("/nonexistent"), "vision"))
    return model.SerializeToString()


def gguf() -> bytes:
    keys = [ARCH, key("a", ARRAY, array(STRING, 2, string("x") + string("y"))), key("n", U32, struct.pack("<I", 7))]
    return container(keys, [tensor("t", [4, 2]), tensor("q", [32, 2], kind=2, offset=32)], bytes(32 + 36))


def rows() -> list[dict]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return [{"id": "1", "image": "a.png", "conversations": turns}, {"messages": chat}]


def image(kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(out, kind, exif=exif)
    return out.getvalue()


RECIPE = b"""model: some/folder
format: [gguf, gptq]
bits: 3
group-size: 64
sym: true
samples: 12
seed: 3
out: runs/one
"""
