"""The bundled model on two stand-ins: source, artifact and every format in one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vlmq_export.evaluation import stand_ins
from vlmq_export import Recipe, evaluate, export
from vlmq_export.cli import app
from vlmq_export.errors import Interrupted
from vlmq_export.evaluation.subjects import KINDS
from vlmq_export.formats import NAMES
from vlmq_export.proving.scores import EVAL_FILE, Evaluation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lmms_eval")]
TASKS = ["chartqa", "textvqa_val"]
ROWS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in (*TASKS, "ScienceQA"):
        stand_ins.write(folder, name, ROWS)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory, lmms_eval):
    folder = tmp_path_factory.mktemp("run") / "out"
    export(Recipe(format=list(NAMES), bits=4, method="rtn", verify=False, out=folder))
    return folder


def kept(file: Path) -> dict[str, str]:
    """The answers in a file, by the keys of their questions."""
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:] if line]
    return {line["key"]: line["answer"] for line in lines}


class Killed(Exception):
    """Stands for what ends a process without asking it."""


@pytest.fixture(scope="module")
def evaluated(out, data):
    """One table of all, and the same once it was stopped in every model and gone on with."""
    told: list[tuple[str, int, int]] = []
    options = {"on": list(KINDS), "baseline": True, "data": data}

    def kill(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))
        if stage == "eval gptq: textvqa_val":
            raise Killed

    with pytest.raises(Killed):
        evaluate(out, TASKS, progress=kill, **options)
    assert not (out / EVAL_FILE).exists()
    before = {p.stem: kept(p) for p in (out / "eval").iterdir()}
    stopped = options | {"should_stop": lambda: True}
    with pytest.raises(Interrupted, match="the same command goes on"):
        evaluate(out, TASKS, **stopped)
    told.clear()
    resumed = evaluate(out, TASKS, progress=lambda *step: told.append(step), **options)
    return resumed, before, told


def test_one_table_of_all(evaluated, out):
    found, _, _ = evaluated
    assert [(s.task, s.of) for s in found.scores] == [
        (task, of) for task in TASKS for of in ("source", *KINDS)
    ]
    assert all(s.questions == s.of_all == ROWS and s.error is not None for s in found.scores)
    assert Evaluation.read(out / EVAL_FILE) == found
    assert max(s.score for s in found.scores) > 0.0


def test_artifact_and_what_computes_in_float32_are_equal_to_the_last_question(evaluated):
    found, _, _ = evaluated
    for task in TASKS:
        by = {s.of: s for s in found.scores if s.task == task}
        for name in ("gptq", "compressed-tensors", "onnx"):
            assert by[name].score == by["artifact"].score
            assert by[name].changed == by["artifact"].changed


def test_gguf_differs_by_what_rounded_activations_change(evaluated, out):
    """llama.cpp rounds activations to 8 bits, which turns near ties: docs/verification.md."""
    artifact, gguf = (kept(out / "eval" / f"{name}.jsonl") for name in ("artifact", "gguf"))
    assert artifact.keys() == gguf.keys()
    same = sum(gguf[key] == answer for key, answer in artifact.items())
    assert same >= 2 * ROWS - 3


def test_what_was_answered_is_not_asked_again(evaluated):
    _, before, told = evaluated
    # The first evaluation was killed in the middle of the GPTQ files.
    lengths = {name: len(answers) for name, answers in before.items()}
    assert lengths == {"source": 2 * ROWS, "artifact": 2 * ROWS, "gptq": ROWS}
    asked = {stage.partition(":")[0]: total for stage, _, total in told}
    later = {f"eval {name}": 2 * ROWS for name in ("compressed-tensors", "onnx", "gguf")}
    assert asked == {"eval gptq": ROWS, "questions": 2 * ROWS} | later


def test_a_second_evaluation_loads_no_model_and_gives_the_same(evaluated, out, data, monkeypatch):
    from vlmq_export.evaluation.subjects import Subject

    found, _, _ = evaluated
    monkeypatch.setattr(Subject, "answer", lambda *_: pytest.fail("a model was asked"))
    again = evaluate(out, TASKS, on=list(KINDS), baseline=True, data=data)
    assert again.scores == found.scores


def test_report_and_card_have_the_table(evaluated, out):
    found, _, _ = evaluated
    for page in ("report.html", "README.md"):
        text = (out / page).read_text()
        assert "Benchmarks" in text and "mean of 2" in text
        assert f"{100 * found.scores[0].score:.2f}" in text


def test_the_command_prints_a_table_of_80_columns(evaluated, out, data, capsys, monkeypatch):
    monkeypatch.setattr("vlmq_export.terminal.tables.out._width", 80)
    words = ["eval", str(out), "--task", ",".join(TASKS), "--on", ",".join(KINDS), "--baseline"]
    with pytest.raises(SystemExit) as ended:
        app([*words, "--data", str(data)], prog_name="vlmq-export")
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert all(word in printed for word in (*TASKS, *KINDS, "source", "mean of 2", "±"))


def test_questions_without_a_picture_and_two_scorings_of_one_answer(out, data):
    """A third of the rows of ScienceQA has no picture."""
    told: list[tuple[str, int, int]] = []
    tasks = ["scienceqa", "scienceqa_parsed"]
    options = {"data": data, "limit": 3, "progress": lambda *step: told.append(step)}
    found = evaluate(out, tasks, on=list(KINDS), **options)
    assert {total for stage, _, total in told if stage.startswith("eval")} == {3}
    for task in tasks:
        by = {s.of: s.score for s in found.scores if s.task == task and s.questions == 3}
        assert by["artifact"] == by["gptq"] == by["compressed-tensors"] == by["onnx"]
        assert "gguf" in by
