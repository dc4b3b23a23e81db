"""Rows in parquet files and in saved datasets, whose images are bytes."""

import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.samples import row_files
from vlmq_export.quantizer.samples.images import load_image
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.calibration import CalibrationRows


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (84, 84), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def refusal(path) -> str:
    with pytest.raises(CalibrationError) as e:
        read_rows(path)
    return str(e.value)


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_parquet_file_of_the_hub(red):
    """The images are {bytes, path} or bytes alone, and some keys of the parts are null."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    message = [{"role": "user", "content": parts}]
    rows = [
        {"images": [{"bytes": red.read_bytes(), "path": "a.png"}], "messages": message},
        {"images": [{"bytes": None, "path": "a.png"}], "messages": message},
    ]
    held, named = read_rows(write(red.with_name("x.parquet"), rows))
    assert load_image(held.images[0]).getpixel((5, 5)) == (255, 0, 0)
    assert named.images == (red,)
    assert held.messages == named.messages and held.where == "row 0"
    assert held.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    plain = {"image": red.read_bytes(), "question": "What?", "answer": "red"}
    (row,) = read_rows(write(red.with_name("rows"), [plain]))  # the content decides
    assert row.answer == "red" and row.images == held.images


def test_a_saved_dataset_with_an_image_feature(red, tmp_path):
    rows = {"image": [str(red)] * 100, "question": ["What?"] * 100, "answer": ["red"] * 100}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "set")
    found = read_rows(tmp_path / "set")
    assert len(found) == 100 and found[99].where == "row 99"
    assert load_image(found[99].images[0]).size == (84, 84)
    data = CalibrationRows(Recipe(calibration=tmp_path / "set", samples=5))
    assert len(data.taken) == 5 and len(data.digest) == 64
    datasets.DatasetDict(test=dataset, train=dataset).save_to_disk(tmp_path / "splits")
    assert "give the folder of one: test, train" in refusal(tmp_path / "splits")
    assert len(read_rows(tmp_path / "splits" / "train")) == 100


def test_damaged_and_large_tables_are_one_line(red, tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", [{"question": "What?" * 1000, "image": "a.png"}] * 90)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert "cannot be read as a table" in refusal(path)
    path.write_bytes(whole)
    monkeypatch.setattr(row_files, "MAX_ROWS_BYTES", len(whole))
    assert "bytes when decompressed" in refusal(path)
    monkeypatch.undo()
    assert len(read_rows(path)) == 90
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    assert "cannot be read as a table" in refusal(tmp_path / "set")


def test_the_extra_that_is_missing_is_named(red, tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", [{"question": "What?", "image": "a.png"}])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    for module, file in (("pyarrow.parquet", path), ("datasets", tmp_path / "set")):
        monkeypatch.setitem(sys.modules, module, None)
        assert "is needed to read it; pip install 'vlmq-export[data]'" in refusal(file)
