"""What a person reads at the end of a run, and while a proof runs."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vlmq_export.errors import FormatError, Interrupted
from vlmq_export.formats.contract import FORMATS, Format, FormatOptions
from vlmq_export.formats.proof.checks import Check, CheckSettings, Steps
from vlmq_export.proving.parity import Parity, check_formats
from vlmq_export.result import Result
from vlmq_export.terminal.progress import Stages, share_left
from vlmq_export.terminal.result import print_result

TEXT, MMPROJ = "m-Q4_1.gguf", "mmproj-m-F16.gguf"


@pytest.fixture
def written(tmp_path) -> Path:
    """An output folder of 4 MiB in GGUF, and of many files in GPTQ."""
    for name, size in {f"gguf/{TEXT}": 3 << 20, f"gguf/{MMPROJ}": 1 << 20}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "gptq").mkdir()
    for i in range(6):
        (tmp_path / "gptq" / f"{i}.json").write_bytes(bytes(100 + i))
    return tmp_path


def screen(capsys, out: Path, statuses: dict[str, str] | None, **options: Any) -> str:
    """The last screen, where the levels of each format have these statuses: p, f, n or i."""
    words = {"p": "passed", "f": "failed", "n": "not run", "i": "info"}
    parity = None
    if statuses is not None:
        checks = [
            Check(name, f"L{level}", f"check {level}", words[s], worst="w.1", detail="no runtime")
            for name, row in statuses.items()
            for level, s in enumerate(row, start=1)
        ]
        parity = Parity(all(set(row) <= {"p"} for row in statuses.values()), checks, {})
    plan = cast(Any, SimpleNamespace(formats=dict.fromkeys(("gguf", "gptq"))))
    result = Result(out, plan, parity, source_bytes=8 << 20)
    if fidelity := options.pop("fidelity", None):
        cast(Any, result).fidelity = fidelity
    print_result(result, **options)
    return capsys.readouterr().out


def test_the_last_screen_has_verdicts_files_and_commands(capsys, written):
    said = screen(capsys, written, {"gguf": "ppp", "gptq": "ppp"})
    assert "gguf: 4.0 MiB, 0.50 of the source's 8.0 MiB\n  proven: 3 checks passed\n" in said
    place = f"{written}/gguf"
    both = f"-m {place}/{TEXT} --mmproj {place}/{MMPROJ}"
    assert f"run: llama-mtmd-cli {both} --image photo.jpg -p 'What is shown?'\n" in said
    assert f"run: llama-server {both}\n" in said
    assert f'from_pretrained("{written}/gptq", device_map="auto")' in said
    assert "  and 3 more" in said and "check 1" not in said
    files = [line for line in said.splitlines() if line.endswith("iB") and line.startswith("  ")]
    assert len(files) == 2 + 4 and {len(line) for line in files} == {71}
    assert said.splitlines()[-1].startswith(f"{written}: verified; report: ")


@pytest.mark.parametrize(
    ("statuses", "says", "verdict"),
    [
        ({"gguf": "pfp", "gptq": "ppp"}, "FAILED: 1 of 3 checks", "UNVERIFIED"),
        ({"gguf": "pnn", "gptq": "ppp"}, "NOT PROVEN: 2 checks could not run", "not proven"),
        (None, "  not verified", "not verified"),
    ],
)
def test_what_is_not_proven_does_not_look_proven(capsys, written, statuses, says, verdict):
    said = screen(capsys, written, statuses)
    assert says in said and said.splitlines()[-1].startswith(f"{written}: {verdict}; ")
    assert ("failed: gguf L2 check 2: w.1" in said) == ("FAILED" in says)


def test_the_table_of_checks_comes_with_v(capsys, written):
    said = screen(capsys, written, {"gguf": "ppp", "gptq": "ppp"}, every_check=True)
    assert "L3 check 3" in said and max(map(len, said.splitlines()[:8])) <= 80


def test_fidelity_comes_first(capsys, written):
    figures = SimpleNamespace(
        verdict="close", words="close to the source", short=lambda: "agreement 98.0 %"
    )
    said = screen(capsys, written, None, fidelity=figures)
    assert said.startswith("close to the source: agreement 98.0 %\n")


# --- while a proof runs -------------------------------------------------------------------------


def test_the_steps_of_a_proof_are_shares_of_its_work():
    told: list[tuple[str, int, int]] = []
    steps = Steps(lambda *t: told.append(t), {"weights": 10, "model": 90})
    steps.begin("weights")
    for done in range(3):
        steps.begin("model", done, 2)
    assert told == [
        ("weights", 0, 100),
        ("model", 10, 100),
        ("model", 55, 100),
        ("model", 100, 100),
    ]
    assert share_left(30.0, 60, 100) == pytest.approx(20.0)


def test_a_proof_says_what_it_is_at_and_stops_between_steps(monkeypatch):
    """The callback keeps its signature: a stage, what is done, and all."""

    def check(self, folder, reference, options, settings, begun=None):
        settings.tell("whole model", 40, 100)
        asked.append(True)
        settings.tell("whole model", 50, 100)
        raise AssertionError("it went on")

    asked: list[bool] = []
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(type(FORMATS["gguf"]), "check", check)
    with pytest.raises(Interrupted, match="while verifying gguf"):
        check_formats(
            {"gguf": Path("x")},
            cast(Any, None),
            FormatOptions(),
            CheckSettings(),
            lambda *t: told.append(t),
            lambda: bool(asked),
        )
    assert ("verify gguf: whole model", 40, 100) in told


@pytest.mark.parametrize(("fits", "cannot"), [(True, False), (False, False), (True, True)])
def test_a_runtime_of_its_own_works_while_others_are_checked(fits, cannot, monkeypatch):
    """Its check comes last, its rows keep their place, and it has ended afterwards."""
    said = []

    @contextmanager
    def at_work(_format, _folder, _reference, _settings):
        if cannot:
            raise FormatError("no such file")
        said.append("begins")
        yield "at work"
        said.append("ends")

    def check(self, _folder, _reference, _options, _settings, begun=None):
        said.append((self.name, begun))
        return [Check(self.name, "L1", "row", "passed")]

    monkeypatch.setattr(Format, "check", check)
    monkeypatch.setattr(Format, "missing", lambda _self: None)
    apart = ("gptq", "compressed-tensors")
    begin = lambda self, *given: at_work(self, *given) if self.name in apart else None  # noqa: E731
    monkeypatch.setattr(Format, "at_work", begin)
    folders = {"gptq": Path("a"), "onnx": Path("b")}
    reference = SimpleNamespace(
        rows=(), source=None, weights=SimpleNamespace(count=1), fits_beside=fits
    )
    given = (cast(Any, reference), FormatOptions(), CheckSettings())
    parity = check_formats(folders, *given)
    assert [c.format for c in parity.checks] == ["gptq", "onnx"]
    if fits and not cannot:
        assert said == ["begins", ("onnx", None), ("gptq", "at work"), "ends"]
        said.clear()
        check_formats({"gptq": Path("a"), "compressed-tensors": Path("c")}, *given)
        # Memory is asked for one model more, and not for two.
        assert said == ["begins", ("compressed-tensors", None), ("gptq", "at work"), "ends"]
    else:
        assert said == [("gptq", None), ("onnx", None)]


def test_a_piped_proof_is_one_line_a_format(capsys):
    with Stages(quiet=False) as stages:
        for done in (0, 40, 100):
            stages(f"verify gguf: step {done}", done, 100)
        assert stages.doing() == "finishing this step (verify gguf: step 100)"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("verify gguf: ") and lines[0].endswith(" s")
