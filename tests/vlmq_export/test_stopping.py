"""Signals: an answer at once, a stop that can be resumed, and no traceback."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.errors import Interrupted
from vlmq_export.terminal.progress import Stages
from vlmq_export.terminal.stopping import StopSignals

ARGS = ("--format", "gptq", "--no-verify", "--device", "cpu")
PLAIN = ("-m", "vlmq_export")
# The command, which waits in its second layer until `go` is in the folder of the first argument: a
# signal meets it in that layer on a machine of any speed.
WAITING = """
import sys, time
from pathlib import Path
from vlmq_export.cli import main
from vlmq_export.quantizer.run import quantize
folder, solve = Path(sys.argv.pop(1)), quantize._solve_layer
def waits(run, walk, index, said):
    if index == 1:
        (folder / "waits").touch()
    while index == 1 and not (folder / "go").exists():
        time.sleep(0.01)
    solve(run, walk, index, said)
quantize._solve_layer = waits
main()
"""


class Command:
    """The command in a session of its own, as in a terminal: a key reaches its children too."""

    def __init__(self, *args: object, start: tuple[str, ...] = PLAIN):
        self.process = subprocess.Popen(
            [sys.executable, *start, *map(str, args)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        )
        self.lines: list[tuple[float, str]] = []  # (when, line) of stderr
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.strip()))

    def press(self) -> float:
        """Ctrl-C. Returns when."""
        os.killpg(self.process.pid, signal.SIGINT)
        return time.monotonic()

    def answered(self, text: str, within: float) -> float:
        """When a line with `text` came, which it must in so many seconds."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            for when, line in self.lines:
                if text in line:
                    return when
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in {self.said()}")

    def end(self) -> int:
        code = self.process.wait(240)
        self.reader.join(10)
        return code

    def said(self) -> str:
        return "\n".join(line for _, line in self.lines)


def until(there, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert there()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random checkpoint of three layers."""
    return make_random_checkpoint(tmp_path_factory.mktemp("model"), layers=3, depth=3)


@pytest.fixture
def run(model, tmp_path):
    """A run that waits in its second layer: (command, output folder, the file that ends this)."""
    out, start = tmp_path / "out", ("-c", WAITING, str(tmp_path))
    command = Command(model, *ARGS, "--samples", 12, "--out", out, start=start)
    until((tmp_path / "waits").exists)
    return command, out, tmp_path / "go"


def test_ctrl_c_is_answered_at_once_and_finishes_the_layer(run):
    command, out, go = run
    pressed = command.press()
    assert command.answered("again to stop now", 5) - pressed < 1
    go.touch()
    assert command.end() == 130
    last = command.said().splitlines()[-2:]
    assert last == [
        "finishing layer 2 of 3; press Ctrl-C again to stop now",
        "error: stopped after layer 2 of 3; continue with --resume",
    ]
    assert "Traceback" not in command.said()
    assert not (out / "artifact" / "manifest.json").exists()


def test_a_second_ctrl_c_stops_now(run):
    """Like kill -9, after which tests/quantizer/run/test_resume.py goes on."""
    command, out, _ = run
    command.press()
    command.answered("again to stop now", 5)
    pressed = command.press()
    assert command.end() == 130
    assert time.monotonic() - pressed < 8
    assert "stopped at once; continue with --resume" in command.said()
    assert "Traceback" not in command.said()
    assert not list(out.rglob("*.tmp"))


def test_processes_that_decode_images_leave_the_answer_to_us(tmp_path):
    """Ctrl-C in a terminal reaches them as well. They neither end nor write a traceback."""
    command = Command(*ARGS, "--samples", 512, "--out", tmp_path / "out")
    children = Path(f"/proc/{command.process.pid}/task/{command.process.pid}/children")
    until(lambda: len(children.read_text().split()) >= 2)
    command.press()
    command.answered("again to stop now", 5)
    assert command.end() == 130
    assert "stopped while reading samples" in command.said()
    assert "Traceback" not in command.said() and "killed" not in command.said()


NATIVE = """
import hashlib
from vlmq_export.terminal import stopping
stopping.GRACE = 0.5
with stopping.StopSignals(lambda: "finishing layer 1 of 1"):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_native_code_cannot_hold_up_the_answer_nor_a_second_signal():
    """One call that takes minutes, as a large factorization may: no handler of Python's runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", NATIVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    answer = process.stderr.readline()
    assert answer == "finishing layer 1 of 1; press Ctrl-C again to stop now\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err == "stopped at once; continue with --resume\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_second_signal_is_raised_once(number, code):
    with pytest.raises(Interrupted) as e, StopSignals(lambda: "") as stopped:
        assert not stopped()
        signal.raise_signal(number)
        assert stopped()
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # while it cleans up
    assert e.value.exit_code == code and "--resume" in str(e.value)


def test_what_is_in_hand():
    stages = Stages(quiet=True)
    assert stages.doing() == "finishing this step"
    stages("read samples", 3, 10)
    assert stages.doing() == "finishing this step (read samples)"
    stages("quantize", 2, 8)
    assert stages.doing() == "finishing layer 3 of 8"
