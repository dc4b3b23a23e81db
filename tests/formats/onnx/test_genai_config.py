"""What onnxruntime-genai is told: from the source's settings, and before the work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.artifacts import architecture_of, edit
from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.errors import CheckpointError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.onnx.genai_config import genai_files
from vlmq_export.quantizer.model.architecture import Architecture


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the bundled model's settings, to be changed."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file in REFERENCE_VLM.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, folder / file.name)
    return folder


def test_genai_gets_image_steps_wherever_the_settings_are(source):
    architecture = architecture_of(source)
    files = genai_files(architecture, source, FormatOptions())
    settings = json.loads((source / "preprocessor_config.json").read_text("utf-8"))
    (source / "preprocessor_config.json").unlink()
    (source / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    again = genai_files(architecture, source, FormatOptions())
    assert files is not None and again is not None
    assert again.steps == files.steps
    name = again.config["model"]["vision"]["config_filename"]
    assert name == "genai_processor_config.json"  # processor_config.json is transformers' own
    (source / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        genai_files(architecture, source, FormatOptions())


def test_genai_gets_the_tokens_that_transformers_loads(source):
    """It reads tokenizer.json alone; tokens that only tokenizer_config.json has are added there."""
    files = genai_files(architecture_of(source), source, FormatOptions())
    assert files is not None and files.tokenizer == ""  # the source's own is right
    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    tokens = {t["id"]: t for t in tokenizer["added_tokens"]}
    edit(source / "tokenizer.json", lambda j: j.update(added_tokens=[]))
    moved = {str(i): {k: v for k, v in t.items() if k != "id"} for i, t in tokens.items()}
    edit(source / "tokenizer_config.json", lambda j: j.update(added_tokens_decoder=moved))
    files = genai_files(architecture_of(source), source, FormatOptions())
    assert files is not None
    saved = {t["id"]: t["content"] for t in json.loads(files.tokenizer)["added_tokens"]}
    assert saved == {i: t["content"] for i, t in tokens.items()} and saved[382] == "<|image_pad|>"


def test_genai_defaults_are_those_of_transformers(source):
    edit(source / "config.json", lambda c: c["vision_config"].pop("tokens_per_second", None))
    edit(source / "config.json", lambda c: c["vision_config"].pop("patch_size"))
    files = genai_files(architecture_of(source), source, FormatOptions())
    assert files is not None
    vision = files.config["model"]["vision"]
    assert (vision["patch_size"], vision["tokens_per_second"]) == (14, 4.0)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("preprocessor_config.json", lambda j: j.update(image_std=None), "image processor"),
        ("preprocessor_config.json", lambda j: j.update(merge_size=None), "merge_size"),
        ("tokenizer.json", lambda j: j["model"].update(vocab=7), "tokenizer"),
    ],
)
def test_what_genai_would_lack_is_refused_in_the_plan(artifacts, source, file, change, said):
    plan = replace(artifact_plan(artifacts("w4g128")), folder=source)
    assert FORMATS["onnx"].plan(plan, FormatOptions()).refusals == []
    edit(source / file, change)
    (found,) = FORMATS["onnx"].plan(plan, FormatOptions()).refusals
    assert said in found and "\n" not in found


def test_a_model_that_would_never_stop_is_refused_in_the_plan(artifacts, source):
    plan = replace(artifact_plan(artifacts("w4g128")), folder=source)
    edit(source / "generation_config.json", lambda j: j.pop("eos_token_id"))
    edit(source / "tokenizer_config.json", lambda j: j.update(eos_token=None))
    config = plan.architecture.config
    silent = {**config, "text_config": {**config["text_config"], "eos_token_id": None}}
    plan = replace(plan, architecture=Architecture.of({**silent, "eos_token_id": None}))
    (found,) = FORMATS["onnx"].plan(plan, FormatOptions()).refusals
    assert "no eos_token" in found or "eos_token_id" in found
