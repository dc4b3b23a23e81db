"""The eight benchmarks through lmms-eval's own code, offline, on stand-ins."""

from __future__ import annotations

import datasets
import pytest

from tests.vlmq_export.evaluation import stand_ins
from vlmq_export.errors import BenchmarkError
from vlmq_export.evaluation.benchmarks import BENCHMARKS, PAPERS
from vlmq_export.evaluation.questions import load_tasks, look_through

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lmms_eval")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    stand_ins.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(data, lmms_eval):
    return {task.name: task for task in load_tasks(list(BENCHMARKS), data, None)}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_right_answer_scores_one_and_a_wrong_one_nothing(tasks, name):
    task = tasks[name]
    assert len(task.questions) == task.rows_in_all == 6
    for question in task.questions:
        answer = stand_ins.right(name, task.rows[question.place])
        assert task.score(question, answer) == pytest.approx(1.0)
        assert task.score(question, "zzzz") == 0.0


@pytest.mark.parametrize("name", PAPERS)
def test_a_question_is_what_the_benchmark_asks(tasks, name):
    task = tasks[name]
    keys = {question.key for question in task.questions}
    assert len(keys) == 6 and {len(key) for key in keys} == {64}
    for question in task.questions:
        row = task.rows[question.place]
        # TextVQA's code writes a question with one capital letter and small ones.
        assert row["question"].lower() in question.text.lower()
        pictures = question.pictures()
        assert len(pictures) == (0 if row.get("image", row.get("bytes")) is None else 1)
        assert all(picture.mode == "RGB" for picture in pictures)
        assert 16 <= question.limit <= 128


def test_scores_are_those_of_lmms_evals_own_sum(tasks):
    """But for OCRBench, whose sum is out of 1000 questions."""
    for name, task in tasks.items():
        metric = BENCHMARKS[name].metric
        found, own = [], []
        for n, question in enumerate(task.questions):
            row = task.task.eval_docs_no_media[question.place]
            answer = "zzzz" if n == 1 else stand_ins.right(name, row)
            found.append(task.score(question, answer))
            row = task.task.eval_docs_no_media[question.place]
            own.append(task.task.process_results(row, [answer])[metric])
        if name != "ocrbench":
            total = task.task.aggregation()[metric](own)
            assert sum(found) / len(found) == pytest.approx(total)


def test_the_parser_finds_letters_that_lmms_eval_does_not(tasks):
    for name in ("scienceqa", "scienceqa_img"):
        strict, kind = tasks[name], tasks[f"{name}_parsed"]
        for question in kind.questions:
            letter = "ABCD"[kind.rows[question.place]["answer"]]
            for answer in (f"The answer is {letter}.", f"({letter})", f"Answer: {letter}"):
                assert (strict.score(question, answer), kind.score(question, answer)) == (0.0, 1.0)
            assert strict.score(question, f"{letter}. a text") == 1.0
        # Keys are of the question, and so the answers of one serve the other.
        assert [q.key for q in strict.questions] == [q.key for q in kind.questions]


def test_the_first_questions_alone(data):
    (task,) = load_tasks(["chartqa"], data, 2)
    assert (len(task.questions), task.rows_in_all) == (2, 6)


# -- what is wrong is named in one line, before a model is loaded --------------------------------


def refused(name: str, data) -> str:
    with pytest.raises(BenchmarkError) as error:
        for task in load_tasks([name], data, None):
            list(look_through(task, task.questions))
    assert "\n" not in str(error.value)
    return str(error.value)


def save(folder, name: str, made: datasets.Dataset) -> None:
    split = stand_ins.LAYOUTS[name][0]
    datasets.DatasetDict({split: made}).save_to_disk(str(folder / name))


def test_a_missing_column(tmp_path):
    save(tmp_path, "chartqa", stand_ins.rows("chartqa", 2).remove_columns("type"))
    assert "chartqa: no column type; the rows have" in refused("chartqa", tmp_path)


def test_images_that_are_names(tmp_path):
    made = stand_ins.rows("chartqa", 2).remove_columns("image").add_column("image", ["a", "b"])
    save(tmp_path, "chartqa", made)
    assert "column image holds no images" in refused("chartqa", tmp_path)


@pytest.mark.parametrize("at", [0, 2])
def test_a_broken_image(tmp_path, at):
    made = stand_ins.rows("chartqa", 3).cast_column("image", datasets.Image(decode=False))
    images = made["image"][:]
    images[at] = {"bytes": stand_ins.damaged(stand_ins.held_out("bars", 1)[0][2]), "path": None}
    made = made.remove_columns("image").add_column("image", images)
    save(tmp_path, "chartqa", made.cast_column("image", datasets.Image()))
    assert f"chartqa {at}: its image cannot be read" in refused("chartqa", tmp_path)


def test_a_broken_image_in_base64(tmp_path):
    made = stand_ins.rows("mmerealworld", 3)
    made = made.map(lambda row, n: {"bytes": "AAAA"} if n == 1 else row, with_indices=True)
    save(tmp_path, "mmerealworld", made)
    assert "mmerealworld 1: its image cannot be read" in refused("mmerealworld", tmp_path)


def test_a_row_that_cannot_be_scored(tmp_path):
    made = stand_ins.rows("mmerealworld", 3)
    made = made.map(lambda row, n: {"category": "x/?"} if n == 1 else row, with_indices=True)
    save(tmp_path, "mmerealworld", made)
    assert "mmerealworld 1: lmms-eval cannot score it" in refused("mmerealworld", tmp_path)


def test_a_missing_folder_file_or_split(tmp_path):
    assert "no folder chartqa or ChartQA in --data" in refused("chartqa", tmp_path)
    (tmp_path / "ChartQA").mkdir()
    assert "neither dataset_dict.json nor test*.parquet" in refused("chartqa", tmp_path)
    made = datasets.DatasetDict({"train": stand_ins.rows("chartqa", 2)})
    made.save_to_disk(str(tmp_path / "chartqa"))
    assert "chartqa: no split test; the dataset has train" in refused("chartqa", tmp_path)


def test_no_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "ChartQA is not to be had from the hub" in refused("chartqa", None)
