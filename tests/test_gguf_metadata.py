"""Names, hyperparameters and tokenizer: from the Hugging Face files to the keys that llama.cpp reads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import gguf as gguf_py
import pytest

from tests.artifacts import config_of, edit
from vlmq_export import bundled, formats
from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf import names, read
from vlmq_export.formats.gguf.metadata import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_tokenizer
from vlmq_export.formats.gguf.params import image_params, text_params, vision_params
from vlmq_export.plan import artifact_plan
from vlmq_export.reference import Weights

gguf = formats.get("gguf")
SIZE_TOLERANCE = 0.03  # of the planned size: metadata and padding are estimated


# --- names, parameters, tokenizer -------------------------------------------------------------------------------------


def test_names_are_llama_cpps_own(artifacts, qwen2_vl):
    """gguf-py's map of the same architectures, where it has an entry."""
    for artifact in (artifacts("w4g128"), artifacts("w4g128", qwen2_vl)):
        config = artifact.source_config
        text = gguf_py.get_tensor_name_map(gguf_py.MODEL_ARCH.QWEN2VL, text_params(config).layers)
        vision = gguf_py.get_tensor_name_map(gguf_py.MODEL_ARCH.MMPROJ, vision_params(config).layers)
        for name, hub in names.to_hub(config).items():
            if "qkv" in hub:
                hub = hub.replace("qkv", name.split("attn_")[1][0])
            table = vision if hub.startswith("visual.") else text
            known = table.get_name(hub, try_suffixes=(".weight", ".bias"))
            assert known == name or name in ("v.patch_embd.weight.1", "mm.2.weight", "mm.2.bias"), (hub, known, name)


def test_every_hub_tensor_has_a_place_and_back(artifacts, qwen2_vl):
    for artifact in (artifacts("w4g128"), artifacts("w4g128", qwen2_vl)):
        inverse = names.from_hub(artifact.source_config)
        assert set(inverse) == set(Weights(artifact.path).names())
        assert {n for group in inverse.values() for n in group} == set(names.to_hub(artifact.source_config))
        assert (
            len(inverse["visual.blocks.1.attn.qkv.bias"]) == 3 and len(inverse["visual.patch_embed.proj.weight"]) == 2
        )


def test_parameters_of_nested_and_flat_configs(qwen2_vl):
    nested, flat = config_of(bundled.REFERENCE_VLM), config_of(qwen2_vl)
    p = text_params(nested)
    assert (p.layers, p.hidden, p.kv_heads, p.sections, p.rope_theta, p.tied) == (6, 256, 2, (8, 12, 12), 10000.0, True)
    assert "text_config" not in flat and text_params(flat) == replace(p, layers=2, tied=False)
    old = {k: v for k, v in nested["text_config"].items() if k != "rope_parameters"}
    old |= {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "model_type": "qwen2_5_vl",
    }
    assert text_params(old) == p
    assert vision_params(nested).window_pattern == 2 and vision_params(flat).window_pattern is None
    assert vision_params(flat).feed_forward == 4 * 128


@pytest.mark.parametrize(
    "where, change, said",
    [
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "mrope_section": [8, 12, 12], "rope_theta": 1e4}}, "yarn"),
        ("text_config", {"rope_parameters": {"rope_theta": 1e4}}, "mrope_section is missing"),
        ("text_config", {"rope_parameters": {"mrope_section": [8, 12, 12]}}, "rope_theta is missing"),
        ("text_config", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [16, 24, 24]}}, "half of head_dim"),
        ("text_config", {"use_sliding_window": True}, "use_sliding_window"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("vision_config", {"fullatt_block_indexes": [0, 3]}, "fullatt_block_indexes"),
        ("vision_config", {"fullatt_block_indexes": [1]}, "fullatt_block_indexes"),
        ("vision_config", {"window_size": 224}, "window_size"),
        ("vision_config", {"spatial_merge_size": 4}, "spatial_merge_size"),
        ("vision_config", {"intermediate_size": 128}, "as wide as the tower"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_express_is_refused_in_the_plan(artifacts, where, change, said):
    plan = artifact_plan(artifacts("w4g128"))
    config = {**plan.source_config, where: {**plan.source_config[where], **change}}
    refusals = gguf.plan(replace(plan, source_config=config), FormatOptions()).refusals
    assert len(refusals) == 1 and said in refusals[0] and "\n" not in refusals[0]


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(bundled.REFERENCE_VLM / file, tmp_path / file)
    return tmp_path


def test_tokenizer_as_transformers_has_it(tokenizer_folder):
    from transformers import AutoTokenizer

    config = config_of(bundled.REFERENCE_VLM)
    t, theirs = read_tokenizer(tokenizer_folder, config, 400), AutoTokenizer.from_pretrained(bundled.REFERENCE_VLM)
    assert t.tokens[:384] == theirs.convert_ids_to_tokens(list(range(384)))
    assert t.tokens[384:] == [f"[PAD{i}]" for i in range(384, 400)] and t.types[384:] == [UNUSED] * 16
    assert t.types[:376] == [NORMAL] * 376 and t.types[376:384] == [CONTROL] * 8
    assert (t.eos, t.bos, t.pad, t.add_bos) == (376, 377, 377, False) and len(t.merges) == 120
    assert t.chat_template == theirs.chat_template
    edit(tokenizer_folder / "tokenizer.json", lambda j: j["added_tokens"][-1].update(special=False))
    edit(
        tokenizer_folder / "tokenizer.json",
        lambda j: j["model"].update(merges=[" ".join(m) for m in j["model"]["merges"]]),
    )
    again = read_tokenizer(tokenizer_folder, config, 400)
    assert again.types[383] == USER_DEFINED and again.merges == t.merges


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda j: j["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+|\S+"), "pre-tokenizer"),
        (lambda j: j["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "pre-tokenizer"),
        (lambda j: j["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "pre-tokenizer"),
        (lambda j: j.update(pre_tokenizer=None), "pre-tokenizer"),
        (lambda j: j["model"].update(type="Unigram"), "Qwen2Tokenizer has model Unigram"),
        (lambda j: j["added_tokens"][0].update(id=5000), "beyond the 384 rows"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer_folder, change, said):
    edit(tokenizer_folder / "tokenizer.json", change)
    with pytest.raises(FormatError, match=said):
        read_tokenizer(tokenizer_folder, config_of(bundled.REFERENCE_VLM), 384)


def test_missing_companions_are_named(tokenizer_folder):
    config = config_of(bundled.REFERENCE_VLM)
    edit(tokenizer_folder / "tokenizer_config.json", lambda j: j.update(eos_token=None))
    assert read_tokenizer(tokenizer_folder, config, 384).eos == 376  # config.json still says
    with pytest.raises(FormatError, match="no eos_token"):
        read_tokenizer(tokenizer_folder, {**config, "text_config": {}}, 384)
    (tokenizer_folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        read_tokenizer(tokenizer_folder, config, 384)
    edit(tokenizer_folder / "preprocessor_config.json", lambda j: j.pop("image_std"))
    with pytest.raises(FormatError, match="image_std is missing"):
        image_params(tokenizer_folder)
    (tokenizer_folder / "preprocessor_config.json").unlink()
    with pytest.raises(FormatError, match=r"preprocessor_config\.json is missing"):
        image_params(tokenizer_folder)


def test_metadata_of_the_files(gguf_files):
    artifact, text, mmproj, _ = gguf_files
    meta, vision = read.GGUFFile(text).metadata, read.GGUFFile(mmproj).metadata
    assert (
        meta["general.name"] == "tiny-vlm" and meta["general.size_label"] == "3.6M" and meta["general.file_type"] == 3
    )
    assert meta["vlmq.bits"] == "4" and meta["general.base_model.0.name"] == artifact.manifest.name
    assert vision["general.size_label"] == "1.4M" and vision["general.file_type"] == 1
    assert vision["clip.vision.image_min_pixels"] == 3136 and vision["clip.vision.image_max_pixels"] == 200704
    assert "clip.use_gelu" not in vision
