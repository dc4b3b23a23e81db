"""The first contact with a GPU, rehearsed on the CPU at small shapes."""

import json
import subprocess
import time
from pathlib import Path

import torch

from tools.checks.first_contact import __main__ as first_contact
from tools.checks.first_contact.__main__ import STEPS, Step
from tools.checks.first_contact.report import Setting

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_first_contact.sh"


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_step_is_rehearsed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", str(Path(first_contact.sys.executable)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    command = ["sh", str(SCRIPT), str(out), "--device", "cpu", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines(out)
    assert {line["step"] for line in found} == {step.name for step in STEPS}
    assert all(line["ok"] for line in found)
    facts = [line["facts"] for line in found]
    assert any(f.get("shares", [0])[0] == 1 for f in facts), "the CPU's artifact against itself"
    assert any("extrapolated" in f for f in facts) and any("ratio" in f for f in facts)
    shown = (out / "results.txt").read_text().splitlines()
    assert len(shown) == len(found) and all(line in done.stdout for line in shown)


def test_a_step_that_fails_hangs_or_dies_stops_no_other(tmp_path, monkeypatch):
    def fine(report, _at):
        report.tell("done", answer=42)

    def fails(report, _at):
        report.tell("the first part")
        raise ValueError("no such\nkernel")

    def hangs(_report, _at):
        time.sleep(60)

    def dies(_report, _at):
        first_contact.os._exit(7)

    monkeypatch.setattr(first_contact, "answers", fine)
    steps = [Step(f.__name__, f, 5) for f in (fails, dies, fine)]
    steps.insert(1, Step("hangs", hangs, 1.5))
    start = time.monotonic()
    at = Setting(tmp_path, torch.device("cpu"), False)
    assert first_contact.run(steps, at) == ["fails", "hangs", "dies"]
    assert time.monotonic() - start < 30
    said = {(line["step"], line["ok"]): line["line"] for line in lines(tmp_path)}
    assert said["fails", True] == "the first part"
    assert said["fails", False] == "ValueError: no such kernel"
    assert said["hangs", False] == "stopped after 2 s"
    assert said["dies", False].endswith("exit code 7")
    assert said["fine", True] == "done"
    assert "ValueError" in (tmp_path / "fails.log").read_text()
    assert "in hangs" in (tmp_path / "hangs.log").read_text()


def test_all_steps_fit_into_the_time_that_a_device_is_lent():
    """Each has a limit, and all of them together another: nine minutes."""
    assert first_contact.ALL == 540
    assert sum(step.limit for step in STEPS) < 1.15 * first_contact.ALL
    assert [step.name for step in STEPS[:2]] == ["card", "check"] and STEPS[1].limit <= 90
