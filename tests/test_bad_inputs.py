"""Bad inputs and faults, row by row: what a user meets, as a table from the row's number to the tests that show it.

Rows that other modules test are named in `ELSEWHERE`; the others are here, mostly through the command itself.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import logging
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.artifacts import edit
from tests.attacks import seeds
from tests.test_cli import call, refused
from tests.test_gguf_hostile import GOOD, HOSTILE
from vlmq_export import bundled, formats, pipeline
from vlmq_export.errors import ArtifactError, CalibrationError, VlmqError
from vlmq_export.formats.base import Check
from vlmq_export.parity import forget_places
from vlmq_export.quantizer import calibration, quantize, solver
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.calibration import Preprocessor, load_image, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.statistics import Statistics
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
    7: ["test_gptq_format::test_golden_words", "test_gptq_format::test_symmetric_zero_words", "test_gptq_format::test_round_trip"],
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
    here = {int(name.split("_")[2]) for name in _tests_of(Path(__file__)) if name.startswith("test_row_")}
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


@pytest.fixture
def model(tmp_path):
    """A copy of the reference checkpoint to damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in bundled.REFERENCE_VLM.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def shards(tmp_path):
    """A checkpoint of two small shards."""
    folder = tmp_path / "shards"
    seeds.checkpoint(folder)
    return folder


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "artifact"
    seeds.artifact(folder)
    return folder


RTN = ("--method", "rtn", "--no-verify", "--quiet")


def said(reader, *arguments) -> str:
    """The one line of a refusal."""
    with pytest.raises(VlmqError) as e:
        reader(*arguments)
    assert str(e.value).isprintable()
    return str(e.value)


def rows_file(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    Image.new("RGB", (84, 84), "white").save(folder / "a.png")
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return folder / name


def llava(image="a.png", question="<image>\nWhat?", answer="red", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **more}


# --- weights and numbers ---------------------------------------------------------------------------------------------


def test_row_01_nan_in_the_source_is_named_and_nothing_is_exported(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights["visual.merger.mlp.0.weight"][3, :5] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    err = refused(model, "--format", "gptq", *RTN, "--out", tmp_path / "out", code=1)
    assert "visual.merger.mlp.0.weight has 5 NaN" in err
    assert not (tmp_path / "out" / "gptq").exists() and not (tmp_path / "out" / "artifact" / "manifest.json").exists()


def test_row_02_a_few_bad_samples_are_left_out_and_many_stop_the_run():
    quantize.refuse_many_lost(0, 8)
    quantize.refuse_many_lost(2, 8)
    assert "3 of 8 samples" in said(quantize.refuse_many_lost, 3, 8)


def test_row_03_activations_that_overflow_float16_and_float32():
    weights = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for scale, hopeless in ((1e4, False), (1e30, True)):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * scale
        sums = Statistics.empty(16, drift=False)
        sums.add(x.half() if scale < 1e5 else x)
        hessian = solver.prepare(sums.hessian, sums.diagonal, group=16, act_order="off", damp=0.01)
        assert hessian.fallback == hopeless  # squares of 1e30 are infinite: rounded to nearest, and recorded
        solved = solver.solve(weights, hessian, Affine(4), group=16, act_order="off", block=16)
        assert bool(torch.isfinite(solved.decode()).all())


def test_row_05_calibration_without_images_warns(tmp_path, caplog, model):
    path = rows_file(
        tmp_path, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    )
    recipe = pipeline.load_recipe(None, {"calibration": path, "samples": 1})
    with caplog.at_level(logging.WARNING, "vlmq_export"):
        logging.getLogger("vlmq_export").propagate = True
        pipeline.calibration_samples(recipe, Checkpoint(model), pipeline.Hooks())
    assert "text alone" in caplog.text


# --- the source folder -------------------------------------------------------------------------------------------------


def raw_safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(*offsets: int) -> dict:
    return {"dtype": "F32", "shape": [(offsets[1] - offsets[0]) // 4], "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12), "overlaps"),
        ({"a": f32(0, 8), "b": f32(12, 20)}, bytes(20), "gap"),
        ({"a": f32(4, 8)}, bytes(8), "gap"),
        ({"a": f32(0, 8)}, bytes(12), "truncated or damaged"),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, bytes(8), "bytes for shape"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), "shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "None"),
    ],
)
def test_row_11_a_header_that_does_not_fit_its_data(shards, header, data, says):
    (shards / "model-00001-of-00002.safetensors").write_bytes(raw_safetensors(header, data))
    err = said(Checkpoint, shards)
    assert says in err and "model-00001-of-00002.safetensors" in err


def test_row_12_every_problem_of_the_shards_is_listed_at_once(shards):
    save_file(
        {"a": torch.zeros(1)}, shards / "model-00002-of-00002.safetensors"
    )  # a is in the first shard too, b is gone
    edit(shards / "model.safetensors.index.json", lambda v: v["weight_map"].update(c="gone.safetensors", d="../out"))
    err = said(Checkpoint, shards)
    assert all(
        part in err for part in ("tensor a is in both", "gone.safetensors is missing", "../out is outside the folder")
    )


def test_row_12_index_and_shards_have_the_same_tensors(shards):
    save_file({"b": torch.zeros(4), "extra": torch.zeros(1)}, shards / "model-00002-of-00002.safetensors")
    assert "not in the index, first extra" in said(Checkpoint, shards)


def test_row_12_a_shard_that_nobody_names_is_left_and_said(shards, caplog):
    save_file({"z": torch.zeros(1)}, shards / "consolidated.safetensors")
    logging.getLogger("vlmq_export").propagate = True
    with caplog.at_level(logging.WARNING, "vlmq_export"):
        assert "z" not in Checkpoint(shards).tensors
    assert "consolidated.safetensors" in caplog.text
    save_file({"z": torch.zeros(1)}, shards / "model.safetensors")  # but transformers would take this one
    assert "both here" in said(Checkpoint, shards)


def test_row_13_links_out_of_the_folder_are_refused(shards, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("model-00001-of-00002.safetensors", "config.json", "LICENSE"):
        if (shards / name).exists():
            shutil.move(shards / name, outside / name)
        else:
            (outside / name).write_text("a secret")
        (shards / name).symlink_to(outside / name)
        err = said(lambda: Checkpoint(shards).companions)
        assert f"{name} is a link to a file outside the folder" in err
        (shards / name).unlink()
        shutil.copyfile(outside / name, shards / name)
    Checkpoint(shards)
    (shards / "sub").symlink_to(outside)
    edit(
        shards / "model.safetensors.index.json",
        lambda v: v["weight_map"].update(a="sub/model-00001-of-00002.safetensors"),
    )
    assert "outside the folder" in said(Checkpoint, shards)
    loop = shards / "loop.safetensors"
    loop.symlink_to(loop)
    edit(shards / "model.safetensors.index.json", lambda v: v["weight_map"].update(a=loop.name))
    said(Checkpoint, shards)


def test_row_13_links_of_the_hub_cache_and_inside_the_folder_are_followed(shards, tmp_path):
    """models--org--name/snapshots/REVISION/file → ../../blobs/HASH is what huggingface_hub writes."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(shards.iterdir())):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert set(Checkpoint(snapshot).tensors) == {"a", "b"}
    link = tmp_path / "alias"
    link.symlink_to(snapshot)
    assert Checkpoint(link).tensor("a").shape == (2, 3)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(repository.parent / "config.json")  # of the cache, but of no blob
    (repository.parent / "config.json").write_text("{}")
    assert "outside the folder" in said(Checkpoint, snapshot)
    shutil.move(shards / "model-00001-of-00002.safetensors", shards / "real")
    (shards / "model-00001-of-00002.safetensors").symlink_to("real")
    assert Checkpoint(shards).tensor("a").shape == (2, 3)


def test_row_13_an_artifact_brings_no_links_and_no_strangers(artifact, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("a secret")
    (artifact / "source" / "LICENSE").symlink_to(secret)
    assert "outside the folder" in refused(artifact, "--format", "gptq", "--out", tmp_path / "out", code=1)
    (artifact / "source" / "LICENSE").unlink()
    (artifact / "source" / "model.safetensors").write_bytes(b"")  # would take the place of the written one
    assert "does not belong there" in refused(artifact, "--format", "gptq", "--out", tmp_path / "out", code=1)
    (artifact / "source" / "model.safetensors").unlink()
    for name in ("../../evil", "/evil", "a\nb", "..", ""):  # output files are named after it
        edit(artifact / "manifest.json", lambda v, name=name: v.update(name=name))
        assert "no file name" in said(Artifact, artifact)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[]", "list"),
        (b" " * (100 * 2**20 + 1), "bytes"),
    ],
)  # fmt: skip
def test_row_14_json_has_limits(shards, text, says):
    (shards / "config.json").write_bytes(text)
    err = said(Checkpoint, shards)
    assert says in err and "config.json" in err


def test_row_14_so_have_safetensors_headers(shards):
    shard = shards / "model-00001-of-00002.safetensors"
    for header in (b'{"a": {}, "a": {}}', b"[" * 100_000, b'{"\xff": 1}'):
        shard.write_bytes(raw_safetensors(header))
        assert shard.name in said(Checkpoint, shards)
    shard.write_bytes(struct.pack("<Q", 100 * 2**20 + 1))
    os.truncate(shard, 200 * 2**20)
    assert "does not fit" in said(Checkpoint, shards)


def test_row_15_hostile_gguf_through_the_commands(tmp_path):
    """`inspect` of each file, and what `verify` calls, in under a second of our own code's time."""
    from vlmq_export.formats.gguf.check import check

    folder = tmp_path / "gguf"
    folder.mkdir()
    call("inspect", tmp_path / "x.gguf")  # imports are no part of the time
    for name, data in HOSTILE.items():
        (folder / "x.gguf").write_bytes(data)
        (folder / "mmproj-x.gguf").write_bytes(GOOD)
        start = time.process_time()
        err = refused("inspect", folder / "x.gguf", code=1)
        (row,) = check(folder, None, None, None)
        assert time.process_time() - start < 1 and "x.gguf" in err, name
        assert row.status == "failed" and "x.gguf" in row.detail, name


def test_row_16_a_quantized_or_adapted_source_is_named(model, tmp_path):
    edit(
        model / "config.json",
        lambda v: v.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    )
    err = refused(model, "--format", "gguf", *RTN, "--out", tmp_path / "out", code=1)
    assert "bitsandbytes" in err
    edit(model / "config.json", lambda v: v.pop("quantization_config"))
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert "adapter" in refused(model, "--format", "gguf", *RTN, "--out", tmp_path / "out", code=1)


def test_row_17_code_in_the_folder_is_never_run(model, tmp_path, monkeypatch):
    """`auto_map` asks transformers to import Python files of the folder."""
    ran = tmp_path / "ran"
    evil = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    for name in ("configuration_x", "modeling_x", "tokenization_x", "image_processing_x"):
        (model / f"{name}.py").write_text(evil + "class X:\n    pass\n")
    edit(
        model / "config.json",
        lambda v: v.update(auto_map={"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}),
    )
    edit(model / "tokenizer_config.json", lambda v: v.update(auto_map={"AutoTokenizer": ["tokenization_x.X", None]}))
    edit(
        model / "preprocessor_config.json", lambda v: v.update(auto_map={"AutoImageProcessor": "image_processing_x.X"})
    )
    code, _, err = call(model, "--format", "gptq", *RTN, "--out", tmp_path / "out")
    assert code == 0, err
    Preprocessor(model)
    assert not ran.exists() and not list((tmp_path / "out").rglob("*.py"))


@pytest.mark.parametrize("architecture", ["AutoModel", "pipeline", "os", "Trainer", "__version__", None, 7])
def test_row_17_the_class_that_config_names_is_a_model_of_transformers(architecture):
    import transformers

    from vlmq_export.quantizer.model import model_class

    assert "names no model class" in said(model_class, transformers, [architecture])
    assert said(model_class, transformers, "Qwen2VLForConditionalGeneration")


def test_row_18_a_tensor_that_the_model_does_not_know_is_named(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.renamed.weight"] = weights["model.layers.0.input_layernorm.weight"].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    err = refused(model, "--format", "gptq", *RTN, "--out", tmp_path / "out", code=1)
    assert "renamed" in err and not (tmp_path / "out" / "gptq").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_hidden_layers", 99, "tensor model.layers.6"),
        ("num_hidden_layers", 2**40, "a number from 1 to 1000"),
        ("num_hidden_layers", None, "None"),
        ("hidden_size", -1, "hidden_size"),
        ("vocab_size", "many", "vocab_size"),
    ],
)
def test_row_19_config_and_weights_disagree(model, tmp_path, key, value, says):
    edit(model / "config.json", lambda v: v["text_config"].update({key: value}))
    assert says in refused(model, "--format", "gguf", *RTN, "--out", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_row_20_what_only_the_proof_needs_is_missed_before_the_work(model, tmp_path, file):
    (model / file).unlink()
    err = refused(model, "--format", "gptq", "--method", "rtn", "--out", tmp_path / "out", code=1)
    assert file in err and not (tmp_path / "out").exists()


def test_row_20_damaged_files_beside_the_weights(model, artifact, tmp_path):
    (model / "generation_config.json").write_text('{"eos_token_id": ')
    err = refused(model, "--format", "gptq", *RTN, "--out", tmp_path / "out", code=1)
    assert "generation_config.json" in err and not (tmp_path / "out").exists()
    settings = {"image_mean": 7, "image_std": None}  # JSON, but no settings: found when they are needed
    (artifact / "source" / "preprocessor_config.json").write_text(json.dumps(settings))
    err = refused(artifact, "--format", "gguf", "--no-verify", "--out", tmp_path / "out", code=1)
    assert "--format gguf cannot be written" in err and not (tmp_path / "out" / "gguf").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda m: edit(m / "config.json", lambda v: v.update(image_token_id=10**6)), "no image token"),
        (lambda m: edit(m / "config.json", lambda v: v.pop("image_token_id")), "no image token"),
        (lambda m: [(m / f"chat_template.{kind}").unlink() for kind in ("json", "jinja")], "chat template"),
        (lambda m: (m / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 7}}'), "tokenizer"),
        (lambda m: edit(m / "preprocessor_config.json", lambda v: v.update(image_processor_type="Nothing")), "image processor"),
        (lambda m: edit(m / "preprocessor_config.json", lambda v: v.update(patch_size="fourteen")), "image processor"),
    ],
)  # fmt: skip
def test_row_20_a_tokenizer_or_processor_that_does_not_fit_the_model(model, damage, says):
    damage(model)
    assert says in said(Preprocessor, model)


@pytest.mark.parametrize("torchvision", [pytest.param("absent", marks=pytest.mark.slow), "broken"])
def test_row_21_torchvision_missing_or_built_for_another_torch(tmp_path, torchvision):
    """Wheels for CUDA beside a CPU build of torch die with this error at import; the image path must not need them."""
    if torchvision == "broken":
        for package in ("torchvision", "torchvision-0.28.0.dist-info"):
            (tmp_path / package).mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')"
        )
        (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
        )
    block = "sys.modules['torchvision'] = None\n" if torchvision == "absent" else ""
    probe = (
        f"import sys\n{block}from vlmq_export import bundled\n"
        "from vlmq_export.errors import VlmqError\n"
        "from vlmq_export.quantizer.calibration import Preprocessor, read_rows\n"
        "try:\n"
        "    p = Preprocessor(bundled.REFERENCE_VLM)\n"
        "    print(p.sample(read_rows(bundled.HELDOUT)[0]).pixel_values.shape[0] > 0)\n"
        "except VlmqError as e: print(e)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if torchvision == "absent":
        assert done.stdout.strip() == "True"
    else:
        assert len(done.stdout.splitlines()) == 1 and "operator torchvision::nms does not exist" in done.stdout


# --- calibration data --------------------------------------------------------------------------------------------------


def test_row_22_every_kind_of_image_is_read_or_refused_with_the_reason(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    rgb = Image.fromarray(pixels)
    sixteen = Image.fromarray((np.arange(600, dtype=np.uint16) * 100).reshape(20, 30))
    kinds = {
        "rgb.png": rgb, "alpha.png": rgb.convert("RGBA"), "palette.png": rgb.quantize(16), "grey.png": rgb.convert("L"),
        "two.png": rgb.convert("1"), "cmyk.jpg": rgb.convert("CMYK"), "sixteen.png": sixteen, "cmyk.tiff": rgb.convert("CMYK"),
        "one.webp": rgb, "one.bmp": rgb, "text.png": b"these are words", "none.png": b"", "half.jpg": None, "vector.eps": rgb,
    }  # fmt: skip
    for name, image in kinds.items():
        if image is None:
            (tmp_path / name).write_bytes(seeds.image("JPEG")[:-200])
        elif isinstance(image, bytes):
            (tmp_path / name).write_bytes(image)
        else:
            image.save(tmp_path / name)
    frames = [rgb, rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name in (*kinds, "moving.gif"):
        if name in ("text.png", "none.png", "half.jpg", "vector.eps"):  # Pillow starts Ghostscript for the last one
            assert f"{name}: cannot be read as an image" in said(load_image, tmp_path / name)
        else:
            loaded = load_image(tmp_path / name)
            assert loaded.mode == "RGB" and loaded.size == (30, 20), name
    grey = np.asarray(load_image(tmp_path / "sixteen.png"))
    assert grey.max() == 59_900 // 256 and grey[0, 3, 0] == 300 // 256  # divided, not clipped


def png_header(width: int, height: int) -> bytes:
    """A valid PNG of any size in some bytes: what a decompression bomb begins with."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")


def test_row_23_bombs_strips_and_specks(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    for size, says in (
        ((30_000, 30_000), "limit"),
        ((2**31 - 1, 1), "limit"),
        ((10_000, 1), "200 times"),
        ((0, 5), "x.png"),
    ):
        file.write_bytes(png_header(*size))
        with warnings.catch_warnings(action="error"):
            assert says in said(load_image, file)
    monkeypatch.setattr(calibration, "MAX_IMAGE_BYTES", 100)
    Image.new("RGB", (100, 100), "red").save(file)
    assert "100 is the limit" in said(load_image, file)
    monkeypatch.undo()
    path = rows_file(tmp_path, llava(image="speck.png"))
    Image.new("RGB", (1, 1), "red").save(tmp_path / "speck.png")
    sample = Preprocessor(bundled.REFERENCE_VLM).sample(read_rows(path)[0])
    assert int(sample.vision.sum()) >= 8


def test_row_24_archives_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as z:
        z.writestr("../../rows.json", "[]")
    with tarfile.open(tmp_path / "rows.json", "w") as t:  # whatever its name says
        t.add(tmp_path / "rows.zip", "/etc/rows.zip")
    for name in ("rows.zip", "rows.json"):
        assert "an archive; unpack it" in said(read_rows, tmp_path / name)
    assert "a folder" in said(read_rows, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.json", "rows.zip"]


@pytest.mark.parametrize(
    "name", ["https://h/x.png", "http://169.254.169.254/", "file:///etc/passwd", "file:x", "data:image/png;base64,AA==", "//h/share/x",
             "\\\\h\\share\\x", "ftp://h/x", "../secret.png", "/etc/hostname", "sub/../../secret.png", "a\0b", "\ud800", "x" * 5000],
)  # fmt: skip
def test_row_25_images_are_files_under_the_root(tmp_path, name):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    path = data / "rows.json"
    path.write_text(json.dumps([llava(image=name)]))
    assert "1 bad rows: row 0: " in said(read_rows, path)


def test_row_25_another_root_is_a_choice(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    path = rows_file(data, llava(image=str(data / "a.png")), llava(image="../data/a.png"), llava())
    assert [r.images[0] for r in read_rows(path)] == [data / "a.png"] * 3
    assert "row" in said(read_rows, path, tmp_path)  # a.png alone is not under this one
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "outside.png")
    assert "not under" in said(read_rows, rows_file(tmp_path, llava(image="../outside.png")), Path())


def test_row_26_every_bad_row_is_listed_with_its_line(tmp_path):
    chat = {"messages": [{"role": "robot", "content": "x"}]}
    path = rows_file(
        tmp_path, llava(), "{not json", "", chat, llava(question="<image>\n", answer=" "), llava(question="<image><image>"),
        llava(answer="x" * (calibration.MAX_TEXT + 1)),
    )  # fmt: skip
    err = said(read_rows, path)
    for part in ("5 bad rows", "line 2: not JSON", "line 4: unknown role 'robot'", "line 5: turn 2 is empty",
                 "line 6: 2 image placeholders for 1 images", "line 7: 262"):  # fmt: skip
        assert part in err


def test_row_26_layouts_that_editors_and_scripts_write(tmp_path):
    """A byte-order mark, CRLF, no newline at the end, U+2028 inside a text, names beyond ASCII, blank lines."""
    Image.new("RGB", (84, 84)).save(tmp_path / "bild ü 图.png")
    rows = [llava(image="bild ü 图.png", answer="eins\u2028zwei"), llava(image="bild ü 图.png", answer="drei\x85vier")]
    text = "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [r.answer for r in read_rows(tmp_path / "rows.jsonl")] == ["eins\u2028zwei", "drei\x85vier"]


def test_row_26_special_tokens_in_a_text_are_no_images(tmp_path):
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    for row in (
        llava(question=f"<image>\n{preprocessor.image_token}?"),
        {"messages": [{"role": "user", "content": preprocessor.image_token}]},
    ):
        with pytest.raises(CalibrationError, match="chat template kept"):
            preprocessor.sample(read_rows(rows_file(tmp_path, row))[0])


def test_row_26_copies_are_said(tmp_path, caplog):
    logging.getLogger("vlmq_export").propagate = True
    with caplog.at_level(logging.WARNING, "vlmq_export"):
        assert len(read_rows(rows_file(tmp_path, llava(id=1), llava(id=2), llava(answer="blue")))) == 3
    assert "1 of 3 rows" in caplog.text


def test_row_26_held_out_images_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "broken.png").write_bytes(seeds.image()[:60])
    path = rows_file(tmp_path, llava(), llava(image="broken.png"))
    err = refused("--format", "gptq", "--method", "rtn", "--verify-data", path, "--out", tmp_path / "out", code=1)
    assert "broken.png" in err and "1 bad images" in err and not (tmp_path / "out").exists()


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
