"""Small valid inputs for every reader, which the mutations start from."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save, save_file

from tests.artifacts import GRIDS, rtn_artifact
from tests.formats.gguf.test_hostile import ARCH, TWO_STRINGS, U32, container, key, tensor
from vlmq_export import bundled
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.quantizer.artifact.manifest import Manifest, ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.artifact.write import write_layer, write_manifest
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.storage.tensors import read_header

CONFIG = json.loads((bundled.REFERENCE_VLM / "config.json").read_text("utf-8"))
LINEARS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
SIDE, GROUP = 64, 32


def safetensors() -> bytes:
    a, b = torch.zeros(2, 3), torch.ones(4, dtype=torch.int64)
    return save({"a": a, "b": b, "c": torch.ones(2, 2).bfloat16()})


def checkpoint(folder: Path) -> None:
    """A checkpoint of two shards, with an index and a config."""
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.zeros(2, 3)}, folder / names[0])
    save_file({"b": torch.zeros(4)}, folder / names[1])
    index = {"metadata": {"total_size": 40}, "weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))


def headers(folder: Path) -> None:
    """All that a dry run reads of a model: its config, and the header of its weights.

    The weights are the reference model's header and a sparse file behind it.
    """
    folder.mkdir()
    header = read_header(bundled.REFERENCE_VLM / "model.safetensors")
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + max(info["data_offsets"][1] for info in header.values()))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def artifact(folder: Path) -> None:
    """An artifact of two linears of one layer, and a norm."""
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "config.json").write_text(json.dumps(CONFIG))
    config = QuantConfig("rtn", 4, GROUP)
    draw = torch.Generator().manual_seed(0)
    linears, records = [], []
    for name in LINEARS:
        solution = Solution(
            torch.randint(0, 16, (SIDE, SIDE), dtype=torch.uint8, generator=draw),
            torch.ones(SIDE, 2).half(),
            torch.full((SIDE, 2), 8, dtype=torch.uint8),
            torch.arange(SIDE, dtype=torch.int32) // GROUP,
        )
        bias = torch.zeros(SIDE).half() if "q_proj" in name else None
        linears.append(QuantizedLinear(name, solution, bias, 4, GROUP, False))
        records.append(ModuleRecord(name, 0, 4, GROUP, False, SIDE, SIDE, bias is not None))
    write_layer(folder, 0, linears, records)
    save_file({"model.norm.weight": torch.ones(SIDE)}, folder / "float-00001.safetensors")
    manifest = Manifest(1, "test", "tiny", "qwen2_5_vl", {}, config.to_dict(), {"rows": 0}, records)
    write_manifest(folder, manifest)


def gptq_folder(folder: Path) -> None:
    """The artifact above in the GPTQ format, in two shards."""
    source = folder.with_name("artifact-of-gptq")
    artifact(source)
    folder.mkdir()
    FORMATS["gptq"].write(Artifact(source), folder, FormatOptions(name="x", shard_bytes=3500))


def compressed_folder(folder: Path) -> None:
    """The artifact above in the compressed-tensors format, in one file."""
    source = folder.with_name("artifact-of-compressed")
    artifact(source)
    folder.mkdir()
    FORMATS["compressed-tensors"].write(Artifact(source), folder, FormatOptions(name="x"))


def gptq_model(folder: Path) -> None:
    """The reference model as a GPTQ checkpoint, for the import."""
    whole = rtn_artifact(folder.with_name("artifact-of-model"), GRIDS["w4g128"])
    folder.mkdir()
    FORMATS["gptq"].write(whole, folder, FormatOptions(name="x"))


def onnx_folder(folder: Path) -> None:
    """Three graphs. The text graph has a quantized linear, and a float in a data file."""
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
        attributes = {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 0}
        nodes.append(
            helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes)
        )
        data = floats.raw_data
        floats.ClearField("raw_data")
        floats.data_location = TensorProto.EXTERNAL
        place = {"location": "text.onnx.data", "offset": "0", "length": str(len(data))}
        for k, v in place.items():
            floats.external_data.add(key=k, value=v)
        (folder / "text.onnx.data").write_bytes(data)
        initializers += [packed, scales, zeros]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    graph = helper.make_graph(nodes, name, [x], [], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()


def gguf() -> bytes:
    number = key("n", U32, struct.pack("<I", 7))
    tensors = [tensor("t", [4, 2]), tensor("q", [32, 2], kind=2, offset=32)]
    return container([ARCH, TWO_STRINGS, number], tensors, bytes(32 + 36))


def rows() -> list[dict]:
    """Two calibration rows: one in LLaVA's layout, one of chat messages."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return [{"id": "1", "image": "a.png", "conversations": turns}, {"messages": chat}]


def image(kind: str = "PNG") -> bytes:
    """A small image that its EXIF data turns by a quarter."""
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
