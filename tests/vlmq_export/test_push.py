"""--push-to-hub: what is refused before any work, what is uploaded, and what never is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.vlmq_export.small_hub import TOKEN, SmallHub, small_hub
from tests.vlmq_export.test_cli import call, refused
from vlmq_export import Recipe, export
from vlmq_export.formats.proof.checks import Check
from vlmq_export.output import hub as uploads
from vlmq_export.proving.parity import PARITY_FILE, Parity, environment

FLAGS = ("--format", "gguf", "--method", "rtn", "--push-to-hub", "me/small")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[SmallHub]:
    """A hub that huggingface_hub takes for the hub, with a token that it knows."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("vlmq_export.formats.gguf.requirements.missing", lambda: None)
    # The small hub has the older way of uploading.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with small_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        yield hub


@pytest.mark.parametrize("early", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("args", "token", "says"),
    [
        (FLAGS, "", "no token; run `hf auth login`, or set HF_TOKEN"),
        (FLAGS, "hf_wrong", "the hub does not take the token"),
        ((*FLAGS, "--no-verify"), TOKEN, "leave out --no-verify"),
        ((*FLAGS[:-1], "a/b/c"), TOKEN, "a/b/c"),
    ],
    ids=["no token", "wrong token", "not verified", "bad name"],
)
def test_what_cannot_be_uploaded_is_refused_before_any_work(
    hub, tmp_path, monkeypatch, args, token, says, early
):
    monkeypatch.setenv("HF_TOKEN", token)
    out = tmp_path / "out"
    assert says in refused(*args, *early, "--out", out, code=2)
    assert not out.exists() and not hub.repositories


def test_a_hub_that_is_away_is_refused_before_any_work(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub does not take" in refused(*FLAGS, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_a_runtime_that_is_missing_is_refused_before_any_work(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmq_export.formats.gguf.requirements.missing", lambda: "xllamacpp")
    err = refused(*FLAGS, "--dry-run", "--out", tmp_path / "out", code=2)
    assert "xllamacpp is not installed" in err


def proven(monkeypatch, verified: bool) -> None:
    """Let a run find its files right or wrong, without the minute that their runtimes take."""
    status = "passed" if verified else "failed"
    check = Check("gguf", "L1", "every weight", status, 0.0 if verified else 1.0, 0.0, "differ")
    told = {"weights": 1, "images": 0}

    def prove(out: Path, *_args: object) -> tuple[Parity, None]:
        parity = Parity(verified, [check], told, environment=environment())
        parity.write(out / PARITY_FILE)
        return parity, None

    monkeypatch.setattr("vlmq_export.pipeline.prove", prove)


def test_files_that_fail_are_never_uploaded(tmp_path, monkeypatch):
    proven(monkeypatch, verified=False)
    monkeypatch.setattr(uploads, "refuse_push", lambda *args: None)
    monkeypatch.setattr(uploads, "push", lambda *args: pytest.fail("uploaded"))
    recipe = Recipe(format=["gguf"], method="rtn", out=tmp_path / "out")
    assert not export(recipe, push_to_hub="me/small").verified


def test_a_verified_folder_is_uploaded_without_the_artifact(hub, tmp_path, monkeypatch):
    proven(monkeypatch, verified=True)
    out = tmp_path / "out"
    hub.refuses_commits = True
    code, _, err = call(*FLAGS, "--out", out)
    assert code == 1 and "is verified, and was not uploaded" in err and "--resume" in err
    assert (out / "SHA256SUMS").is_file() and not hub.files

    hub.refuses_commits = False
    (out / "photo.jpg").write_bytes(b"of the user's own")
    code, _, err = call(*FLAGS, "--out", out, "--resume")
    assert code == 0, err
    assert hub.repositories == {"me/small": True}  # and it is private
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    formats = {name for name in written if name.startswith("gguf/")}
    assert len(formats) == 3
    assert set(hub.files) == {"README.md", "parity.json", "SHA256SUMS"} | formats
    for name, content in hub.files.items():
        assert content == (out / name).read_bytes()
        assert str(tmp_path).encode() not in content


def test_a_repository_that_is_there_keeps_its_visibility(hub, tmp_path):
    hub.repositories["me/small"] = False
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("{}")
    address = uploads.push(Path(tmp_path), "me/small", ["gguf"])
    assert address == f"{hub.address}/me/small/commit/1"
    assert hub.repositories == {"me/small": False} and set(hub.files) == {"gguf/a.gguf"}
