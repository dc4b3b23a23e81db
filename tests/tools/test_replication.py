"""The calibration pairs of the VLMQ paper, and the papers' tables as recipes."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tools.docs import replication
from tools.replication import pairs
from tools.replication.tables import HEADS, RECIPES, SOURCE, read_table, row_named
from vlmq_export import bundled
from vlmq_export.errors import CalibrationError, UsageError
from vlmq_export.evaluation.benchmarks import PAPERS
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.sources.calibration import CalibrationRows

TABLES = sorted(RECIPES.glob("*.yaml"))
WIDE = (1200, 900)  # pixels of an image that is longer than any sample may be


@pytest.fixture
def published(tmp_path):
    """Rows and images as ShareGPT4V has them, of which every third is too large to be kept."""
    folder = tmp_path / "coco" / "train2017"
    folder.mkdir(parents=True)
    rows = []
    for n in range(12):
        name = f"coco/train2017/{n:012}.jpg"
        Image.new("RGB", WIDE if n % 3 == 0 else (96, 64)).save(tmp_path / name)
        asked = "<image>\nWhat do you see happening in this image?"
        said = "A grey square. " * (1 + 40 * (n % 2))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        rows.append({"id": f"{n:012}", "image": name, "conversations": turns})
    other = {"id": "sa", "image": "sam/images/sa_1.jpg", "conversations": rows[0]["conversations"]}
    (tmp_path / "cap.json").write_text(json.dumps([other, *rows]))
    return tmp_path


def drawn(folder, out, *more: str) -> list[dict]:
    words = [str(folder / "cap.json"), "--images", str(folder), "--out", str(out), *more]
    assert pairs.main(words) == 0
    return json.loads(out.read_text())


def test_pairs_are_drawn_by_a_seed_from_images_that_are_not_cut(published, tmp_path):
    out = tmp_path / "pairs.json"
    rows = drawn(published, out, "--samples", "6", "--seq-len", "128")
    assert len({row["id"] for row in rows}) == 6
    assert all(int(row["id"]) % 3 and row["image"].startswith("coco/") for row in rows)
    assert drawn(published, out, "--samples", "6", "--seq-len", "128") == rows
    other = drawn(published, out, "--samples", "6", "--seq-len", "128", "--seed", "1")
    assert [row["id"] for row in other] != [row["id"] for row in rows]


def test_the_pairs_are_calibration_rows_whose_text_is_cut(published, tmp_path):
    out = tmp_path / "pairs.json"
    drawn(published, out, "--samples", "8", "--seq-len", "128")
    table = read_table(RECIPES / "vlmq-table2.yaml")
    row = row_named(table, "qwen2.5-vl-7b/vlmq-paper")
    recipe = table.recipe_of(row, calibration=out, image_root=published, samples=8, seq_len=128)
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    lengths = [preprocessor.length(each) for each in CalibrationRows(recipe).taken]
    assert recipe.long_images == "drop" and len(lengths) == 8
    assert all(length.cut(128) is not None for length in lengths)
    assert any(length.tokens > 128 for length in lengths)


def test_too_few_pairs_and_a_missing_image_are_one_line(published, tmp_path, capsys):
    words = [str(published / "cap.json"), "--images", str(published), "--seq-len", "128"]
    assert pairs.main([*words, "--samples", "9"]) == 1
    assert "12 rows are about coco/, and the images of 8 fit" in capsys.readouterr().err
    rows = json.loads((published / "cap.json").read_text())
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    with pytest.raises(CalibrationError, match="--images is the folder that holds coco/"):
        pairs.draw(rows, tmp_path / "x", preprocessor, samples=1, seq_len=128, seed=0)


def test_every_row_of_a_table_is_a_recipe():
    assert len(TABLES) == 4
    for file in TABLES:
        table = read_table(file)
        assert table.tasks == PAPERS and table.rows
        for row in table.rows.values():
            assert row.method == SOURCE or row.method in METHODS
            assert len(row.printed) == len(HEADS)
            recipe = table.recipe_of(row)
            assert recipe.samples == 512 and recipe.act_order == "dynamic" and not recipe.symmetric
            assert recipe.quant_config().group_size == (128 if recipe.bits == 2 else -1)
        with pytest.raises(UsageError, match="no such row"):
            row_named(table, "x")


def test_printed_averages_are_those_of_the_rows():
    """Those of table 6 are not, and VLM-PTQ took one over from it: the recipes say so."""
    for name in ("vlmq-table2", "vlmq-table3"):
        for row in read_table(RECIPES / f"{name}.yaml").rows.values():
            mean = sum(row.printed[:-1]) / 8
            assert row.printed[-1] == pytest.approx(mean, abs=0.011), (name, row.name)


def test_the_page_has_the_tables():
    page = replication.PAGE.read_text("utf-8")
    assert replication.with_tables(page) == page, "run python -m tools.docs.replication"
