"""Every command that README and docs/ show is run, with a user's own folder and photographs."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vlmq_export.own_data import own_rows
from tools.reference_vlm.model import make_random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands for a model in a command. The name stays that of the page.
MODELS = ("MODEL", "path/to/model", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen-3b")
# Commands that tests of their own run, with what they need: processes, a hub, a foreign checkpoint,
# lmms-eval (evaluation/test_documented_eval.py).
ELSEWHERE = ("torchrun", "--push-to-hub", "GPTQ-Int4", "vlmq-export eval")
QUICK = ["--samples", "4", "--method", "rtn"]


def commands(page: Path) -> Iterator[str]:
    """The commands of a page, continued lines joined, comments cut."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        found = re.match(r" *(?:\$ )?((?:vlmq-export|torchrun) .+)", line)
        if found and (line.startswith((" ", "$")) or f"\n{line}\n" in _fenced(text)):
            yield re.sub(r"\s+#.*", "", found[1]).strip()


def _fenced(text: str) -> str:
    """What stands in fenced blocks of shell."""
    return "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).join("\n\n")


SHOWN = [(page.name, command) for page in PAGES for command in commands(page)]
HERE = [shown for shown in SHOWN if not any(word in shown[1] for word in ELSEWHERE)]


def test_readme_shows_what_a_user_needs_first():
    readme = [command for page, command in SHOWN if page == "README.md"]
    assert len(readme) >= 8
    assert "--image-root" in readme[0] and "--calibration" in readme[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's working directory: a model, photographs, rows, and the result of README's first."""
    folder = tmp_path_factory.mktemp("home")
    model = make_random_checkpoint(tmp_path_factory.mktemp("model"), layers=2, depth=3)
    for name in MODELS:
        shutil.copytree(model, folder / name)
    own_rows(folder)
    return folder


def made(path: Path) -> str:
    """What an earlier command of the page made. A GGUF is named after the model's true size too."""
    if path.suffix == ".gguf":
        (path,) = path.parent.glob(f"{path.stem.removesuffix('-Q4_K_M')}*-Q4_K_M.gguf")
    assert path.exists(), "an earlier command of the page makes it"
    return str(path)


@pytest.mark.parametrize(("page", "command"), HERE)
def test_a_documented_command_runs(page, command, home, monkeypatch, capsys):
    from vlmq_export.cli import app

    monkeypatch.chdir(home)
    _program, *words = shlex.split(command)
    if words[0] in ("verify", "inspect"):
        words[1] = made(home / words[1])
    elif "--out" not in words and "--dry-run" not in words:
        words += ["--out", f"out-{SHOWN.index((page, command))}"]
    if words[0] not in ("verify", "inspect") and "--dry-run" not in words:
        words += ["--no-verify", "--overwrite"]
        words += [] if words[0] == "small/artifact" else QUICK
        words += ["--method", "gptq"] if {"--target-bpw", "--target-size"} & {*words} else []
    with pytest.raises(SystemExit) as ended:
        app(words, prog_name="vlmq-export")
    assert ended.value.code in (0, None), capsys.readouterr().err
