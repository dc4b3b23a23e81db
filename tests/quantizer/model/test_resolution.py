"""What a model is: config.json as transformers resolves it, held against the tensors' headers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.artifacts import edit
from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.model.architecture import Architecture, pretrained_config
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import COMPUTED, FAMILIES
from vlmq_export.quantizer.model.streamed import load_model, model_class, refuse_misfit

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny, tmp_path):
    """copy(arch, **options of make_tiny): a checkpoint that a test may change."""

    def get(arch: str, **options) -> Path:
        return Path(shutil.copytree(tiny(arch, **options), tmp_path / "model"))

    return get


def change(folder: Path, edited) -> None:
    """Save other tensors in place of a checkpoint's: those that `edited` leaves in a dict."""
    tensors = load_file(folder / "model.safetensors")
    edited(tensors)
    file = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})


def misfit(folder: Path) -> str:
    """The error of a checkpoint that does not fit, which must be one line that says what to do."""
    with pytest.raises(CheckpointError) as e:
        refuse_misfit(Checkpoint(folder))
    assert "\n" not in str(e.value) and "copy" in str(e.value)
    return str(e.value)


# --- every setting --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_settings_are_those_of_autoconfig(arch, tiny, tmp_path):
    folder = tiny(arch)
    found = Architecture.of(json.loads((folder / "config.json").read_text()))
    auto = transformers.AutoConfig.from_pretrained(folder).to_dict()
    for key in found.config.keys() - {"_name_or_path", "text_config", "vision_config"}:
        assert found.config[key] == auto[key], key
    assert (found.text, found.vision) == (auto["text_config"], auto["vision_config"])


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_a_setting_that_is_left_out_has_the_default_of_its_class(arch, tiny):
    raw = json.loads((tiny(arch) / "config.json").read_text())
    defaults = type(pretrained_config(raw).vision_config)().to_dict()
    keys = (raw["vision_config"].keys() & defaults.keys()) - {"model_type", "architectures"}
    assert "patch_size" in keys and len(keys) >= 6
    for key in keys:
        less = raw | {"vision_config": {k: v for k, v in raw["vision_config"].items() if k != key}}
        assert Architecture.of(less).vision[key] == defaults[key], key


def test_defaults_of_other_keys_than_the_published_ones():
    qwen = {"model_type": "qwen2_5_vl", "text_config": {"num_attention_heads": 16}}
    assert Architecture.of(qwen).vision["tokens_per_second"] == 4
    # The class's own default, and not the number of heads.
    assert Architecture.of(qwen).text["num_key_value_heads"] == 8
    assert Architecture.of({"model_type": "qwen3_vl"}).head_dim == 128
    flat = {"model_type": "qwen2_vl", "hidden_size": 1536, "num_attention_heads": 12}
    assert Architecture.of(flat).head_dim == 128


def test_what_the_author_wrote_stays_as_it_is(tiny, tmp_path):
    folder = tiny("internvl")
    Checkpoint(folder).write_config(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "wide"), ("rope_scaling", 5), ("num_attention_heads", None)],
)
def test_settings_that_transformers_refuses_are_one_line(key, value):
    with pytest.raises(CheckpointError, match=r"config\.json") as e:
        Architecture.of({"model_type": "internvl", "text_config": {key: value}})
    assert "\n" not in str(e.value)


# --- the output matrix ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(FAMILIES))
@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("nested", [None, True, False])
def test_ties_are_those_of_autoconfig(arch, top, nested, tiny, tmp_path):
    raw = json.loads((tiny(arch) / "config.json").read_text())
    raw.pop("tie_word_embeddings", None)
    raw.get("text_config", {}).pop("tie_word_embeddings", None)
    if top is not None:
        raw["tie_word_embeddings"] = top
    if nested is not None:
        raw.setdefault("text_config", {})["tie_word_embeddings"] = nested
    (tmp_path / "config.json").write_text(json.dumps(raw))
    auto = transformers.AutoConfig.from_pretrained(tmp_path)
    assert Architecture.of(raw).tied == auto.tie_word_embeddings


def test_a_tie_by_the_default_of_the_class(copy):
    folder = copy("internvl", tied=True)
    edit(folder / "config.json", lambda c: c.pop("tie_word_embeddings"))
    edit(folder / "config.json", lambda c: c["text_config"].pop("tie_word_embeddings"))
    refuse_misfit(Checkpoint(folder))
    assert Checkpoint(folder).architecture.tied


@pytest.mark.parametrize("arch", ["qwen2_vl", "internvl"])
def test_two_matrices_are_believed_over_config_json(arch, copy, tmp_path):
    folder = copy(arch)  # whose output matrix is its own
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    checkpoint = Checkpoint(folder)
    assert not checkpoint.architecture.tied
    refuse_misfit(checkpoint)
    head = f"{checkpoint.architecture.family.head}.weight"
    assert torch.equal(load_model(checkpoint, CPU).lm_head.weight, checkpoint.tensor(head).float())
    # Readers that believe config.json alone must be told.
    checkpoint.write_config(tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert not Architecture.of(written).tied


def test_two_equal_matrices_are_one(copy):
    folder = copy("internvl", tied=True)
    family = FAMILIES["internvl"]
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    change(folder, lambda t: t.update({head: t[embedding].clone()}))
    checkpoint = Checkpoint(folder)
    refuse_misfit(checkpoint)
    assert checkpoint.architecture.tied and checkpoint.written_config == checkpoint.config
    change(folder, lambda t: t[head][-1].add_(1))  # in the last row alone
    assert not Checkpoint(folder).architecture.tied


def test_a_missing_output_matrix_is_named_with_what_would_mend_it(copy):
    folder = copy("qwen2_vl", tied=True)
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=False))
    said = misfit(folder)
    assert "lm_head.weight is missing" in said and "tie_word_embeddings to true" in said
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    refuse_misfit(Checkpoint(folder))


# --- names and shapes -----------------------------------------------------------------------------


def test_missing_tensors_are_told_from_extra_ones(copy):
    folder = copy("qwen2_vl")
    norm = "model.layers.1.input_layernorm.weight"
    change(folder, lambda t: t.update({"model.layers.1.renamed.weight": t.pop(norm)}))
    said = misfit(folder)
    assert f"tensor {norm} is missing that config.json asks for" in said
    assert "tensor model.layers.1.renamed.weight is not of the model" in said


def test_several_are_counted(copy):
    folder = copy("qwen2_vl")
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=1))
    assert "first model.layers.1." in misfit(folder) and "missing" not in misfit(folder)
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=3))
    assert "first model.layers.2." in misfit(folder) and "not of the model" not in misfit(folder)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "visual.merger.ln_q.weight"])
def test_a_tensor_of_another_shape_is_named(copy, name):
    folder = copy("qwen2_vl")
    change(folder, lambda t: t.update({name: t[name][:-1]}))
    said = misfit(folder)
    assert f"{name} has shape" in said and "config.json asks for" in said


def test_experts_are_refused_by_name(tiny):
    config = json.loads((tiny("internvl") / "config.json").read_text())
    config["text_config"]["model_type"] = "qwen3_moe"
    with pytest.raises(CheckpointError, match=r"qwen3_moe, a mixture of experts, .* a dense model"):
        Architecture.of(config)
    config = json.loads((tiny("mistral3") / "config.json").read_text())
    config["text_config"]["model_type"] = "mistral4"
    with pytest.raises(CheckpointError, match=r"mistral4, a mixture of experts, .* a dense model"):
        Architecture.of(config)


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_the_class_is_that_of_model_type(arch, copy):
    """Some checkpoints name the class without an output matrix, or none at all."""
    folder = copy(arch)
    edit(folder / "config.json", lambda c: c.update(architectures=["Qwen2VLModel"]))
    refuse_misfit(Checkpoint(folder))
    found = model_class(pretrained_config(Checkpoint(folder).config)).__name__
    assert found.endswith("ForConditionalGeneration")


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_buffers_that_the_model_computes_are_skipped(arch, copy):
    folder = copy(arch)
    checkpoint = Checkpoint(folder)
    model = load_model(checkpoint, CPU)
    buffers = [name for name, _ in model.named_buffers()]
    assert buffers and all(name.endswith(COMPUTED) for name in buffers)
    assert not any(name.endswith(COMPUTED) for name, _ in model.named_parameters())
    # Older versions had one in each layer.
    old = [*buffers, f"{checkpoint.architecture.family.layers}0.self_attn.rotary_emb.inv_freq"]
    change(folder, lambda t: t.update({name: torch.zeros(8) for name in old}))
    assert Checkpoint(folder).tensors.keys() == checkpoint.tensors.keys()
    refuse_misfit(Checkpoint(folder))


# --- what quantizers leave ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, {}])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantizers_empty_settings_are_no_quantization(copy, tmp_path, value, part, key):
    folder = copy("internvl")
    before = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", lambda c: (c[part] if part else c).update({key: value}))
    checkpoint = Checkpoint(folder)
    refuse_misfit(checkpoint)
    checkpoint.write_config(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == before


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantizers_settings_are_refused_wherever_they_stand(copy, part):
    folder = copy("internvl")
    settings = {"quantization_config": {"quant_method": "awq"}}
    edit(folder / "config.json", lambda c: (c[part] if part else c).update(settings))
    with pytest.raises(CheckpointError, match=r"already quantized \(awq\)"):
        Checkpoint(folder)
