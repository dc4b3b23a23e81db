"""Names, hyperparameters and tokenizer: from a model's files on the hub to the keys of GGUF."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf as gguf_py
import pytest

from tests.artifacts import architecture_of, edit
from vlmq_export import bundled
from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.files.metadata import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    read_tokenizer,
)
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.gguf.tables.params import image_params, text_params, vision_params
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.model.architecture import Architecture

gguf = FORMATS["gguf"]


def test_names_are_llama_cpps_own(artifacts, qwen2_vl):
    """Compares with gguf-py's map of names, which lacks three of the tensors."""
    without_entry = ("v.patch_embd.weight.1", "mm.2.weight", "mm.2.bias")
    for artifact in (artifacts("w4g128"), artifacts("w4g128", qwen2_vl)):
        layout, table_of = Layout.of(artifact.architecture), gguf_py.get_tensor_name_map
        text = table_of(gguf_py.MODEL_ARCH.QWEN2VL, layout.text_params.layers)
        vision = table_of(gguf_py.MODEL_ARCH.MMPROJ, layout.vision_params.layers)
        for name, place in (layout.text | layout.vision).items():
            hub = place.hub
            if "qkv" in hub:
                hub = hub.replace("qkv", name.split("attn_")[1][0])
            table = vision if hub.startswith("visual.") else text
            known = table.get_name(hub, try_suffixes=(".weight", ".bias"))
            assert known == name or name in without_entry, (hub, known, name)


def test_every_hub_tensor_has_a_place_and_back(artifacts, qwen2_vl):
    for artifact in (artifacts("w4g128"), artifacts("w4g128", qwen2_vl)):
        layout = Layout.of(artifact.architecture)
        held = Counter(place.hub for place in (layout.text | layout.vision).values())
        assert held.keys() == layout.held == set(Weights(artifact.path).names())
        assert held["visual.blocks.1.attn.qkv.bias"] == 3  # query, key and value
        assert held["visual.patch_embed.proj.weight"] == 2  # time slices


def test_parameters_of_nested_and_flat_configs(qwen2_vl):
    nested, flat = architecture_of(bundled.REFERENCE_VLM), architecture_of(qwen2_vl)
    p = text_params(nested)
    assert (p.layers, p.hidden, p.kv_heads) == (6, 256, 2)
    assert (p.sections, p.rope_theta, p.tied) == ((8, 12, 12), 10000.0, True)
    assert "text_config" not in flat.config
    assert text_params(flat) == replace(p, layers=2, tied=False)
    # the same model in a config.json of transformers 4: flat, and with other keys for RoPE
    old = {k: v for k, v in nested.text.items() if k != "rope_parameters"}
    old |= {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
    old |= {"tie_word_embeddings": True, "model_type": "qwen2_5_vl"}
    assert text_params(Architecture.of(old)) == p
    assert vision_params(nested).window_pattern == 2 and vision_params(flat).window_pattern is None
    assert vision_params(flat).feed_forward == 4 * 128


def rope(**parameters) -> dict:
    return {"rope_parameters": parameters}


TEXT, VISION = "text_config", "vision_config"


@pytest.mark.parametrize(
    "where, change, said",
    [
        (TEXT, rope(rope_type="yarn", mrope_section=[8, 12, 12], rope_theta=1e4), "yarn"),
        (TEXT, rope(rope_theta=1e4), "mrope_section is missing"),
        (TEXT, rope(mrope_section=[8, 12, 12]), "rope_theta is missing"),
        (TEXT, rope(rope_theta=1e4, mrope_section=[16, 24, 24]), "half of head_dim"),
        (TEXT, {"use_sliding_window": True}, "use_sliding_window"),
        (TEXT, {"hidden_act": "gelu"}, "hidden_act"),
        (VISION, {"fullatt_block_indexes": [0, 3]}, "fullatt_block_indexes"),
        (VISION, {"fullatt_block_indexes": [1]}, "fullatt_block_indexes"),
        (VISION, {"window_size": 224}, "window_size"),
        (VISION, {"spatial_merge_size": 4}, "spatial_merge_size"),
        (VISION, {"intermediate_size": 128}, "as wide as the tower"),
        (VISION, {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_in_the_plan(artifacts, where, change, said):
    plan = artifact_plan(artifacts("w4g128"))
    config = plan.architecture.config
    other = Architecture.of({**config, where: {**config[where], **change}})
    refusals = gguf.plan(replace(plan, architecture=other), FormatOptions()).refusals
    assert len(refusals) == 1 and said in refusals[0] and "\n" not in refusals[0]


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    configs = ("tokenizer_config.json", "preprocessor_config.json")
    for file in ("tokenizer.json", "chat_template.jinja", *configs):
        shutil.copy(bundled.REFERENCE_VLM / file, tmp_path / file)
    return tmp_path


def test_tokenizer_as_transformers_has_it(tokenizer_folder):
    from transformers import AutoTokenizer

    architecture = architecture_of(bundled.REFERENCE_VLM)
    t = read_tokenizer(tokenizer_folder, architecture, 400)
    theirs = AutoTokenizer.from_pretrained(bundled.REFERENCE_VLM)
    assert t.tokens[:384] == theirs.convert_ids_to_tokens(list(range(384)))
    assert t.tokens[384:] == [f"[PAD{i}]" for i in range(384, 400)]
    assert t.types == [NORMAL] * 376 + [CONTROL] * 8 + [UNUSED] * 16
    assert (t.eos, t.bos, t.pad, t.add_bos) == (376, 377, 377, False) and len(t.merges) == 120
    assert t.chat_template == theirs.chat_template

    def change(tokenizer: dict) -> None:
        """One token is no longer special, and merges are written as older files have them."""
        tokenizer["added_tokens"][-1]["special"] = False
        tokenizer["model"]["merges"] = [" ".join(m) for m in tokenizer["model"]["merges"]]

    edit(tokenizer_folder / "tokenizer.json", change)
    again = read_tokenizer(tokenizer_folder, architecture, 400)
    assert again.types[383] == USER_DEFINED and again.merges == t.merges


STEPS = ("pre_tokenizer", "pretokenizers")


@pytest.mark.parametrize(
    "place, change, said",
    [
        ((*STEPS, 0, "pattern"), {"Regex": r"\s+|\S+"}, "pre-tokenizer"),
        ((*STEPS, 0), {"behavior": "Removed"}, "pre-tokenizer"),
        ((*STEPS, 1), {"add_prefix_space": True}, "pre-tokenizer"),
        ((), {"pre_tokenizer": None}, "pre-tokenizer"),
        (("model",), {"type": "Unigram"}, "Qwen2Tokenizer has model Unigram"),
        (("added_tokens", 0), {"id": 5000}, "beyond the 384 rows"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer_folder, place, change, said):
    def apply(tokenizer: dict) -> None:
        part = tokenizer
        for key in place:
            part = part[key]
        part.update(change)

    edit(tokenizer_folder / "tokenizer.json", apply)
    with pytest.raises(FormatError, match=said):
        read_tokenizer(tokenizer_folder, architecture_of(bundled.REFERENCE_VLM), 384)


def test_missing_companions_are_named(tokenizer_folder):
    architecture = architecture_of(bundled.REFERENCE_VLM)
    edit(tokenizer_folder / "tokenizer_config.json", lambda j: j.update(eos_token=None))
    # the stop token is then that of config.json
    assert read_tokenizer(tokenizer_folder, architecture, 384).eos == 376
    silent = Architecture({**architecture.config, "text_config": {}}, architecture.family)
    with pytest.raises(FormatError, match="no eos_token"):
        read_tokenizer(tokenizer_folder, silent, 384)
    (tokenizer_folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        read_tokenizer(tokenizer_folder, architecture, 384)
    edit(tokenizer_folder / "preprocessor_config.json", lambda j: j.pop("image_std"))
    with pytest.raises(FormatError, match="image_std is missing"):
        image_params(tokenizer_folder)
    (tokenizer_folder / "preprocessor_config.json").unlink()
    with pytest.raises(FormatError, match=r"preprocessor_config\.json is missing"):
        image_params(tokenizer_folder)


def test_metadata_of_the_files(gguf_files):
    artifact, text, mmproj, _ = gguf_files
    meta, vision = read.GGUFFile(text).metadata, read.GGUFFile(mmproj).metadata
    assert meta["general.name"] == "tiny-vlm" and meta["general.size_label"] == "3.6M"
    assert meta["general.file_type"] == 3
    assert meta["vlmq.bits"] == "4" and meta["general.base_model.0.name"] == artifact.manifest.name
    assert vision["general.size_label"] == "1.4M" and vision["general.file_type"] == 1
    assert vision["clip.vision.image_min_pixels"] == 3136
    assert vision["clip.vision.image_max_pixels"] == 200704
    assert "clip.use_gelu" not in vision
