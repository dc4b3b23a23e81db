"""A model of the hub keeps its repository's name, though its cache folder is named by a commit."""

import json
from pathlib import Path

import gguf
import pytest
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from tests.vlmq_export.test_cli import call
from vlmq_export import bundled
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.sources.origin import Origin

REPOSITORY, REVISION = "Qwen/Qwen2.5-VL-3B-Instruct", "66285546d2b821cf421d4f5eb2576359d3770cd3"


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    """The bundled model in a cache as huggingface_hub lays it out, without a network."""
    cache = tmp_path / "hub"
    repository = cache / repo_folder_name(repo_id=REPOSITORY, repo_type="model")
    folder = repository / "snapshots" / REVISION
    for place in (folder, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(p for p in bundled.REFERENCE_VLM.iterdir() if p.is_file()):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (folder / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def export(model: object, out: Path | None) -> str:
    """Write the smallest export of MODEL. Returns what the command printed on stdout."""
    where = [] if out is None else ["--out", out]
    code, printed, err = call(
        model, "--format", "gguf", "--method", "rtn", "--no-verify", "--json", *where
    )
    assert code == 0, err
    return printed


def test_files_and_card_of_a_hub_id_carry_the_repository(snapshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(REPOSITORY, None)
    (out,) = tmp_path.glob("vlmq-*")
    assert out.name.startswith("vlmq-Qwen2.5-VL-3B-Instruct-")
    names = sorted(p.name for p in (out / "gguf").glob("*.gguf"))
    assert len(names) == 2 and all("Qwen2.5-VL-3B-Instruct" in name for name in names)
    card = (out / "README.md").read_text()
    assert f'base_model: "{REPOSITORY}"' in card and f"at revision `{REVISION}`" in card
    assert f"# {Origin.of(snapshot).name}," in card
    manifest = Artifact(out / "artifact").manifest
    found = manifest.name, manifest.repository, manifest.revision
    assert found == ("Qwen2.5-VL-3B-Instruct", REPOSITORY, REVISION)
    fields = gguf.GGUFReader(out / "gguf" / names[-1]).fields
    assert fields["general.base_model.0.name"].contents() == "Qwen2.5-VL-3B-Instruct"
    assert fields["general.base_model.0.repo_url"].contents().endswith(REPOSITORY)
    # An export of that artifact has not forgotten it.
    export(out / "artifact", tmp_path / "again")
    assert f'base_model: "{REPOSITORY}"' in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("link", [False, True], ids=["snapshot", "link to it"])
def test_a_path_into_the_cache_is_the_repository_too(snapshot, tmp_path, link):
    if link:
        (tmp_path / "mine").symlink_to(snapshot)
        snapshot = tmp_path / "mine"
    export(snapshot, tmp_path / "out")
    assert Artifact(tmp_path / "out" / "artifact").manifest.repository == REPOSITORY


def test_names_of_folders_that_no_cache_made(tmp_path):
    cached = tmp_path / "models--gpt2" / "snapshots" / "abc"
    assert Origin.of(cached) == Origin("gpt2", "gpt2", "abc")
    for own in (tmp_path / "snapshots" / "abc", tmp_path / "models--a--b" / "refs" / "abc"):
        assert Origin.of(own) == Origin("abc")


def test_a_folder_of_ones_own_has_no_repository_in_its_manifest(artifacts):
    kept = json.loads((artifacts("w4g128").path / "manifest.json").read_text())
    assert not {"repository", "revision"} & kept.keys()
