"""The Python API: its names, its types, what importing it costs, and whether its examples run."""

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vlmq_export
from vlmq_export import Recipe, VlmqError, api, bundled, export, plan, verify
from vlmq_export.result import Result

ROOT = Path(__file__).parents[2]
SECONDS = 0.3  # of CPU that importing may take


def test_the_names_are_these():
    verbs = ["evaluate", "export", "inspect", "plan", "verify"]
    names = ["Recipe", "VlmqError", "__version__", *verbs]
    assert vlmq_export.__all__ == names and set(names) <= set(dir(vlmq_export))
    for name in verbs:
        assert getattr(vlmq_export, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        _ = vlmq_export.quantize


def test_the_package_is_typed():
    assert (Path(vlmq_export.__file__).parent / "py.typed").is_file()
    for name in ("evaluate", "export", "inspect", "plan", "verify"):
        function = getattr(api, name)
        assert function.__doc__ and "return" in function.__annotations__
        assert all(p.annotation for p in inspect.signature(function).parameters.values())


def test_importing_is_fast_and_takes_no_torch():
    """The best of three fresh processes, in CPU time: what a busy machine adds is not ours."""
    code = (
        "import time; start = time.process_time(); import sys\n"
        "from vlmq_export import Recipe, export, plan, verify, inspect\n"
        "print(time.process_time() - start, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        seconds, *loaded = done.stdout.split()
        assert loaded == ["False", "False"]
        runs.append(float(seconds))
    assert min(runs) < SECONDS, runs


def test_the_documentation_runs():
    """The docstrings of the API, and the fenced sessions of its page."""
    found = doctest.testmod(api)
    assert found.attempted >= 3 and not found.failed
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    sessions = re.findall(r"```python\n(>>> .*?)```", page, re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(sessions), {}, "api.md", "api.md", 0)
    found = doctest.DocTestRunner().run(test)
    assert len(sessions) == 2 and found.attempted >= 5 and not found.failed


def test_a_whole_run_prints_nothing_and_tells_its_progress(tmp_path, capfd):
    told = []
    recipe = Recipe(format=["gguf"], method="rtn", out=tmp_path / "out", verify=False)
    result = export(recipe, progress=lambda *step: told.append(step))
    assert isinstance(result, Result) and not result.verified
    assert capfd.readouterr().out == ""
    assert {stage for stage, _, _ in told} >= {"quantize", "write"}
    assert all(0 <= done <= total for _, done, total in told)
    found = vlmq_export.inspect(result.out / "artifact")
    assert found.kind == "artifact" and found.tensors


def test_what_a_user_can_meet_is_raised_as_one_line(tmp_path):
    for call in (
        lambda: export(Recipe(format=["gguf"], model=str(tmp_path / "gone"))),
        lambda: export(Recipe(out=tmp_path / "out")),
        lambda: verify(tmp_path / "gone"),
        lambda: vlmq_export.inspect(tmp_path / "gone"),
    ):
        with pytest.raises(VlmqError) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_plan_has_its_refusals_and_does_not_raise_them():
    planned = plan(Recipe(format=["gguf"], bits=8, sym=False))
    assert any("--sym" in why for why in planned.refusals)
    assert planned.model.name == "reference-vlm" and planned.memory is not None


def test_a_model_may_be_a_path():
    assert Recipe(model=bundled.REFERENCE_VLM).model == str(bundled.REFERENCE_VLM)
