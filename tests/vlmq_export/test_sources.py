"""What MODEL may be: each thing that is no model is refused with the next step to take."""

import json

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.artifacts import edit
from tests.vlmq_export.test_cli import refused
from vlmq_export import Recipe, plan
from vlmq_export.errors import CheckpointError
from vlmq_export.sources.locate import open_source


def said(model: object) -> str:
    """The refusal of the dry run, which must be one line and leave nothing behind."""
    return refused(model, "--format", "gguf", "--dry-run", code=1)


@pytest.mark.parametrize(
    ("model_type", "instead"), [("internvl_chat", "ends in -hf"), ("llava_qwen", "llava-hf/")]
)
def test_the_layout_of_the_authors_names_the_repository_for_transformers(
    model, model_type, instead
):
    edit(model / "config.json", lambda c: c.update(model_type=model_type))
    assert model_type in said(model) and instead in said(model)


def test_an_adapter_names_the_model_to_merge_it_into(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/X"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter" in said(tmp_path) and "of Qwen/X; merge it first" in said(tmp_path)


def test_gguf_is_no_way_back(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for given in (file, tmp_path):
        assert "give the float model" in said(given)


def test_a_file_of_a_model_names_its_folder(model):
    assert f"give {model}" in said(model / "model.safetensors").replace("\n", "")


@pytest.mark.parametrize("below", ["snapshots/abc", "checkpoint"])
def test_a_folder_above_the_model_names_the_one_below(tmp_path, below):
    folder = tmp_path / "models--a--b" / below
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert f"give {folder}" in said(tmp_path / "models--a--b")


def test_a_slip_of_the_pen_is_guessed(model, monkeypatch):
    assert f"did you mean {model}?" in said(model.parent / "modle")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(model.parent.parent)
    assert "did you mean" in said(f"{model.parent.name}/modl")  # which might be a hub id


def test_an_address_of_the_hub_is_told_from_its_id():
    err = said("https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct/tree/main")
    assert "given as Qwen/Qwen2-VL-2B-Instruct" in err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_to_be_saved_anew(model, name):
    (model / "model.safetensors").rename(model / name)
    assert "pickled" in said(model) and "save_pretrained" in said(model)


def test_shards_without_their_index_are_named(model):
    shard = "model-00001-of-00002.safetensors"
    (model / "model.safetensors").rename(model / shard)
    assert shard in said(model) and "copy the index" in said(model)


def test_a_tensor_of_another_shape_is_refused_before_anything_is_written(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-32].contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} has shape" in said(model)
    out = tmp_path / "out"
    flags = ("--format", "gguf", "--method", "rtn", "--no-verify", "--out", out)
    assert f"{name} has shape" in refused(model, *flags, code=1) and not out.exists()


def test_a_missing_output_matrix_is_refused_before_anything_is_written(model):
    edit(model / "config.json", lambda c: c.update(tie_word_embeddings=False))
    edit(model / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=False))
    assert "lm_head.weight is missing" in said(model)


def test_settings_that_were_left_out_do_not_change_the_plan(tiny, tmp_path):
    """Keys at the default of their class are often left out."""
    for file in tiny("internvl").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = plan(Recipe(model=str(tmp_path), format=["gguf", "onnx", "gptq"]))
    defaults = {"downsample_ratio", "projector_hidden_act", "vision_feature_layer"}
    edit(tmp_path / "config.json", lambda c: [c.pop(key) for key in defaults])
    raw = json.loads((tmp_path / "config.json").read_text())
    plain = ("layer_norm_eps", "hidden_act", "norm_type", "num_channels", "use_qk_norm")
    raw["vision_config"] = {k: v for k, v in raw["vision_config"].items() if k not in plain}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    after = plan(Recipe(model=str(tmp_path), format=["gguf", "onnx", "gptq"]))
    assert not after.refusals and after.formats == before.formats
    assert after.memory is not None and before.memory is not None
    assert after.memory.parts == before.memory.parts


def test_a_model_of_a_family_that_is_not_known_is_refused_by_the_source(model):
    edit(model / "config.json", lambda c: c.update(model_type="llama"))
    with pytest.raises(CheckpointError, match="model_type llama"):
        open_source(str(model)).plan(Recipe(format=["gguf"]))
