"""Every reader of ours behind one call, `Target.attack`.

It writes damaged data in the place of one of a set of good files, and reads all that there is. A
reader may give a result or raise a VlmqError of one line. Any other exception is a bug.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.hostile.attacks import seeds
from vlmq_export.errors import VlmqError
from vlmq_export.formats import NAMES
from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.contract import FORMATS
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.model_plan import artifact_plan, model_plan
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.inspection import inspect_artifact, inspect_path
from vlmq_export.output import checksums
from vlmq_export.planning.run_plan import plan_run
from vlmq_export.proving.fidelity import Example, Fidelity
from vlmq_export.proving.parity import Parity
from vlmq_export.quantizer.artifact.read import Artifact, read_layer, read_layer_records
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.resume import RUN, claim
from vlmq_export.quantizer.samples.images import load_image
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import load_recipe
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.gptq_model import GptqModel
from vlmq_export.sources.locate import open_source


@dataclass(frozen=True)
class Target:
    """A reader and the good files that it reads."""

    file: str  # the one that is replaced
    prepare: Callable[[Path], None]  # lays out the good files in a folder
    read: Callable[[Path], object]  # reads everything in the folder
    # How much longer it takes than others. It may take so many times more, on so many times fewer
    # inputs.
    cost: int = 1

    def seed(self, folder: Path) -> bytes:
        """The good content of `file`. The first call lays out the folder."""
        if not folder.exists():
            self.prepare(folder)
        return (folder / self.file).read_bytes()

    def attack(self, folder: Path, data: bytes) -> str:
        """The reader's message on `data` in the place of `file`, or "" if it reads it.

        Exceptions other than VlmqError are not caught.
        """
        (folder / self.file).write_bytes(data)
        try:
            self.read(folder)
        except VlmqError as e:
            said = str(e)
            assert said.isprintable() and 0 < len(said) <= 2001, said
            return said
        return ""


def _alone(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    """`prepare` of a target with a single file."""

    def prepare(folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_bytes(content())

    return prepare


def _weights(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (folder / "model.safetensors").write_bytes(seeds.safetensors())


def _rows(name: str) -> Target:
    """The reader of calibration rows; the suffix of `name` is the layout of the file."""

    def prepare(folder: Path) -> None:
        folder.mkdir()
        (folder / "a.png").write_bytes(seeds.image())
        rows = seeds.rows()
        whole = name.endswith(".json")
        text = json.dumps(rows) if whole else "\n".join(map(json.dumps, rows))
        (folder / name).write_text(text)

    return Target(name, prepare, lambda folder: read_rows(folder / name))


def _image(name: str, kind: str) -> Target:
    """The reader of images; `kind` is Pillow's name of the file format."""
    prepare = _alone(name, lambda: seeds.image(kind))
    return Target(name, prepare, lambda folder: load_image(folder / name))


def _read_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name in list(checkpoint.tensors)[:8]:
        checkpoint.tensor(name)


ALL = Recipe(format=list(NAMES))


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
    source = open_source(str(folder))
    if isinstance(source, GptqModel):
        source.plan(source.recipe_for(ALL, CalibrationRows(ALL)))
        source.checkpoint.linear(source.checkpoint.linears[0])


def _read_gptq(folder: Path) -> None:
    read = GptqFolder(folder)
    for name in read.weight_names():
        read.array(name)
    inspect_path(folder)


def _read_compressed(folder: Path) -> None:
    read = CompressedFolder(folder)
    for name in read.weight_names():
        read.array(name)
    FORMATS["compressed-tensors"].inspect(folder)


def _read_onnx(folder: Path) -> None:
    try:
        read = OnnxFolder(folder)
        for name in [*read.linears, *read.floats]:
            read.weight(name)
    finally:
        FORMATS["onnx"].inspect(folder)


def _read_gguf(folder: Path) -> None:
    for _ in GGUFFile(folder / "x.gguf").items():
        pass
    inspect_path(folder / "x.gguf")


def _sums(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"a")
    checksums.write_sums(folder)


def _run(folder: Path) -> None:
    folder.mkdir()
    claim(folder, {"schema": 1, "config": QuantConfig().to_dict(), "source": {}}, resume=False)


def _resume(folder: Path) -> None:
    claim(folder, {"schema": 1, "source": {}}, resume=True)


def _recipe() -> bytes:
    return seeds.RECIPE


def _read_recipe(folder: Path) -> None:
    load_recipe(folder / "recipe.yaml", {})


def _parity() -> bytes:
    check = {"format": "gptq", "level": "L1", "name": "x", "status": "passed", "value": 0.0}
    parts: dict[str, dict] = {"reference": {}, "seconds": {}, "environment": {}}
    return json.dumps({"verified": True, **parts, "version": "0", "checks": [check]}).encode()


def _read_parity(folder: Path) -> None:
    Parity.read(folder / "parity.json")


def _fidelity() -> bytes:
    example = asdict(Example(0, "a", "What?", "x", 0.5, "x", "y", True))
    figures = {"rows": 1, "tokens": 2, "kl": 0.5, "agreement": 0.5, "answers": 1, "changed": 1}
    return json.dumps(asdict(Fidelity()) | figures | {"examples": [example]}).encode()


def _read_fidelity(folder: Path) -> None:
    Fidelity.read(folder / "fidelity.json").sentence()


TARGETS = {
    "safetensors": Target("model.safetensors", _weights, _read_checkpoint),
    "index": Target("model.safetensors.index.json", seeds.checkpoint, _read_checkpoint),
    "config": Target("config.json", seeds.headers, _dry_run),
    "rows-json": _rows("rows.json"),
    "rows-jsonl": _rows("rows.jsonl"),
    "png": _image("a.png", "PNG"),
    "jpeg": _image("a.jpg", "JPEG"),
    "webp": _image("a.webp", "WEBP"),
    "tiff": _image("a.tiff", "TIFF"),
    "recipe": Target("recipe.yaml", _alone("recipe.yaml", _recipe), _read_recipe),
    "manifest": Target("manifest.json", seeds.artifact, _read_artifact),
    "artifact-layer": Target("layer-00000.safetensors", seeds.artifact, _read_artifact),
    "artifact-config": Target("source/config.json", seeds.artifact, _read_artifact),
    "resumed-layer": Target("layer-00000.safetensors", seeds.artifact, _read_layer),
    "run": Target(RUN, _run, _resume),
    "gptq-config": Target("config.json", seeds.gptq_folder, _read_gptq),
    "gptq-index": Target("model.safetensors.index.json", seeds.gptq_folder, _read_gptq),
    "compressed-config": Target("config.json", seeds.compressed_folder, _read_compressed),
    "compressed-shard": Target("model.safetensors", seeds.compressed_folder, _read_compressed),
    "gptq-shard": Target("model-00001-of-00002.safetensors", seeds.gptq_folder, _read_gptq),
    # cost: transformers builds the empty model for every input
    "import-config": Target("config.json", seeds.gptq_model, _read_import, cost=5),
    "onnx-text": Target("text.onnx", seeds.onnx_folder, _read_onnx),
    "onnx-vision": Target("vision.onnx", seeds.onnx_folder, _read_onnx),
    "gguf": Target("x.gguf", _alone("x.gguf", seeds.gguf), _read_gguf),
    "parity": Target("parity.json", _alone("parity.json", _parity), _read_parity),
    "fidelity": Target("fidelity.json", _alone("fidelity.json", _fidelity), _read_fidelity),
    "sums": Target("SHA256SUMS", _sums, checksums.changed_files),
}
