"""Answers that are kept, and what an evaluation refuses before it loads anything."""

from __future__ import annotations

import pytest

from vlmq_export import Recipe, evaluate
from vlmq_export.errors import BenchmarkError, MissingRuntime, UsageError
from vlmq_export.evaluation import questions
from vlmq_export.evaluation.answers import Known, files_hash
from vlmq_export.evaluation.benchmarks import BENCHMARKS, PAPERS, named
from vlmq_export.evaluation.questions import Question


def test_answers_are_kept_by_the_hash_of_the_files(tmp_path):
    place = tmp_path / "eval" / "gptq.jsonl"
    known = Known(place, "a", "gptqmodel 7.7.0")
    assert "k" not in known
    known.add({"k": "Größe 7", "l": ""})
    known.add({"m": "two\nlines"})
    again = Known(place, "a", "gptqmodel 7.7.0")
    assert [again[key] for key in "klm"] == ["Größe 7", "", "two\nlines"]
    for files, runtime in (("b", "gptqmodel 7.7.0"), ("a", "gptqmodel 7.8.0")):
        other = Known(place, files, runtime)
        assert "k" not in other
    other.add({"k": "new"})
    assert Known(place, "a", "gptqmodel 7.8.0")["k"] == "new"
    assert "k" not in Known(place, "a", "gptqmodel 7.7.0")


def test_a_line_that_was_cut_off_is_asked_again(tmp_path):
    place = tmp_path / "eval" / "onnx.jsonl"
    Known(place, "a", "r").add({"k": "one", "l": "two"})
    for cut in range(len(place.read_bytes())):
        damaged = tmp_path / f"{cut}.jsonl"
        damaged.write_bytes(place.read_bytes()[:cut])
        known = Known(damaged, "a", "r")
        known.add({"m": "three"})
        after = Known(damaged, "a", "r")
        assert after["m"] == "three"
        assert [after[k] for k in "kl" if k in after] == ["one", "two"][
            : sum(k in known for k in "kl")
        ]


def test_the_hash_is_of_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = files_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = files_hash(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, files_hash(tmp_path)}) == 3


def test_an_answer_ends_where_the_task_says():
    question = Question("t 0", "?", list, 16, ("ASSISTANT:", "\n\n"))
    assert question.cut(" yes\n\nno") == "yes"
    assert question.cut("a ASSISTANT: b") == "a"


def test_names_of_benchmarks():
    assert named(["papers"]) == list(PAPERS) and len(PAPERS) == 8
    assert named(["chartqa,ocrbench", "chartqa"]) == ["chartqa", "ocrbench"]
    assert set(PAPERS) < set(BENCHMARKS)
    wrong = {"chartq": "did you mean chartqa", "x": "known: papers,", "": "no such benchmark"}
    for task, said in wrong.items():
        with pytest.raises(UsageError, match=said):
            named([task])
    with pytest.raises(UsageError, match="no --task given"):
        named([])


@pytest.fixture
def out(tmp_path):
    """A folder that says that it is ours, with nothing in it that could be run."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe(format=["gptq"]).to_yaml())
    return folder


def test_what_cannot_be_asked_is_refused(out, tmp_path):
    with pytest.raises(UsageError, match=r"no recipe\.yaml here"):
        evaluate(tmp_path, ["chartqa"])
    with pytest.raises(UsageError, match="has no onnx/"):
        evaluate(out, ["chartqa"], on=["onnx"])
    with pytest.raises(
        UsageError, match="choose one or more of artifact, gptq, compressed-tensors, onnx, gguf"
    ):
        evaluate(out, ["chartqa"], on=["source"])
    with pytest.raises(UsageError, match="at least one question"):
        evaluate(out, ["chartqa"], limit=0)


def test_without_lmms_eval_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lmms_eval.tasks", None)
    with pytest.raises(MissingRuntime, match=r"docs/evaluation\.md says how to install it"):
        questions.load_tasks(["chartqa"], None, None)


def test_no_space_is_one_line(tmp_path):
    (tmp_path / "eval").write_text("a file where the folder should be")
    with pytest.raises(BenchmarkError, match="cannot be written"):
        Known(tmp_path / "eval" / "x" / "gptq.jsonl", "a", "r").add({"k": "v"})
