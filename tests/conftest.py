"""Models and files that several test modules read. A test that damages one makes a copy first."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.artifacts import GRIDS, rtn_artifact
from tools.reference_vlm.model import make_random_checkpoint
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export import bundled
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.files.text import write_text
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.quantizer.artifact.read import Artifact


@pytest.fixture
def one_thread():
    """One thread for torch, because the bytes of a result depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory) -> Path:
    """A random Qwen2-VL checkpoint with a flat config.json and an output matrix of its own."""
    return make_random_checkpoint(
        tmp_path_factory.mktemp("qwen2_vl"), "qwen2_vl", layers=2, depth=3, tied=False
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(arch, **options of make_tiny): a random checkpoint of that family, made once."""
    made: dict[str, Path] = {}

    def get(arch: str, **options) -> Path:
        key = "-".join([arch, *(f"{k}_{v}" for k, v in sorted(options.items()))])
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp(key), arch, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """artifacts(tag of GRIDS, source): an artifact rounded to nearest, made once."""
    made: dict[str, Artifact] = {}

    def get(tag: str, source: Path = bundled.REFERENCE_VLM) -> Artifact:
        key = f"{tag}-{source.name}"
        if key not in made:
            made[key] = rtn_artifact(tmp_path_factory.mktemp(key), GRIDS[tag], source)
        return made[key]

    return get


@pytest.fixture(scope="session")
def gguf_files(artifacts, tmp_path_factory):
    """The bundled model at 4 bits: (artifact, text file, mmproj, float twin of the text file)."""
    artifact, folder = artifacts("w4g128"), tmp_path_factory.mktemp("gguf")
    FORMATS["gguf"].write(artifact, folder, FormatOptions(name="tiny-vlm"))
    twin, layout = tmp_path_factory.mktemp("twin") / "twin.gguf", Layout.of(artifact.architecture)
    write_text(artifact, layout, twin, FormatOptions(name="tiny-vlm"), twin=True)
    return artifact, *read.find_files(folder), twin


@pytest.fixture
def model(tmp_path):
    """A copy of the reference checkpoint, to be damaged."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in bundled.REFERENCE_VLM.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def shards(tmp_path):
    """A checkpoint of two small shards, to be damaged."""
    from tests.hostile.attacks import seeds

    folder = tmp_path / "shards"
    seeds.checkpoint(folder)
    return folder


@pytest.fixture
def artifact(tmp_path):
    """An artifact of two linears of one layer and a norm, to be damaged."""
    from tests.hostile.attacks import seeds

    folder = tmp_path / "artifact"
    seeds.artifact(folder)
    return folder
