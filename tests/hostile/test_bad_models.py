"""Bad inputs and faults: numbers and the source folder. test_bad_inputs.py explains the rows."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.artifacts import edit
from tests.formats.gguf.test_hostile import GOOD, HOSTILE
from tests.hostile.attacks.cases import RTN, f32, raw_safetensors, rows_file, said
from tests.vlmq_export.test_cli import call, refused
from vlmq_export.callbacks import Callbacks
from vlmq_export.errors import CheckpointError
from vlmq_export.formats.gguf.proof.check import check
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.model.architecture import pretrained_config
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import model_class
from vlmq_export.quantizer.run.refusals import refuse_many_lost
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.hessian import prepare
from vlmq_export.recipes.recipe_file import load_recipe
from vlmq_export.sources.calibration import CalibrationRows, calibration_samples

# Files of the fixture `shards`.
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

# --- weights and numbers --------------------------------------------------------------------------


def test_row_01_nan_in_the_source_is_named_and_nothing_is_exported(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights["visual.merger.mlp.0.weight"][3, :5] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    err = refused(model, "--format", "gptq", *RTN, "--out", tmp_path / "out", code=1)
    assert "visual.merger.mlp.0.weight has 5 NaN" in err
    assert not (tmp_path / "out" / "gptq").exists()
    assert not (tmp_path / "out" / "artifact" / "manifest.json").exists()


def test_row_02_a_few_bad_samples_are_left_out_and_many_stop_the_run():
    refuse_many_lost(0, 8)
    refuse_many_lost(2, 8)
    assert "3 of 8 samples" in said(refuse_many_lost, 3, 8)


def test_row_03_activations_that_overflow_float16_and_float32():
    """Squares of 1e4 are too large for float16, those of 1e30 for float32 too.

    The second Hessian is hopeless, and the linear is rounded to nearest.
    """
    weights = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for scale, hopeless in ((1e4, False), (1e30, True)):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * scale
        sums = Statistics.empty(16, drift=False)
        sums.add(x.half() if scale < 1e5 else x)
        hessian = prepare(sums.hessian, sums.diagonal, group=16, act_order="off", damp=0.01)
        assert hessian.fallback == hopeless
        solved = solve(weights, hessian, Affine(4), group=16, act_order="off", block=16)
        assert bool(torch.isfinite(solved.decode()).all())


def test_row_05_calibration_without_images_warns(tmp_path, caplog, model):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    path = rows_file(tmp_path, {"messages": chat})
    recipe = load_recipe(None, {"calibration": path, "samples": 1})
    with caplog.at_level(logging.WARNING, "vlmq_export"):
        logging.getLogger("vlmq_export").propagate = True
        calibration_samples(CalibrationRows(recipe), Checkpoint(model), Callbacks())
    assert "text alone" in caplog.text


# --- the source folder ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12), "overlaps"),
        ({"a": f32(0, 8), "b": f32(12, 20)}, bytes(20), "gap"),
        ({"a": f32(4, 8)}, bytes(8), "gap"),
        ({"a": f32(0, 8)}, bytes(12), "truncated or damaged"),
        ({"a": f32(0, 8) | {"shape": [2**40, 2**40]}}, bytes(8), "bytes for shape"),
        ({"a": f32(0, 8) | {"shape": [-2]}}, bytes(8), "shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "None"),
    ],
)
def test_row_11_a_header_that_does_not_fit_its_data(shards, header, data, says):
    (shards / FIRST).write_bytes(raw_safetensors(header, data))
    err = said(Checkpoint, shards)
    assert says in err and FIRST in err


def test_row_12_every_problem_of_the_shards_is_listed_at_once(shards):
    # the second shard now has the tensor of the first one, and no longer its own
    save_file({"a": torch.zeros(1)}, shards / SECOND)
    more = {"c": "gone.safetensors", "d": "../out"}
    edit(shards / INDEX, lambda v: v["weight_map"].update(more))
    err = said(Checkpoint, shards)
    assert "tensor a is in both" in err
    assert "gone.safetensors is missing" in err and "../out is outside the folder" in err


def test_row_12_index_and_shards_have_the_same_tensors(shards):
    save_file({"b": torch.zeros(4), "extra": torch.zeros(1)}, shards / SECOND)
    assert "not in the index, first extra" in said(Checkpoint, shards)


def test_row_12_a_shard_that_nobody_names_is_left_and_said(shards, caplog):
    save_file({"z": torch.zeros(1)}, shards / "consolidated.safetensors")
    logging.getLogger("vlmq_export").propagate = True
    with caplog.at_level(logging.WARNING, "vlmq_export"):
        assert "z" not in Checkpoint(shards).tensors
    assert "consolidated.safetensors" in caplog.text
    # transformers would read this file in place of the shards
    save_file({"z": torch.zeros(1)}, shards / "model.safetensors")
    assert "both here" in said(Checkpoint, shards)


def test_row_13_links_out_of_the_folder_are_refused(shards, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (FIRST, "config.json", "LICENSE"):
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
    edit(shards / INDEX, lambda v: v["weight_map"].update(a=f"sub/{FIRST}"))
    assert "outside the folder" in said(Checkpoint, shards)
    loop = shards / "loop.safetensors"
    loop.symlink_to(loop)
    edit(shards / INDEX, lambda v: v["weight_map"].update(a=loop.name))
    said(Checkpoint, shards)


def test_row_13_links_of_the_hub_cache_and_inside_the_folder_are_followed(shards, tmp_path):
    """huggingface_hub links models--org--name/snapshots/REVISION/file to ../../blobs/HASH."""
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
    # a link into the cache, but not to a blob
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(repository.parent / "config.json")
    (repository.parent / "config.json").write_text("{}")
    assert "outside the folder" in said(Checkpoint, snapshot)
    shutil.move(shards / FIRST, shards / "real")
    (shards / FIRST).symlink_to("real")
    assert Checkpoint(shards).tensor("a").shape == (2, 3)


def test_row_13_an_artifact_brings_no_links_and_no_strangers(artifact, tmp_path):
    source, secret = artifact / "source", tmp_path / "id_rsa"
    export = (artifact, "--format", "gptq", "--out", tmp_path / "out")
    secret.write_text("a secret")
    (source / "LICENSE").symlink_to(secret)
    assert "outside the folder" in refused(*export, code=1)
    (source / "LICENSE").unlink()
    # this file would replace the one that is written
    (source / "model.safetensors").write_bytes(b"")
    assert "does not belong there" in refused(*export, code=1)
    (source / "model.safetensors").unlink()
    # output files have the name of the model
    for name in ("../../evil", "/evil", "a\nb", "..", ""):
        edit(artifact / "manifest.json", lambda v, name=name: v.update(name=name))
        assert "no file name" in said(Artifact, artifact)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", ["<x>", None, True, [0.1], 10**400])
def test_row_13_errors_in_a_manifest_that_are_no_numbers(artifact, error):
    """The report draws them as bars."""
    edit(
        artifact / "manifest.json",
        lambda v: v["modules"][0]["metrics"].update(relative_error=error),
    )
    assert "errors that are no numbers" in said(Artifact, artifact)


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
)
def test_row_14_json_has_limits(shards, text, says):
    (shards / "config.json").write_bytes(text)
    err = said(Checkpoint, shards)
    assert says in err and "config.json" in err


def test_row_14_so_have_safetensors_headers(shards):
    shard = shards / FIRST
    for header in (b'{"a": {}, "a": {}}', b"[" * 100_000, b'{"\xff": 1}'):
        shard.write_bytes(raw_safetensors(header))
        assert shard.name in said(Checkpoint, shards)
    shard.write_bytes(struct.pack("<Q", 100 * 2**20 + 1))
    os.truncate(shard, 200 * 2**20)
    assert "does not fit" in said(Checkpoint, shards)


def test_row_15_hostile_gguf_through_the_commands(tmp_path):
    """`inspect` and the check of `verify` together take less than a second of processor time."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    call("inspect", tmp_path / "x.gguf")  # so that modules are imported before the time is taken
    for name, data in HOSTILE.items():
        (folder / "x.gguf").write_bytes(data)
        (folder / "mmproj-x.gguf").write_bytes(GOOD)
        start = time.process_time()
        err = refused("inspect", folder / "x.gguf", code=1)
        (row,) = check(folder, None, None, None)
        assert time.process_time() - start < 1 and "x.gguf" in err, name
        assert row.status == "failed" and "x.gguf" in row.detail, name


def test_row_16_a_quantized_or_adapted_source_is_named(model, tmp_path):
    export = (model, "--format", "gguf", *RTN, "--out", tmp_path / "out")
    scheme = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(model / "config.json", lambda v: v.update(quantization_config=scheme))
    assert "bitsandbytes" in refused(*export, code=1)
    edit(model / "config.json", lambda v: v.pop("quantization_config"))
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert "adapter" in refused(*export, code=1)


def test_row_17_code_in_the_folder_is_never_run(model, tmp_path, monkeypatch):
    """`auto_map` asks transformers to import Python files of the folder."""
    ran = tmp_path / "ran"
    evil = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    for name in ("configuration_x", "modeling_x", "tokenization_x", "image_processing_x"):
        (model / f"{name}.py").write_text(evil + "class X:\n    pass\n")
    maps = {
        "config.json": {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_x.X", None]},
        "preprocessor_config.json": {"AutoImageProcessor": "image_processing_x.X"},
    }
    for file, auto_map in maps.items():
        edit(model / file, lambda v, auto_map=auto_map: v.update(auto_map=auto_map))
    code, _, err = call(model, "--format", "gptq", *RTN, "--out", tmp_path / "out")
    assert code == 0, err
    Preprocessor(model)
    assert not ran.exists() and not list((tmp_path / "out").rglob("*.py"))


@pytest.mark.parametrize(
    "architecture", ["AutoModel", "pipeline", "os", "Trainer", "__version__", None, 7]
)
def test_row_17_the_class_that_config_names_is_never_looked_up(model, architecture):
    edit(model / "config.json", lambda v: v.update(architectures=[architecture]))
    try:
        config = pretrained_config(Checkpoint(model).config)
    except CheckpointError as e:
        assert "architectures" in str(e) and "\n" not in str(e)
    else:
        assert model_class(config) is transformers.Qwen2_5_VLForConditionalGeneration


def test_row_18_a_tensor_that_the_model_does_not_know_is_named(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    norm = weights["model.layers.0.input_layernorm.weight"]
    weights["model.layers.0.mlp.renamed.weight"] = norm.clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    err = refused(model, "--format", "gptq", *RTN, "--out", tmp_path / "out", code=1)
    assert "renamed" in err and not (tmp_path / "out" / "gptq").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_hidden_layers", 99, "`num_hidden_layers` (99)"),
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
    # valid JSON of the wrong kind: found by the plan, which reads what the writer will need
    settings = {"image_mean": 7, "image_std": None}
    (artifact / "source" / "preprocessor_config.json").write_text(json.dumps(settings))
    err = refused(artifact, "--format", "gguf", "--no-verify", "--out", tmp_path / "out", code=2)
    assert "settings of its image processor" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", lambda v: v.update(image_token_id=10**6), "no image token"),
        ("config.json", lambda v: v.pop("image_token_id"), "no image token"),
        ("preprocessor_config.json", lambda v: v.update(patch_size="fourteen"), "image processor"),
        (
            "preprocessor_config.json",
            lambda v: v.update(image_processor_type="Nothing"),
            "image processor",
        ),
    ],
)
def test_row_20_a_processor_that_does_not_fit_the_model(model, file, change, says):
    edit(model / file, change)
    assert says in said(Preprocessor, model)


def test_row_20_a_missing_chat_template(model):
    for kind in ("json", "jinja"):
        (model / f"chat_template.{kind}").unlink()
    assert "chat template" in said(Preprocessor, model)


def test_row_20_a_tokenizer_that_cannot_be_loaded(model):
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 7}}')
    assert "tokenizer" in said(Preprocessor, model)


@pytest.mark.parametrize("torchvision", [pytest.param("absent", marks=pytest.mark.slow), "broken"])
def test_row_21_torchvision_missing_or_built_for_another_torch(tmp_path, torchvision):
    """Images must be read without torchvision, and an import of it that fails is one line.

    A torchvision built for CUDA fails with this error beside a torch for the CPU.
    """
    failure = "operator torchvision::nms does not exist"
    if torchvision == "broken":
        package, info = tmp_path / "torchvision", tmp_path / "torchvision-0.28.0.dist-info"
        package.mkdir()
        info.mkdir()
        (package / "__init__.py").write_text(f"raise RuntimeError({failure!r})")
        metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
        (info / "METADATA").write_text(metadata)
    block = "sys.modules['torchvision'] = None\n" if torchvision == "absent" else ""
    probe = (
        f"import sys\n{block}from vlmq_export import bundled\n"
        "from vlmq_export.errors import VlmqError\n"
        "from vlmq_export.quantizer.samples.preprocessor import Preprocessor\n"
        "from vlmq_export.quantizer.samples.rows import read_rows\n"
        "try:\n"
        "    p = Preprocessor(bundled.REFERENCE_VLM)\n"
        "    print(p.sample(read_rows(bundled.HELDOUT)[0]).pixel_values.shape[0] > 0)\n"
        "except VlmqError as e: print(e)\n"
    )
    command, environment = [sys.executable, "-c", probe], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if torchvision == "absent":
        assert done.stdout.strip() == "True"
    else:
        assert len(done.stdout.splitlines()) == 1 and failure in done.stdout
