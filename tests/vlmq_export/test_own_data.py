"""A stranger's run: photos in a folder, a file of rows about them, and the command."""

import json
import logging
import re

import pytest

from tests.artifacts import GRIDS, rtn_artifact
from tests.vlmq_export.own_data import own_rows
from tests.vlmq_export.test_cli import call, refused
from vlmq_export import bundled, pipeline
from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import CalibrationError, UsageError
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.proving import verify
from vlmq_export.proving.held_out import held_out, held_out_again
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.storage.whole_files import sha256_file
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.calibration import CalibrationRows, calibration_samples


@pytest.fixture(autouse=True)
def log_is_seen(caplog):
    logging.getLogger("vlmq_export").propagate = True
    caplog.set_level(logging.INFO, "vlmq_export")


@pytest.fixture
def proven(monkeypatch):
    """The rows that each proof was given. The proofs themselves are not run."""
    given = []

    def prove(_out, _recipe, rows, *_more):
        given.append([row.id for row in rows])
        return None, None

    for module in (pipeline, verify):
        monkeypatch.setattr(module, "prove", prove)
    return given


def data(**keys) -> CalibrationRows:
    return CalibrationRows(Recipe(format=["gptq"], **keys))


def ids(rows) -> list[str]:
    return [row.id for row in rows]


# --- which rows are held out ----------------------------------------------------------------------


def test_the_users_own_rows_are_held_out_and_found_again_from_another_folder(
    tmp_path, monkeypatch, proven
):
    own_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ("--calibration", "chats.json", "--image-root", "images", "--samples", 8)
    export = ("--format", "gptq", "--method", "gptq", "--out", "out", "--quiet")
    code, _, err = call(*export, *flags)
    assert code == 0, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = call("verify", tmp_path / "out", "--quiet")
    assert code == 0, err
    first, again = proven
    assert first == again and len(first) == 4 and all(i.startswith("own-") for i in first)
    described = json.loads((tmp_path / "out" / "artifact" / "manifest.json").read_text("utf-8"))
    assert described["calibration"]["rows"] == 8


def test_resume_in_another_folder_is_the_same_recipe(tmp_path, monkeypatch, proven):
    own_rows(tmp_path)
    export = ("--format", "gptq", "--method", "gptq", "--samples", 8, "--out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    flags = ("--calibration", "chats.json", "--image-root", "images", "--quiet")
    assert call(*export, *flags)[0] == 0
    monkeypatch.chdir(tmp_path.parent)
    own = ("--calibration", tmp_path / "chats.json", "--image-root", tmp_path / "images", "--quiet")
    assert call(*export, *own, "--resume")[0] == 0
    # the same words name other files here
    code, _, err = call(*export, *flags, "--resume")
    assert code == 2 and "calibration was" in err


def test_no_row_is_calibrated_on_and_held_out(tmp_path):
    path = own_rows(tmp_path)
    rows = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(rows + rows))  # every row has a copy
    rows = data(calibration=path, image_root=tmp_path / "images", samples=8)
    taken = {row.content for row in rows.taken}
    assert len(rows.taken) == 8
    assert held_out(rows) and not taken & {row.content for row in held_out(rows)}


def test_a_method_without_samples_leaves_all_rows(tmp_path):
    path = own_rows(tmp_path)
    rows = held_out(data(calibration=path, image_root=tmp_path / "images", method="rtn"))
    assert len(rows) == 12


def test_the_bundled_rows_are_held_out_where_calibration_takes_all_and_the_log_says_so(
    tmp_path, caplog
):
    rows = data(calibration=own_rows(tmp_path), image_root=tmp_path / "images")
    assert ids(held_out(rows))[0] == "heldout-0000"
    assert "chats.json" in caplog.text and "--samples below 12" in caplog.text


def test_text_alone_proves_no_images(tmp_path, caplog):
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "text.json").write_text(json.dumps([chat, chat]))
    rows = held_out(data(calibration=tmp_path / "text.json", samples=1))
    assert all(row.images for row in rows) and "bundled" in caplog.text


# --- whose the image root is ----------------------------------------------------------------------


def test_the_image_root_of_held_out_rows_is_not_that_of_the_bundled_ones(tmp_path):
    own = data(verify_data=own_rows(tmp_path), image_root=tmp_path / "images")
    assert len(held_out(own)) == 12
    assert own.path == bundled.CALIBRATION and len(own.taken) == 512


def test_verify_takes_the_root_of_the_file_that_it_is_given(tmp_path):
    (tmp_path / "other").mkdir()
    path, other = own_rows(tmp_path), own_rows(tmp_path / "other", 3)
    beside = json.loads(other.read_text("utf-8"))
    for row in beside:
        row["image"] = f"images/{row['image']}"  # from the file's own folder
    other.write_text(json.dumps(beside))
    recipe = data(verify_data=path, image_root=tmp_path / "images").recipe
    assert len(held_out_again(recipe, None, None, None)) == 12
    assert len(held_out_again(recipe, path, None, None)) == 12
    assert len(held_out_again(recipe, other, None, None)) == 3
    with pytest.raises(CalibrationError, match="not under"):
        held_out_again(recipe, path, tmp_path / "other", None)


def test_verify_says_that_the_rows_are_gone_or_changed(tmp_path, caplog):
    path = own_rows(tmp_path)
    recipe = data(calibration=path, image_root=tmp_path / "images", samples=8).recipe
    before = sha256_file(path)
    assert len(held_out_again(recipe, None, None, before)) == 4 and not caplog.records[1:]
    path.write_text(path.read_text("utf-8") + "\n")
    held_out_again(recipe, None, None, before)
    assert "chats.json is not what it was" in caplog.text
    path.unlink()
    assert ids(held_out_again(recipe, None, None, before))[0] == "heldout-0000"
    assert "bundled" in caplog.text and "no such file" in caplog.text


# --- what a dry run says --------------------------------------------------------------------------


def test_a_dry_run_refuses_bad_rows(tmp_path):
    path = own_rows(tmp_path)
    (tmp_path / "images" / "p03.jpg").unlink()
    flags = ("--calibration", path, "--image-root", tmp_path / "images", "--dry-run")
    err = refused("--format", "gptq", *flags, code=1)
    assert "1 bad rows: row 3" in err
    assert "1 bad rows: row 3" in refused("--format", "gptq", *flags, "--no-verify", code=1)


def test_fewer_rows_than_were_asked_for_are_said(tmp_path, caplog):
    own = {"calibration": own_rows(tmp_path), "image_root": tmp_path / "images"}
    calibration_samples(data(**own), Checkpoint(bundled.REFERENCE_VLM), Callbacks())
    assert "12 rows: chats.json has no more, and --samples asks for 512" in caplog.text
    caplog.clear()
    calibration_samples(data(**own, samples=12), Checkpoint(bundled.REFERENCE_VLM), Callbacks())
    assert "asks for" not in caplog.text


def test_bad_rows_are_left_out_up_to_a_share_and_counted(tmp_path, caplog):
    own = {"calibration": own_rows(tmp_path), "image_root": tmp_path / "images", "samples": 12}
    (tmp_path / "images" / "p03.jpg").unlink()
    (tmp_path / "images" / "p05.jpg").write_bytes(b"no image")

    def described(share: float) -> dict:
        rows = data(**own, skip_bad_rows=share)
        return calibration_samples(rows, Checkpoint(bundled.REFERENCE_VLM), Callbacks()).described

    with pytest.raises(CalibrationError, match=r"1 bad rows: row 3: image p03\.jpg"):
        described(0.0)
    with pytest.raises(CalibrationError, match=r"1 bad rows of 12, over --skip-bad-rows 0\.08: "):
        described(0.08)
    found = described(0.1)
    assert (found["rows"], found["skipped"], found["dropped"]) == (10, 2, 0)
    for line in ("left out: row 3: image p03.jpg", "left out: row 5: ", "p05.jpg: cannot be read"):
        assert line in caplog.text


def test_bad_held_out_rows_are_left_out_too(tmp_path, caplog):
    path = own_rows(tmp_path)
    (tmp_path / "images" / "p03.jpg").write_bytes(b"no image")
    for file in ("calibration", "verify_data"):
        own = {file: path, "image_root": tmp_path / "images", "method": "rtn"}
        with pytest.raises(CalibrationError, match="1 bad images: "):
            held_out(data(**own))
        with pytest.raises(CalibrationError, match="1 bad images of 12, over --skip-bad-rows"):
            held_out(data(**own, skip_bad_rows=0.05))
        assert len(held_out(data(**own, skip_bad_rows=0.1))) == 11
        assert "p03.jpg" in caplog.text


@pytest.mark.parametrize("share", ["1", "-0.1", "nan"])
def test_a_share_of_bad_rows_is_a_share(share):
    assert "skip-bad-rows" in refused("--format", "gptq", "--skip-bad-rows", share, code=2)


# --- photos of ordinary size ----------------------------------------------------------------------


@pytest.fixture
def published(model):
    """The reference model with the limit on an image that Qwen2.5-VL is published with."""
    file = model / "preprocessor_config.json"
    settings = json.loads(file.read_text("utf-8")) | {"max_pixels": 12_845_056}
    file.write_text(json.dumps(settings))
    return model


def test_photos_are_scaled_down_and_counted(tmp_path, published, proven, caplog):
    path = own_rows(tmp_path, 3, (1280, 720))
    flags = ("--calibration", path, "--image-root", tmp_path / "images", "--samples", 2)
    export = ("--format", "gptq", "--method", "gptq", "--out", tmp_path / "out", "--quiet")
    code, _, err = call(published, *export, *flags)
    assert code == 0, err
    manifest = json.loads((tmp_path / "out" / "artifact" / "manifest.json").read_text("utf-8"))
    calibration = manifest["calibration"]
    assert (calibration["rows"], calibration["scaled"], calibration["dropped"]) == (2, 2, 0)
    assert 400 * 2 < calibration["vision_tokens"] < calibration["tokens"] <= 512 * 2
    assert "2 with images scaled down" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_the_papers_rule_drops_photos_and_names_the_length_that_would_do(tmp_path, published):
    path = own_rows(tmp_path, 2, (1280, 720))
    rows = data(
        model=str(published),
        calibration=path,
        image_root=tmp_path / "images",
        long_images="drop",
    )
    checkpoint = Checkpoint(published)
    with pytest.raises(UsageError, match="all 2 samples") as e:
        calibration_samples(rows, checkpoint, Callbacks())
    found = re.search(r"--seq-len (\d+) keeps them whole", str(e.value))
    assert found and "--long-images scale" in str(e.value)
    rows.recipe = rows.recipe.model_copy(update={"seq_len": int(found[1])})
    assert len(calibration_samples(rows, checkpoint, Callbacks()).samples) == 2
    rows.recipe = rows.recipe.model_copy(update={"seq_len": int(found[1]) - 1})
    assert calibration_samples(rows, checkpoint, Callbacks()).described["dropped"] == 0


def test_prompts_of_the_checks_have_the_same_limit(tmp_path, published):
    path = own_rows(tmp_path, 1, (1280, 720))
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"], published)
    rows = read_rows(path, tmp_path / "images")
    prompt = Reference(artifact.path, rows, seq_len=512).prompts[0]
    assert prompt.scaled and 450 < len(prompt.input_ids) <= 512
