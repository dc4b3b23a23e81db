"""Every reader of ours behind one call: put `data` in its place among good files, read all there is to read.

The invariant: a VlmqError of one line, or a result; never another exception, never long, never much memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.attacks import seeds
from vlmq_export import checksums, formats
from vlmq_export.errors import VlmqError
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gptq.imported import GptqCheckpoint
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.inspection import inspect_artifact, inspect_path
from vlmq_export.parity import Parity
from vlmq_export.pipeline import open_checkpoint
from vlmq_export.plan import artifact_plan, model_plan, plan_run
from vlmq_export.quantizer.artifact import Artifact, read_layer, read_layer_records
from vlmq_export.quantizer.calibration import load_image, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.resuming import RUN, claim
from vlmq_export.recipe import FormatName, Recipe, load_recipe


@dataclass(frozen=True)
class Target:
    """`prepare(folder)` lays out the good files; `file` is the one that is replaced; `read(folder)` reads everything."""

    file: str
    prepare: Callable[[Path], None]
    read: Callable[[Path], object]
    cost: int = 1  # as many times fewer inputs in the suite, and as much more time: transformers builds an empty model

    def seed(self, folder: Path) -> bytes:
        if not folder.exists():
            self.prepare(folder)
        return (folder / self.file).read_bytes()

    def attack(self, folder: Path, data: bytes) -> str:
        """What the reader says, or nothing. Any other exception than a VlmqError comes through."""
        (folder / self.file).write_bytes(data)
        try:
            self.read(folder)
        except VlmqError as e:
            said = str(e)
            assert said.isprintable() and 0 < len(said) <= 2001, said
            return said
        return ""


def _alone(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_bytes(content())

    return prepare


def _weights(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (folder / "model.safetensors").write_bytes(seeds.safetensors())


def _data(rows: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        folder.mkdir()
        (folder / "a.png").write_bytes(seeds.image())
        text = json.dumps(seeds.rows()) if rows.endswith(".json") else "\n".join(map(json.dumps, seeds.rows()))
        (folder / rows).write_text(text)

    return prepare


def _read_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name in list(checkpoint.tensors)[:8]:
        checkpoint.tensor(name)


ALL = Recipe(format=list(FormatName))


def _dry_run(folder: Path) -> None:
    plan_run(model_plan(Checkpoint(folder), ALL.quant_config(), "model"), ALL)


def _read_artifact(folder: Path) -> None:
    artifact = Artifact(folder)
    for linear in artifact.linears():
        linear.decode()
    for name in artifact.float_names():
        artifact.float_tensor(name)
    inspect_artifact(folder)
    plan_run(artifact_plan(artifact), ALL)


def _read_layer(folder: Path) -> None:
    read_layer_records(folder, 0)
    for linear in read_layer(folder, 0):
        linear.decode()


def _read_import(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    if isinstance(checkpoint, GptqCheckpoint):
        plan_run(model_plan(checkpoint, checkpoint.quant_config, "model"), ALL)
        checkpoint.linear(checkpoint.linears[0])


def _run_prepared(folder: Path) -> None:
    folder.mkdir()
    claim(folder, {"schema": 1, "config": QuantConfig().to_dict(), "source": {}}, resume=False)


def _read_gptq(folder: Path) -> None:
    read = GptqFolder(folder)
    for name in read.weight_names():
        read.array(name)
    inspect_path(folder)


def _read_onnx(folder: Path) -> None:
    try:
        read = OnnxFolder(folder)
        for name in [*read.linears, *read.floats]:
            read.weight(name)
    finally:
        formats.get("onnx").inspect(folder)


def _read_gguf(folder: Path) -> None:
    for _ in GGUFFile(folder / "x.gguf").items():
        pass
    inspect_path(folder / "x.gguf")


def _sums(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"a")
    checksums.write_sums(folder)


PARITY = {
    "verified": True, "reference": {}, "seconds": {}, "environment": {}, "version": "0",
    "checks": [{"format": "gptq", "level": "L1", "name": "x", "status": "passed", "value": 0.0}],
}  # fmt: skip

TARGETS = {
    "safetensors": Target("model.safetensors", _weights, _read_checkpoint),
    "index": Target("model.safetensors.index.json", seeds.checkpoint, _read_checkpoint),
    "config": Target("config.json", seeds.headers, _dry_run),
    "rows-json": Target("rows.json", _data("rows.json"), lambda f: read_rows(f / "rows.json")),
    "rows-jsonl": Target("rows.jsonl", _data("rows.jsonl"), lambda f: read_rows(f / "rows.jsonl")),
    "png": Target("a.png", _alone("a.png", seeds.image), lambda f: load_image(f / "a.png")),
    "jpeg": Target("a.jpg", _alone("a.jpg", lambda: seeds.image("JPEG")), lambda f: load_image(f / "a.jpg")),
    "webp": Target("a.webp", _alone("a.webp", lambda: seeds.image("WEBP")), lambda f: load_image(f / "a.webp")),
    "tiff": Target("a.tiff", _alone("a.tiff", lambda: seeds.image("TIFF")), lambda f: load_image(f / "a.tiff")),
    "recipe": Target("recipe.yaml", _alone("recipe.yaml", lambda: seeds.RECIPE), lambda f: load_recipe(f / "recipe.yaml", {})),
    "manifest": Target("manifest.json", seeds.artifact, _read_artifact),
    "artifact-layer": Target("layer-00000.safetensors", seeds.artifact, _read_artifact),
    "artifact-config": Target("source/config.json", seeds.artifact, _read_artifact),
    "resumed-layer": Target("layer-00000.safetensors", seeds.artifact, _read_layer),
    "run": Target(RUN, _run_prepared, lambda f: claim(f, {"schema": 1, "source": {}}, resume=True)),
    "gptq-config": Target("config.json", seeds.gptq_folder, _read_gptq),
    "gptq-index": Target("model.safetensors.index.json", seeds.gptq_folder, _read_gptq),
    "gptq-shard": Target("model-00001-of-00002.safetensors", seeds.gptq_folder, _read_gptq),
    "import-config": Target("config.json", seeds.gptq_model, _read_import, cost=5),
    "onnx-text": Target("text.onnx", seeds.onnx_folder, _read_onnx),
    "onnx-vision": Target("vision.onnx", seeds.onnx_folder, _read_onnx),
    "gguf": Target("x.gguf", _alone("x.gguf", seeds.gguf), _read_gguf),
    "parity": Target("parity.json", _alone("parity.json", lambda: json.dumps(PARITY).encode()), lambda f: Parity.read(f / "parity.json")),
    "sums": Target("SHA256SUMS", _sums, lambda f: checksums.changed_files(f)),
}  # fmt: skip
