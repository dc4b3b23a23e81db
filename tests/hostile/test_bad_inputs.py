"""Bad inputs and faults that a user can meet: 45 kinds, each with a number, the "row".

A test in a module test_bad_* has the row in its name. `ELSEWHERE` names the tests in other modules.
Most tests here run the command itself.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from tests.artifacts import edit
from tests.hostile.attacks import seeds
from tests.hostile.attacks.cases import RTN, f32, raw_safetensors
from tests.vlmq_export.test_cli import call, refused
from vlmq_export import bundled
from vlmq_export.errors import ArtifactError
from vlmq_export.formats.contract import FORMATS
from vlmq_export.formats.onnx import requirements
from vlmq_export.formats.proof.checks import Check
from vlmq_export.output import checksums
from vlmq_export.proving.parity import forget_places
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.report.page import markdown
from vlmq_export.sources import float_model
from vlmq_export.sources.locate import same_source

ROOT = Path(__file__).parents[2]
# row → tests outside the modules test_bad_*, as "module::test"
ELSEWHERE = {
    1: [
        "quantizer/model/test_checkpoint::test_nan_weights_are_counted_and_named",
        "quantizer/run/test_quantize::test_nan_weight_is_named_when_its_layer_is_read",
    ],
    2: ["quantizer/run/test_quantize::test_samples_with_nan_are_counted_and_all_of_them_refused"],
    3: [
        "quantizer/calibration/test_statistics::"
        "test_half_precision_inputs_are_multiplied_in_float32_and_summed_in_float64",
        "quantizer/solver/test_column_loop::test_power_of_two_scaling_gives_identical_integers",
    ],
    4: [
        "quantizer/solver/test_column_loop::test_dead_columns_are_zero_and_disturb_nothing",
        "quantizer/solver/test_column_loop::test_rank_deficient_hessian_is_solved_with_damping",
        "quantizer/solver/test_column_loop::test_damping_grows_until_the_matrix_is_definite",
        "quantizer/solver/test_column_loop::test_hopeless_hessian_falls_back_to_nearest",
    ],
    5: ["quantizer/solver/test_column_loop::test_hopeless_hessian_falls_back_to_nearest"],
    6: [
        "vlmq_export/test_cli::test_what_cannot_work_is_said_in_one_line",
        "vlmq_export/test_cli::test_low_bit_groups_cost_more_in_gguf_and_the_dry_run_says_so",
        "formats/gptq/test_format::test_plan_refuses",
    ],
    7: [
        "formats/gptq/test_packing::test_golden_words",
        "formats/gptq/test_packing::test_symmetric_zero_words",
        "formats/gptq/test_format::test_round_trip",
    ],
    8: [
        "vlmq_export/test_cli::test_what_cannot_work_is_said_in_one_line",
        "formats/onnx/test_format::test_a_packed_linear_decodes_to_the_same_weights",
    ],
    9: ["formats/gptq/test_format::test_mislabelled_symmetric_file"],
    10: [
        "runtime_tests/test_onnx::test_qwen2_vl_passes_every_gate",
        "runtime_tests/test_gguf::test_random_models_pass_every_gate",
    ],
    11: [
        "quantizer/model/test_checkpoint::test_truncated_shard_is_named",
        "quantizer/model/test_checkpoint::test_header_longer_than_the_file",
    ],
    12: [
        "quantizer/model/test_checkpoint::test_missing_shard_is_named",
        "quantizer/model/test_checkpoint::test_index_naming_an_absent_tensor",
    ],
    13: [
        "quantizer/model/test_checkpoint::test_a_shard_outside_the_folder_is_refused",
        "formats/onnx/test_format::test_data_outside_the_folder_is_refused",
        "formats/onnx/test_format::test_a_symbolic_link_is_refused",
        "formats/gptq/test_format::test_shard_outside_the_folder_is_not_read",
    ],
    15: [
        "formats/gguf/test_hostile::test_hostile_files_are_refused_at_once",
        "formats/gguf/test_hostile::test_49_bytes_that_announce_a_huge_array_are_refused_at_once",
    ],
    16: ["quantizer/model/test_checkpoint::test_a_quantized_source_is_refused_by_method"],
    17: ["vlmq_export/test_cli::test_an_unsupported_model_is_named"],
    20: ["vlmq_export/test_cli::test_a_missing_processor_file_is_named"],
    22: [
        "quantizer/samples/test_rows::test_unreadable_image_is_one_line",
        "quantizer/samples/test_rows::test_images_are_turned_upright_and_made_rgb",
    ],
    26: ["quantizer/samples/test_rows::test_bad_rows_are_named_together"],
    27: ["quantizer/samples/test_rows::test_truncation_drops_a_sample_whose_image_would_be_cut"],
    28: ["quantizer/run/test_quantize::test_two_runs_have_the_same_bytes"],
    29: ["vlmq_export/test_cli::test_a_full_disk_is_one_line_and_leaves_a_run_to_resume"],
    30: [
        "vlmq_export/test_cli::test_an_output_folder_that_exists_is_left_alone",
        "vlmq_export/test_cli::test_the_model_folder_is_never_the_output",
    ],
    31: [
        "quantizer/run/test_resume::test_resume_gives_the_same_bytes",
        "quantizer/run/test_quantize::"
        "test_kill_9_at_a_random_moment_and_resume_gives_the_same_bytes",
    ],
    32: ["quantizer/run/test_resume::test_resume_gives_the_same_bytes"],
    33: [
        "quantizer/run/test_resume::test_another_recipe_is_refused_with_the_difference",
        "quantizer/run/test_quantize::test_another_run_is_not_resumed",
    ],
    34: [
        "quantizer/run/test_quantize::test_a_damaged_layer_is_named",
        "quantizer/run/test_resume::test_a_second_process_on_the_same_folder_is_refused",
    ],
    37: ["quantizer/run/test_quantize::test_refusals_before_any_work"],
    38: [
        "vlmq_export/test_cli::test_a_missing_runtime_is_said_before_any_work",
        "formats/gptq/test_format::test_not_installed_is_not_run",
        "runtime_tests/test_gguf::test_a_missing_runtime_is_not_run_never_passed",
    ],
    39: [
        "runtime_tests/test_gguf::test_another_build_of_llama_cpp_is_refused",
        "runtime_tests/test_onnx::test_what_the_runtime_refuses_is_a_failed_row",
    ],
    40: ["runtime_tests/test_main_job::test_verify_catches_one_fault_in_each_format_and_names_it"],
    44: [
        "formats/gptq/test_format::test_shards",
        "formats/onnx/test_format::"
        "test_files_can_be_read_by_everyone_and_writing_again_does_not_append",
    ],
}


def _module(name: str) -> Path:
    """The file of a module. Only runtime_tests are named from the root of the repository."""
    return ROOT / ("" if name.startswith("runtime_tests/") else "tests") / f"{name}.py"


def _tests_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_every_row_has_a_test():
    ours = set().union(*(_tests_of(file) for file in Path(__file__).parent.glob("test_bad_*.py")))
    here = {int(name.split("_")[2]) for name in ours if name.startswith("test_row_")}
    assert here | ELSEWHERE.keys() == set(range(1, 46))
    gone = []
    for test in sorted({test for tests in ELSEWHERE.values() for test in tests}):
        module, name = test.split("::")
        if name not in _tests_of(_module(module)):
            gone.append(test)
    assert gone == []  # these were renamed or removed: update ELSEWHERE


def test_the_threat_table_names_tests_that_exist():
    table = (ROOT / "docs" / "security.md").read_text("utf-8")
    named = re.findall(r"`([\w/]*test_\w+)::(test_[\w*]+)`", table)
    assert len(named) > 30
    for module, pattern in named:
        assert fnmatch.filter(_tests_of(_module(module)), pattern), (module, pattern)


# --- where and how it runs ------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["/proc/vlmq", "file/out", "file", "x" * 300])
def test_row_30_an_output_that_cannot_be(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    code, _, err = call("--format", "gptq", *RTN, "--out", out)
    assert code in (1, 2) and len(err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


OF_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("error", [MemoryError(), OF_CUDA])
def test_row_35_out_of_memory_is_a_stop_to_resume(tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(float_model, "quantize", full)
    err = refused("--format", "gptq", *RTN, "--out", tmp_path / "out", code=75)
    assert "out of" in err and "memory" in err and "--resume" in err


@pytest.mark.slow
def test_row_36_one_core_is_enough(tmp_path):
    arguments = ["--format", "gptq", *RTN, "--out", str(tmp_path / "out")]
    probe = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from vlmq_export.cli import main\n"
        f"import sys; sys.argv[1:] = {arguments!r}; main()"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "gptq" / "model.safetensors").is_file()


def test_row_37_a_device_that_is_not_there_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    err = refused("--format", "gptq", *RTN, "--device", "cuda", "--out", out, code=2)
    assert "--device cpu" in err and not out.exists()


def test_row_39_an_onnxruntime_that_is_too_old_is_named_before_the_work(tmp_path, monkeypatch):
    installed = requirements.version
    old = {"onnxruntime": "1.20.1"}
    monkeypatch.setattr(requirements, "version", lambda name: old.get(name) or installed(name))
    assert FORMATS["onnx"].missing() == "onnxruntime>=1.31 (here is 1.20.1)"
    (row, *_) = FORMATS["onnx"].check(tmp_path, None, None, None)
    assert row.status == "not run" and "onnxruntime>=1.31" in row.detail
    monkeypatch.undo()
    assert FORMATS["onnx"].missing() is None


def _http_error(kind: type[Exception]) -> Exception:
    """An error of huggingface_hub without the HTTP response that its constructor asks for."""
    error = kind.__new__(kind)
    Exception.__init__(error, "4xx Client Error\nAuthorization: Bearer hf_secret")
    return error


HUB_ERRORS = {
    "gated": _http_error(errors.GatedRepoError),
    "missing": _http_error(errors.RepositoryNotFoundError),
    "limited": _http_error(errors.HfHubHTTPError),
    "offline": errors.LocalEntryNotFoundError(
        "Cannot find an appropriate cached snapshot folder\nand more lines"
    ),
    "broken off": ConnectionResetError(104, "Connection reset by peer"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_row_41_the_hub_says_no(case, monkeypatch, tmp_path):
    calls = []

    def download(name, **_):
        calls.append(name)
        raise HUB_ERRORS[case]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    err = refused("org/model", "--format", "gguf", "--out", tmp_path / "out", code=1)
    assert "org/model" in err and "hf_secret" not in err and calls == ["org/model"]


def test_row_41_verify_downloads_nothing_that_a_recipe_names(artifact, monkeypatch):
    asked = []

    def download(name, *, local_files_only, **_):
        asked.append(local_files_only)
        return "/gone"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_source("somebody/else", Artifact(artifact)) is None
    assert asked == [True]


def test_row_42_and_45_odd_names_a_tight_umask_and_nothing_private_in_what_is_passed_on(
    model, tmp_path
):
    """One export of a folder with a strange name in a private home, by a user with a token."""
    home, token = tmp_path / "home of alice", "hf_abcdefSECRET"
    home.mkdir()
    source = model.rename(home / "模型 é <b>|x")
    out = home / "aus gabe"
    private = {"HOME": str(home), "HF_TOKEN": token, "HUGGING_FACE_HUB_TOKEN": token}
    quantize = ["--format", "gptq", "--method", "gptq", "--samples", "4", "--no-verify"]
    data = ["--calibration", str(bundled.CALIBRATION)]
    command = [sys.executable, "-m", "vlmq_export", str(source), *quantize, *data]
    done = subprocess.run(
        ["bash", "-c", 'umask 077 && exec "$@"', "x", *command, "--out", str(out), "-v"],
        capture_output=True,
        text=True,
        env=os.environ | private,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    for file in (p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        assert token.encode() not in file.read_bytes(), file
        # recipe.yaml alone has paths: `verify` needs them to find the model and the data
        if file.name != "recipe.yaml":
            assert b"home of alice" not in file.read_bytes(), file
        if file.parent.name in ("gptq", "artifact"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o644, file
    card, page = (out / "README.md").read_text("utf-8"), (out / "report.html").read_text("utf-8")
    assert "模型 é <b>|x" not in page
    assert "模型 é &lt;b&gt;|x" in page and "# 模型 é &lt;b>\\|x" in card
    assert "<img" not in page and "data:image" not in page
    assert b"\r\n" not in (out / "recipe.yaml").read_bytes()


def test_row_43_identity_is_content_not_time(shards):
    before = Checkpoint(shards).fingerprint()
    for file in shards.iterdir():
        os.utime(file, (0, 2**31))
    assert Checkpoint(shards).fingerprint() == before
    shard = shards / "model-00001-of-00002.safetensors"
    times = shard.stat()
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Checkpoint(shards).fingerprint() != before


def test_row_44_more_than_a_thousand_shards(tmp_path):
    names = {f"t{i}": f"model-{i:05d}-of-01200.safetensors" for i in range(1200)}
    for tensor, file in names.items():
        (tmp_path / file).write_bytes(raw_safetensors({tensor: f32(0, 4)}, bytes(4)))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.tensors) == 1200 and checkpoint.tensor("t1199").shape == (1,)


def test_row_45_a_report_forgets_where_files_lay(tmp_path):
    detail = f"{tmp_path}/out/gptq: damaged; {Path.home()}/x"
    check = Check("gptq", "L1", "x", "failed", detail=detail, worst=str(tmp_path))
    forget_places([check], tmp_path / "out", None)
    assert str(tmp_path) not in check.detail and f"{Path.home()}/" not in check.detail
    assert "gptq: damaged" in check.detail
    assert markdown("a|b <script>`x`[y](z)\n# c") == "a\\|b &lt;script>'x'\\[y\\](z) # c"


# --- what we wrote ourselves, damaged -------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("codes", lambda t: t.fill_(200), "codes over 15"),
        ("zero_points", lambda t: t.fill_(16), "zero-points over 15"),
        ("g_idx", lambda t: t.fill_(7), "g_idx entries outside 0..1"),
        ("g_idx", lambda t: t.fill_(-1), "g_idx entries outside 0..1"),
        ("scales", lambda t: t.fill_(float("nan")), "not finite"),
        ("codes", lambda t: t[:, :3], "the manifest says"),
        ("scales", lambda t: t.float(), "the manifest says"),
        ("g_idx", None, "missing"),
    ],
)
def test_row_34_an_artifact_whose_integers_are_not_of_its_grid(
    artifact, tmp_path, part, change, says
):
    """`change` works on one tensor of the layer's file; None: the tensor is removed."""
    layer = artifact / "layer-00000.safetensors"
    tensors = load_file(layer)
    key = f"{seeds.LINEARS[0]}.{part}"
    value = tensors.pop(key)
    if change is not None:
        tensors[key] = change(value.clone()).contiguous()
    save_file(tensors, layer)
    err = refused(artifact, "--format", "gptq", "--no-verify", "--out", tmp_path / "out", code=1)
    assert says in err and not (tmp_path / "out" / "gptq").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v["modules"][0].update(in_features=2**40), "layer and shape"),
        (lambda v: v["modules"][0].update(layer="0"), "layer and shape"),
        (lambda v: v["modules"][0].update(bits=5), "5 bits"),
        (lambda v: v["modules"][0].update(group_size=48), "groups of 48"),
        (lambda v: v["modules"].append(v["modules"][0]), "twice"),
        (lambda v: v["modules"].clear(), "no linears"),
        (lambda v: v["config"].update(bits="4"), "bits"),
        (lambda v: v["modules"][0].update(out_features=8), "the manifest says"),
        (lambda v: v["modules"][0].update(layer=3), "layer-00003.safetensors missing"),
        (lambda v: v.update(schema=99), "schema 99"),
        (lambda v: v.update(calibration=[]), "calibration"),
    ],
)
def test_row_34_a_manifest_that_lies(artifact, change, says):
    edit(artifact / "manifest.json", change)
    with pytest.raises(ArtifactError) as e:
        Artifact(artifact)
    assert says in str(e.value)
    code, _, err = call("inspect", artifact)
    assert code == 1 and says in err


def test_names_in_a_file_cannot_drive_the_terminal(tmp_path):
    """Names with escape sequences, markup and newlines, in what `inspect` shows and in an error."""
    evil = "t\x1b]0;owned\x07[red]\n[/nothing]"
    folder = tmp_path / "gptq"
    seeds.gptq_folder(folder)
    edit(folder / "config.json", lambda v: v["quantization_config"].update({evil: evil}))
    code, out, err = call("inspect", folder)
    assert code == 0 and "\x1b" not in out + err, err
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(raw_safetensors({evil: {"dtype": evil}}))
    code, out, err = call("inspect", folder)
    assert code == 1 and "\x1b" not in out + err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "aliases"),
        ("bits: 4\nbits: 3\n", "key bits appears twice"),
        ("format: " + "[" * 5000, "brackets"),
        ("- " * 3000 + "x", "nested too deeply"),
        ("bits: " + "9" * 5000, "4300 digits"),
        ("out: !!python/object/apply:os.system ['touch pwned']", "not YAML"),
        ("x" * 70_000, "bytes"),
        ("samples: 99999999999999999999", "samples"),
        ("seed: -1", "seed"),
        ('out: "\\0"', "--out"),
    ],
)
def test_recipes_of_others(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    assert says in refused("--recipe", "recipe.yaml", "--format", "gptq", code=2)
    assert says in refused("verify", tmp_path, code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_sums_that_name_files_outside(tmp_path):
    (tmp_path / checksums.SUMS).write_text(f"{'0' * 64}  ../secret\n{'0' * 64}  /etc/passwd\n")
    assert all("outside the folder" in line for line in checksums.changed_files(tmp_path))
