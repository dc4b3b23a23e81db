"""Bad inputs and faults, row by row: what a user meets, as a table from the row's number to the tests that show it.

Rows that other modules test are named in `ELSEWHERE`; the others are in the modules test_bad_*, mostly through the
command itself.
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

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.artifacts import edit
from tests.attacks import seeds
from tests.attacks.cases import RTN, f32, raw_safetensors
from tests.test_cli import call, refused
from vlmq_export import bundled, formats, pipeline
from vlmq_export.errors import ArtifactError
from vlmq_export.formats.base import Check
from vlmq_export.parity import forget_places
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.report import markdown

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    1: ["test_checkpoint::test_nan_weights_are_counted_and_named", "test_quantize::test_nan_weight_is_named_when_its_layer_is_read"],
    2: ["test_quantize::test_samples_with_nan_are_counted_and_all_of_them_refused"],
    3: ["test_statistics::test_half_precision_inputs_are_multiplied_in_float32_and_summed_in_float64", "test_solver::test_power_of_two_scaling_gives_identical_integers"],
    4: ["test_solver::test_dead_columns_are_zero_and_disturb_nothing", "test_solver::test_rank_deficient_hessian_is_solved_with_damping",
        "test_solver::test_damping_grows_until_the_matrix_is_definite", "test_solver::test_hopeless_hessian_falls_back_to_nearest"],
    5: ["test_solver::test_hopeless_hessian_falls_back_to_nearest"],
    6: ["test_cli::test_what_cannot_work_is_said_in_one_line", "test_cli::test_low_bit_groups_cost_more_in_gguf_and_the_dry_run_says_so",
        "test_gptq_format::test_plan_refuses"],
    7: ["test_gptq_packing::test_golden_words", "test_gptq_packing::test_symmetric_zero_words", "test_gptq_format::test_round_trip"],
    8: ["test_cli::test_what_cannot_work_is_said_in_one_line", "test_onnx_format::test_a_packed_linear_decodes_to_the_same_weights"],
    9: ["test_gptq_format::test_mislabelled_symmetric_file"],
    10: ["runtime_tests/test_onnx::test_qwen2_vl_passes_every_gate", "runtime_tests/test_gguf::test_random_models_pass_every_gate"],
    11: ["test_checkpoint::test_truncated_shard_is_named", "test_checkpoint::test_header_longer_than_the_file"],
    12: ["test_checkpoint::test_missing_shard_is_named", "test_checkpoint::test_index_naming_an_absent_tensor"],
    13: ["test_checkpoint::test_a_shard_outside_the_folder_is_refused", "test_onnx_format::test_data_outside_the_folder_is_refused",
         "test_onnx_format::test_a_symbolic_link_is_refused", "test_gptq_format::test_shard_outside_the_folder_is_not_read"],
    15: ["test_gguf_hostile::test_hostile_files_are_refused_at_once", "test_gguf_hostile::test_the_bomb_is_49_bytes_of_metadata_and_stops_every_way_in"],
    16: ["test_checkpoint::test_a_quantized_source_is_refused_by_method"],
    17: ["test_cli::test_an_unsupported_model_is_named"],
    20: ["test_cli::test_a_missing_processor_file_is_named"],
    22: ["test_calibration::test_unreadable_image_is_one_line", "test_calibration::test_images_are_turned_upright_and_made_rgb"],
    26: ["test_calibration::test_bad_rows_are_named_together"],
    27: ["test_calibration::test_truncation_drops_a_sample_whose_image_would_be_cut"],
    28: ["test_quantize::test_two_runs_have_the_same_bytes"],
    29: ["test_cli::test_a_full_disk_is_one_line_and_leaves_a_run_to_resume"],
    30: ["test_cli::test_an_output_folder_that_exists_is_left_alone", "test_cli::test_the_model_folder_is_never_the_output"],
    31: ["test_resume::test_resume_gives_the_same_bytes", "test_quantize::test_kill_9_at_a_random_moment_and_resume_gives_the_same_bytes"],
    32: ["test_resume::test_resume_gives_the_same_bytes"],
    33: ["test_resume::test_another_recipe_is_refused_with_the_difference", "test_quantize::test_another_run_is_not_resumed"],
    34: ["test_quantize::test_a_damaged_layer_is_named", "test_resume::test_a_second_process_on_the_same_folder_is_refused"],
    37: ["test_quantize::test_refusals_before_any_work"],
    38: ["test_cli::test_a_missing_runtime_is_said_before_any_work", "test_gptq_format::test_not_installed_is_not_run",
         "runtime_tests/test_gguf::test_a_missing_runtime_is_not_run_never_passed"],
    39: ["runtime_tests/test_gguf::test_another_build_of_llama_cpp_is_refused", "runtime_tests/test_onnx::test_what_the_runtime_refuses_is_a_failed_row"],
    40: ["runtime_tests/test_main_job::test_verify_catches_one_fault_in_each_format_and_names_it"],
    44: ["test_gptq_format::test_shards", "test_onnx_format::test_files_can_be_read_by_everyone_and_writing_again_does_not_append"],
}  # fmt: skip


def _tests_of(file: Path) -> set[str]:
    return {n.name for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.FunctionDef)}


def test_every_row_has_a_test():
    ours = set().union(*(_tests_of(file) for file in Path(__file__).parent.glob("test_bad_*.py")))
    here = {int(name.split("_")[2]) for name in ours if name.startswith("test_row_")}
    assert here | ELSEWHERE.keys() == set(range(1, 46))
    gone = []
    for test in sorted({test for tests in ELSEWHERE.values() for test in tests}):
        module, name = test.split("::")
        if name not in _tests_of(ROOT / (f"{module}.py" if "/" in module else f"tests/{module}.py")):
            gone.append(test)
    assert gone == []  # renamed or removed: name what shows the row now


def test_the_threat_table_names_tests_that_exist():
    named = re.findall(r"`([\w/]*test_\w+)::(test_[\w*]+)`", (ROOT / "docs" / "security.md").read_text("utf-8"))
    assert len(named) > 30
    for module, pattern in named:
        file = ROOT / (f"{module}.py" if "/" in module else f"tests/{module}.py")
        assert fnmatch.filter(_tests_of(file), pattern), (module, pattern)


# --- where and how it runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["/proc/vlmq", "file/out", "file", "x" * 300])
def test_row_30_an_output_that_cannot_be(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    code, _, err = call("--format", "gptq", *RTN, "--out", out)
    assert code in (1, 2) and len(err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_row_35_out_of_memory_is_a_stop_to_resume(tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "quantize", full)
    err = refused("--format", "gptq", *RTN, "--out", tmp_path / "out", code=75)
    assert "out of" in err and "memory" in err and "--resume" in err


@pytest.mark.slow
def test_row_36_one_core_is_enough(tmp_path):
    probe = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from vlmq_export.cli import main\n"
        f"import sys; sys.argv[1:] = ['--format', 'gptq', *{RTN!r}, '--out', {str(tmp_path / 'out')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "gptq" / "model.safetensors").is_file()


def test_row_37_a_device_that_is_not_there_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in refused("--format", "gptq", *RTN, "--device", "cuda", "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_row_39_an_onnxruntime_that_is_too_old_is_named_before_the_work(tmp_path, monkeypatch):
    from importlib import metadata

    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.20.1" if name == "onnxruntime" else installed(name))
    assert formats.get("onnx").missing() == "onnxruntime>=1.31 (here is 1.20.1)"
    (row, *_) = formats.get("onnx").check(tmp_path, None, None, None)
    assert row.status == "not run" and "onnxruntime>=1.31" in row.detail
    monkeypatch.undo()
    assert formats.get("onnx").missing() is None


@pytest.mark.parametrize("case", ["gated", "missing", "limited", "offline", "broken off"])
def test_row_41_the_hub_says_no(case, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors

    calls = []

    def download(name, **_):
        calls.append(name)
        if case == "offline":
            raise errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nand more lines")
        if case == "broken off":
            raise ConnectionResetError(104, "Connection reset by peer")
        kinds = {
            "gated": errors.GatedRepoError,
            "missing": errors.RepositoryNotFoundError,
            "limited": errors.HfHubHTTPError,
        }
        error = kinds[case].__new__(kinds[case])
        Exception.__init__(error, f"{case}: 4xx Client Error\nAuthorization: Bearer hf_secret")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    err = refused("org/model", "--format", "gguf", "--out", tmp_path / "out", code=1)
    assert "org/model" in err and "hf_secret" not in err and calls == ["org/model"]


def test_row_41_verify_downloads_nothing_that_a_recipe_names(artifact, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: asked.append(k["local_files_only"]) or "/gone"
    )
    assert pipeline.same_source("somebody/else", Artifact(artifact)) is None
    assert asked == [True]


def test_row_42_and_45_odd_names_a_tight_umask_and_nothing_private_in_what_is_passed_on(model, tmp_path):
    """One export from a folder with a strange name under a private home, with a token in the environment."""
    home = tmp_path / "home of alice"
    home.mkdir()
    source = model.rename(home / "模型 é <b>|x")
    out = home / "aus gabe"
    private = os.environ | {
        "HOME": str(home),
        "HF_TOKEN": "hf_abcdefSECRET",
        "HUGGING_FACE_HUB_TOKEN": "hf_abcdefSECRET",
    }
    command = ["bash", "-c", 'umask 077 && exec "$@"', "x", sys.executable, "-m", "vlmq_export", str(source), "--format", "gptq",
               "--method", "gptq", "--samples", "4", "--no-verify", "--calibration", str(bundled.CALIBRATION), "--out", str(out), "-v"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=private, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hf_abcdefSECRET" not in done.stdout + done.stderr
    for file in (p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        assert b"hf_abcdefSECRET" not in file.read_bytes(), file
        if file.name != "recipe.yaml":  # which `verify` needs to find data and model again
            assert b"home of alice" not in file.read_bytes(), file
        if file.parent.name in ("gptq", "artifact"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o644, file
    card, page = (out / "README.md").read_text("utf-8"), (out / "report.html").read_text("utf-8")
    assert "模型 é <b>|x" not in page and "模型 é &lt;b&gt;|x" in page and "# 模型 é &lt;b>\\|x" in card
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
    checks = [
        Check("gptq", "L1", "x", "failed", detail=f"{tmp_path}/out/gptq: damaged; {Path.home()}/x", worst=str(tmp_path))
    ]
    forget_places(checks, tmp_path / "out", None)
    assert str(tmp_path) not in checks[0].detail and str(Path.home()) + "/" not in checks[0].detail
    assert "gptq: damaged" in checks[0].detail
    assert markdown("a|b <script>`x`[y](z)\n# c") == "a\\|b &lt;script>'x'\\[y\\](z) # c"


# --- what we wrote ourselves, damaged -----------------------------------------------------------------------------------


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
)  # fmt: skip
def test_row_34_an_artifact_whose_integers_are_not_of_its_grid(artifact, tmp_path, part, change, says):
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
)  # fmt: skip
def test_row_34_a_manifest_that_lies(artifact, change, says):
    edit(artifact / "manifest.json", change)
    with pytest.raises(ArtifactError) as e:
        Artifact(artifact)
    assert says in str(e.value)
    code, _, err = call("inspect", artifact)
    assert code == 1 and says in err


def test_names_in_a_file_cannot_drive_the_terminal(tmp_path):
    """Tensor names with escape sequences, markup and newlines, through `inspect` and through an error."""
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
        ("samples: 99999999999999999999", "--samples"),
        ("seed: -1", "--seed"),
        ("out: \"\\0\"", "--out"),
    ],
)  # fmt: skip
def test_recipes_of_others(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    assert says in refused("--recipe", "recipe.yaml", "--format", "gptq", code=2)
    assert says in refused("verify", tmp_path, code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_sums_that_name_files_outside(tmp_path):
    from vlmq_export import checksums

    (tmp_path / checksums.SUMS).write_text(f"{'0' * 64}  ../secret\n{'0' * 64}  /etc/passwd\n")
    assert all("outside the folder" in line for line in checksums.changed_files(tmp_path))
