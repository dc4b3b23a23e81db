"""A command that was stopped or killed, resumed, leaves the bytes of one that never was."""

import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from tools.reference_vlm.model import make_random_checkpoint

# The quickest method with activations; test_quantize.py stops the others.
ARGS = ("--format", "gptq", "--method", "vlmq-paper", "--samples", "16", "--no-verify", "--quiet")
# Files that hold times, or the name of the output folder.
VARIES = {"timing.json", "SHA256SUMS", "recipe.yaml", "report.html", "README.md"}


def start(model, out, *more) -> subprocess.Popen:
    """Start the command with more arguments, one thread and its output piped."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vlmq_export", str(model), *ARGS, "--out", str(out), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, env=environment)


def contents(out) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file() and p.name not in VARIES)
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random checkpoint of three layers."""
    return make_random_checkpoint(tmp_path_factory.mktemp("model"), layers=3, depth=3)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The files of a command that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert start(model, out).wait() == 0
    return contents(out)


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGKILL, -9),
    ],
)
def test_resume_gives_the_same_bytes(model, whole, tmp_path, stop, code):
    out = tmp_path / "out"
    process = start(model, out)
    second_layer, deadline = out / "artifact" / "layer-00001.safetensors", time.monotonic() + 120
    while not second_layer.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(stop)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    if code > 0:
        first, last = err.strip().splitlines()
        assert first.startswith("finishing layer") and "--resume" in last
    assert not (out / "artifact" / "manifest.json").exists()
    again = start(model, out, "--resume")
    assert again.wait() == 0, again.stderr.read()
    assert contents(out) == whole


@pytest.fixture(scope="module")
def rounded(model, tmp_path_factory):
    """The output folder of a command that is done."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    assert start(model, out, "--method", "rtn").wait() == 0
    return out


def test_another_recipe_is_refused_with_the_difference(model, rounded):
    process = start(model, rounded, "--method", "rtn", "--bits", "3", "--resume")
    _, err = process.communicate()
    assert process.returncode == 2 and "bits was 4, now 3" in err


def test_a_second_process_on_the_same_folder_is_refused(model, rounded):
    with FileLock(rounded / ".lock"):
        process = start(model, rounded, "--method", "rtn", "--resume")
        _, err = process.communicate()
    assert process.returncode == 2 and "another process" in err
