"""Scores with their standard errors, against the formulas written out."""

import logging
import shutil
import statistics

import pytest

from vlmq_export import Recipe
from vlmq_export.errors import FormatError
from vlmq_export.evaluation.evaluate import describe_again
from vlmq_export.proving.scores import EVAL_FILE, Evaluation, mean_and_error, scored


def answers(values, texts):
    return [(f"t {i}", text, value) for i, (value, text) in enumerate(zip(values, texts))]


FULL = answers([1, 1, 0, 1], "abcd")
QUANTIZED = answers([1, 0, 0, 1], "axyd")


def evaluation() -> Evaluation:
    scores = []
    for task in ("chartqa", "docvqa_val"):
        scores += [
            scored(task, "source", 10, FULL, FULL),
            scored(task, "gptq", 10, QUANTIZED, FULL),
        ]
    return Evaluation(scores, {"source": "a", "gptq": "b"}, {"source": "x 1", "gptq": "y 2"}, "0.7")


def test_mean_and_standard_error():
    mean, error = mean_and_error([1.0, 0.0, 0.5, 0.25])
    assert mean == 0.4375
    assert error == pytest.approx(statistics.stdev([1.0, 0.0, 0.5, 0.25]) / 2)
    assert mean_and_error([0.5]) == (0.5, None)


def test_the_difference_is_of_the_same_questions():
    found = scored("t", "gptq", 4, QUANTIZED, FULL)
    assert (found.score, found.difference) == (0.5, -0.25)
    assert found.difference_error == pytest.approx(statistics.stdev([0, -1, 0, 0]) / 2)
    assert [(c.question, c.before, c.after) for c in found.changed or ()] == [
        ("t 1", "b", "x"),
        ("t 2", "c", "y"),
    ]
    assert scored("t", "gptq", 4, QUANTIZED, None).changed is None


def test_the_mean_over_benchmarks_weighs_them_alike():
    own, quantized = evaluation().means()
    assert (own.of, own.score, own.difference) == ("source", 0.75, None)
    assert (quantized.score, quantized.difference) == (0.5, -0.25)
    alone = scored("t", "gptq", 4, QUANTIZED, FULL).error
    assert quantized.error == pytest.approx(alone / 2**0.5)
    assert len(quantized.changed or ()) == 4
    one = evaluation()
    one.scores = one.scores[:2]
    assert one.means() == []


def test_rows_of_the_table():
    rows = evaluation().rows()
    assert rows[0] == ("chartqa (4 of 10)", "source", "75.00 ± 25.00", "", "")
    assert rows[1] == ("", "gptq", "50.00 ± 28.87", "-25.00 ± 25.00", "2 of 4")
    assert [row[0] for row in rows[4:]] == ["mean of 2", ""]


def test_what_was_written_is_read(tmp_path):
    evaluation().write(tmp_path / "eval.json")
    assert Evaluation.read(tmp_path / "eval.json") == evaluation()
    (tmp_path / "eval.json").write_text('{"scores": 1}')
    with pytest.raises(FormatError, match="run eval again"):
        Evaluation.read(tmp_path / "eval.json")


def test_report_and_card_take_scores_of_others_as_text(artifacts, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vlmq_export"), "propagate", True)
    out = tmp_path / "out"
    shutil.copytree(artifacts("w4g128").path, out / "artifact")
    recipe = Recipe(format=["gptq"], method="rtn", verify=False)
    (out / "recipe.yaml").write_text(recipe.to_yaml())
    hostile = evaluation()
    hostile.scores[0].task = "<b>|x"
    hostile.write(out / EVAL_FILE)
    describe_again(out)
    for page in ("report.html", "README.md"):
        text = (out / page).read_text()
        assert "Benchmarks" in text and "50.00 ± 28.87" in text and "<b>" not in text
    assert "&lt;b>\\|x (4 of 10)" in (out / "README.md").read_text()
    (out / EVAL_FILE).write_text("[]")
    with caplog.at_level("WARNING", logger="vlmq_export"):
        describe_again(out)
    assert "without benchmarks" in caplog.text
    assert "Benchmarks" not in (out / "README.md").read_text()
