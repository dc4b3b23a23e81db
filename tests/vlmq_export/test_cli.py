"""The command as a user meets it: exit codes, one-line errors, nothing half-written."""

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.artifacts import GRIDS, edit, rtn_artifact
from vlmq_export import bundled
from vlmq_export.cli import app
from vlmq_export.formats.proof.reference import too_large
from vlmq_export.recipes.recipe_file import load_recipe


def call(*args: object):
    """Run the command in this process. Returns (exit code, stdout, stderr)."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*args: object, code: int) -> str:
    """The error of a command that must fail: one line on stderr, and nothing on stdout."""
    got, out, err = call(*args)
    assert got == code, err
    assert out == "" and len(err.strip().splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 2, "--format"),
        (["--format", "gguf", "--bits", "5"], 2, "--bits 5"),
        (["--format", "gguf", "--bits", "8", "--asym"], 2, "8"),
        (["--format", "gguf", "--act-order", "dynamic"], 2, "act-order"),
        (["--format", "gguf", "--group-size", "384"], 2, "--group-size 384 does not divide"),
        (["nowhere", "--format", "gguf"], 1, "nowhere"),
        (["--format", "gguf", "--overwrite", "--resume"], 2, "exclude"),
        (["--format", "gguf", "--recipe", "gone.yaml"], 2, "gone.yaml"),
        (["--format", "gguf", "--calibration", "gone.json"], 1, "gone.json"),
        (["--format", "gguf", "--verify-data", "gone.json"], 1, "gone.json"),
        (["--format", "gguf", "--resume", "--out", "gone"], 2, "--resume: there is no gone"),
        (["verify", "gone"], 2, "gone"),
        (["verfiy", "out"], 2, "did you mean verify?"),
        (["inspct", "out"], 2, "did you mean inspect?"),
        (["inspect", "gone"], 2, "gone"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(tmp_path, monkeypatch, args, code, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(*args, code=code)
    assert not any(tmp_path.iterdir())


def test_an_unknown_option_is_a_usage_error():
    code, _, err = call("--formt", "gguf")
    assert code == 2 and "--formt" in err


def test_an_unsupported_model_is_named(model, tmp_path):
    (model / "config.json").write_text('{"model_type": "llama"}')
    err = refused(model, "--format", "gguf", "--out", tmp_path / "out", code=1)
    assert "llama" in err and "qwen2_5_vl" in err


def test_a_truncated_model_is_named(model, tmp_path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    err = refused(model, "--format", "gguf", "--out", tmp_path / "out", code=1)
    assert "model.safetensors" in err
    assert not (tmp_path / "out").exists()


def test_a_missing_processor_file_is_named(model, tmp_path):
    (model / "preprocessor_config.json").unlink()
    flags = ("--format", "gguf", "--calibration", bundled.CALIBRATION, "--out", tmp_path / "out")
    err = refused(model, *flags, code=2)
    assert "preprocessor_config.json" in err and not (tmp_path / "out").exists()


def test_an_output_folder_that_exists_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("do not delete")
    for flag in ([], ["--overwrite"], ["--resume"]):
        err = refused("--format", "gguf", "--samples", 1, "--out", out, *flag, code=2)
        assert "did not write" in err
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("flags", [["gguf"], ["gguf", "--resume"]])
def test_a_whole_artifact_is_offered_where_its_folder_exists(tmp_path, flags):
    """Another format is asked for: nobody should have to quantize again for it."""
    out = tmp_path / "out"
    rtn = ("--method", "rtn", "--no-verify", "--quiet", "--out", out)
    assert call("--format", "gptq", *rtn)[0] == 0
    err = refused(*rtn, "--format", *flags, code=2)
    assert f"give {out / 'artifact'} as MODEL" in err and "--overwrite" in err
    code, _, err = call(out / "artifact", "-f", "gguf", "--no-verify", "--out", tmp_path / "more")
    assert code == 0, err
    made = sorted(p.suffix for p in (tmp_path / "more" / "gguf").iterdir())
    assert made == ["", ".gguf", ".gguf"]  # the Modelfile, and the two files that it names


def test_the_model_folder_is_never_the_output(model):
    err = refused(model, "--format", "gptq", "--samples", 1, "--out", model, code=2)
    assert "holds the model" in err


def test_dry_run_reads_headers_only(model, tmp_path, monkeypatch):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096] + b"\xff" * 4096)  # the last weights are NaN
    monkeypatch.chdir(tmp_path)
    flags = [flag for name in ("gptq", "onnx", "gguf") for flag in ("--format", name)]
    code, out, _ = call(model, *flags, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["refused"] == []
    assert set(plan["formats"]) == {"gptq", "onnx", "gguf"}
    # Portable groups of 4 bits become Q4_1, which has 5 bits a weight.
    assert plan["formats"]["gguf"]["bits_per_weight"] == pytest.approx(5.0)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_dry_run_lists_what_would_be_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("--format", "gguf", "--bits", 8, "--asym", "--dry-run")
    assert code == 2 and "refused" in out


def test_low_bit_groups_cost_more_in_gguf_and_the_dry_run_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--format", "gguf", "--bits", 2, "--embedding-bits", "off", "--dry-run", "--json")
    code, out, _ = call(*flags)
    gguf = json.loads(out)["formats"]["gguf"]
    assert code == 0 and gguf["bits_per_weight"] == pytest.approx(4.5)
    assert any("--group-size" in note for note in gguf["notes"])


def test_version():
    code, out, _ = call("--version")
    assert code == 0 and out.startswith("vlmq-export ")


def test_nothing_generic_is_a_top_level_module(tmp_path):
    """`formats`, `tools` and `quantizer` of the checkout must not get into site-packages."""
    probe = (
        "import importlib.util as u, vlmq_export.formats.gguf, vlmq_export.quantizer;"
        "print([n for n in ('formats', 'quantizer', 'tools', 'runtime_tests') if u.find_spec(n)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_quantizer_needs_few_packages(tmp_path):
    """It runs where only torch, transformers, safetensors, numpy and Pillow are installed."""
    probe = (
        "import sys\n"
        "banned = {'pydantic', 'typer', 'rich', 'yaml', 'onnx', 'gguf', 'jinja2'}\n"
        "class Ban:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in banned: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Ban())\n"
        "import vlmq_export.quantizer.run.quantize, vlmq_export.quantizer.samples.preprocessor\n"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, check=True, capture_output=True)


def test_an_artifacts_grid_is_its_own(tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w3g128"]).path
    err = refused(artifact, "--format", "gptq", "--bits", 4, code=2)
    assert "--bits 4: the artifact has 3" in err
    code, _, err = call(artifact, "--format", "gptq", "--no-verify", "--out", tmp_path / "out")
    assert code == 0, err
    assert load_recipe(tmp_path / "out" / "recipe.yaml", {}).bits == 3
    assert "3 bits" in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_runtime_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmq_export.pipeline.find_spec", lambda name: None)
    assert "needs gguf" in refused("--format", "gguf", "--out", tmp_path / "out", code=2)
    code, said, _ = call("--format", "gguf", "--dry-run")
    assert code == 2 and "refused: --format gguf needs gguf" in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def without_gptqmodel(monkeypatch):
    """A machine where GPTQ files can be written, and not run."""
    from vlmq_export.formats.gptq import requirements

    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    monkeypatch.delenv("VLMQ_REQUIRE", raising=False)  # which would declare it present


def test_files_that_were_written_and_not_proven_have_an_exit_code(tmp_path, without_gptqmodel):
    out = tmp_path / "out"
    flags = ("--format", "gptq", "--method", "rtn", "--out", out)
    code, said, _ = call(*flags, "--dry-run")
    assert code == 0 and "not proven, exit code 4: optimum, gptqmodel" in " ".join(said.split())
    planned = json.loads(call(*flags, "--dry-run", "--json")[1])
    assert "gptqmodel" in planned["not_provable"]["gptq"]
    code, said, err = call(*flags, "--json")
    assert code == 4 and "gptq will be written and not proven" in " ".join(err.split())
    result = json.loads(said)
    assert result["verified"] is False
    assert {c["status"] for c in result["parity"]["checks"]} >= {"passed", "not run"}
    assert call("verify", out, "--quiet")[0] == 4
    card = (out / "README.md").read_text()
    assert "**Not proven:** no parity check failed" in card and "gptqmodel" in card
    assert 'class="verdict none">not proven' in (out / "report.html").read_text()


def test_a_proof_that_nobody_asked_for_is_not_missed(tmp_path, without_gptqmodel):
    out = tmp_path / "out"
    flags = ("--format", "gptq", "--method", "rtn", "--no-verify", "--json", "--out", out)
    assert json.loads(call(*flags, "--dry-run")[1])["not_provable"] == {}
    code, said, _ = call(*flags)
    assert code == 0 and json.loads(said)["verified"] is None


def test_a_model_too_large_to_run_whole_is_said_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vlmq_export.planning.proof_plan.too_large", partial(too_large, copies=10**6)
    )
    code, said, _ = call("--format", "gguf", "--dry-run", "--json")
    assert code == 0 and "for whole models in float32" in json.loads(said)["not_provable"]["gguf"]


@pytest.mark.parametrize(
    "file", ["layer-00002.safetensors", "float-00001.safetensors", "manifest.json"]
)
def test_a_full_disk_is_one_line_and_leaves_a_run_to_resume(tmp_path, monkeypatch, file):
    replace = Path.replace

    def full(self, target):
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return replace(self, target)

    out = tmp_path / "out"
    arguments = ("--format", "gptq", "--method", "rtn", "--no-verify", "--quiet", "--out", out)
    monkeypatch.setattr(Path, "replace", full)
    err = refused(*arguments, code=1)
    assert file in err and "No space left" in err
    assert not list(out.rglob("*.tmp"))
    assert not (out / "gptq").exists()
    monkeypatch.setattr(Path, "replace", replace)
    code, _, err = call(*arguments, "--resume")
    assert code == 0, err


def test_a_dry_run_says_what_a_writer_would_miss(model, tmp_path):
    """The tokenizer is read for the plan, and not when the whole model is quantized."""
    change = {"pre_tokenizer": {"type": "Whitespace"}}
    edit(model / "tokenizer.json", lambda j: j.update(change))
    _, out, err = call(model, "--format", "gguf", "--out", tmp_path / "out", "--dry-run")
    assert "pre-tokenizer" in out + err and "Whitespace" in out + err
    assert not (tmp_path / "out").exists()
    err = refused(model, "--format", "gguf", "--out", tmp_path / "out", code=2)
    assert "Whitespace" in err and not (tmp_path / "out").exists()
