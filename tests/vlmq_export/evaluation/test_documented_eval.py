"""Every `eval` that README and docs/ show, and the command that makes a row of a paper's table."""

from __future__ import annotations

import shlex

import pytest

from tests.vlmq_export.evaluation import stand_ins
from tests.vlmq_export.test_documented import ROOT, SHOWN
from tools.replication import row
from vlmq_export import Recipe, bundled, export
from vlmq_export.cli import app
from vlmq_export.evaluation.questions import load_tasks
from vlmq_export.evaluation.subjects import open_subjects

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lmms_eval")]
EVALS = [command for _, command in SHOWN if command.startswith("vlmq-export eval")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with the result of README's first command and the benchmarks."""
    folder = tmp_path_factory.mktemp("home")
    stand_ins.write_all(folder / "benchmarks", 2)
    export(Recipe(format=["gguf"], method="rtn", verify=False, out=folder / "small"))
    return folder


def test_they_are_shown():
    assert len(EVALS) >= 2


@pytest.mark.parametrize("command", EVALS)
def test_a_documented_evaluation_runs(command, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    _, *words = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        app([*words, "--limit", "2", "--json"], prog_name="vlmq-export")
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert '"of": "gguf"' in capsys.readouterr().out


def test_a_file_is_a_model_of_lmms_evals_own_command(home):
    from vlmq_export.evaluation.lmms_model import MANIFEST, VlmqExport

    tasks = load_tasks(["chartqa", "docvqa_val"], home / "benchmarks", 2)
    model = VlmqExport(str(home / "small"), on="gguf", batch_size=1)
    model.task_dict = {task.name: task.task.dataset for task in tasks}
    # Those of two limits are answered in two calls, and come back in their own order.
    requests = [r for pair in zip(*(task.task.instances for task in tasks)) for r in pair]
    answers = dict(zip(((r.args[5], r.args[3]) for r in requests), model.generate_until(requests)))
    (subject,) = open_subjects(home / "small", ["gguf"], False, "cpu")
    for task in tasks:
        own = subject.answer(task.questions, lambda _: None)
        split = task.task.config.test_split
        assert [answers[split, q.place] for q in task.questions] == own
    assert MANIFEST.model_id == "vlmq_export"


def test_a_row_of_a_table_is_one_command(home, monkeypatch, capsys):
    page = (ROOT / "docs" / "replication.md").read_text("utf-8").replace("\\\n", " ")
    (command,) = [line for line in page.splitlines() if "tools.replication.row" in line]
    _, _, _, table, name, *words = shlex.split(command)
    monkeypatch.chdir(home)
    words[words.index("--calibration") + 1] = str(bundled.CALIBRATION)
    words[words.index("--image-root") + 1] = str(bundled.CALIBRATION.parent)
    here = ["--model", str(bundled.REFERENCE_VLM), "--data", "benchmarks", "--limit", "1"]
    words = [str(ROOT / table), name, *words, *here, "--samples", "4", "--device", "cpu"]
    assert row.main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "65.32 printed" in printed and printed.count("measured") == 9
    assert row.main([str(ROOT / table), "x", "--out", "y"]) == 2
    assert "no such row" in capsys.readouterr().err
