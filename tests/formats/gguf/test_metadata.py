"""Names, hyperparameters and tokenizer: from a model's files on the hub to the keys of GGUF."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf as gguf_py
import pytest

from tests.artifacts import ROPE_KEYS, architecture_of, edit
from vlmq_export import bundled
from vlmq_export.errors import CheckpointError, FormatError, VlmqError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.files.tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    read_tokenizer,
)
from vlmq_export.formats.gguf.plan import token_notes
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.gguf.tables.params import image_params, text_params, vision_params
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.samples.companions import image_settings

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
        (TEXT, rope(rope_type="yarn", factor=4.0, mrope_section=[8, 12, 12]), "yarn"),
        (TEXT, rope(rope_theta=1e4), "mrope_section is missing"),
        # transformers takes rope_scaling where both are there.
        (TEXT, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        (TEXT, {"layer_types": [*["full_attention"] * 5, "sliding_attention"]}, "sliding"),
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


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope", "llama3"])
@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_scaled_rotary_positions_are_refused(tiny, arch, kind):
    """llama.cpp would load such a file, and compute the unscaled positions.

    InternVL3 is published with type dynamic, which scales beyond the model's context alone.
    """
    config = json.loads((tiny(arch) / "config.json").read_text("utf-8"))
    text = config.get("text_config", config)
    text["rope_scaling"] = {"type": kind, "mrope_section": [8, 12, 12], **ROPE_KEYS[kind]}
    if kind == "dynamic" and arch in ("llava_onevision", "internvl"):
        assert text_params(Architecture.of(config)).rope_theta == 1e6
        return
    with pytest.raises(FormatError, match=f"rope type {kind}"):
        text_params(Architecture.of(config))


def test_a_base_that_is_not_stated_is_that_of_transformers(tiny):
    config = json.loads((tiny("internvl") / "config.json").read_text("utf-8"))
    del config["text_config"]["rope_theta"]
    config["text_config"].pop("rope_scaling", None)
    assert text_params(Architecture.of(config)).rope_theta == 10000.0
    assert "rope_parameters" not in config["text_config"]  # config.json itself is left alone


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
    named = "additional_special_tokens"  # those are special whatever tokenizer.json says
    edit(tokenizer_folder / "tokenizer_config.json", lambda j: j[named].remove("<|video_pad|>"))
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
        (("model",), {"type": "Unigram"}, "cannot read its tokenizer"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer_folder, place, change, said):
    def apply(tokenizer: dict) -> None:
        part = tokenizer
        for key in place:
            part = part[key]
        part.update(change)

    edit(tokenizer_folder / "tokenizer.json", apply)
    with pytest.raises(VlmqError, match=said):
        read_tokenizer(tokenizer_folder, architecture_of(bundled.REFERENCE_VLM), 384)


@pytest.mark.parametrize(("arch", "pre"), [("mistral3", "pixtral"), ("ministral3", "tekken")])
def test_the_pre_tokenizers_of_mistral(arch, pre, tiny, tmp_path):
    """llama.cpp leaves words whole that are tokens. Here merges lead to every token."""
    folder = shutil.copytree(tiny(arch), tmp_path / "model")
    architecture = architecture_of(folder)
    tokenizer = read_tokenizer(folder, architecture, 448)
    assert (tokenizer.pre, tokenizer.model) == (pre, "gpt2")
    assert [n for n in token_notes(tokenizer) if "Hindi" in n] == token_notes(tokenizer)
    assert bool(token_notes(tokenizer)) == (pre == "tekken")
    edit(folder / "tokenizer.json", lambda t: t["model"]["merges"].pop())
    with pytest.raises(FormatError, match=f"no merges lead to the token .* pre-tokenizer {pre}"):
        read_tokenizer(folder, architecture, 448)
    edit(folder / "tokenizer.json", lambda t: t["model"].update(ignore_merges=True))
    assert read_tokenizer(folder, architecture, 448).tokens == tokenizer.tokens


def test_missing_companions_are_named(tokenizer_folder):
    architecture = architecture_of(bundled.REFERENCE_VLM)
    with pytest.raises(FormatError, match="383 is beyond the 300 rows"):
        read_tokenizer(tokenizer_folder, architecture, 300)
    edit(tokenizer_folder / "tokenizer_config.json", lambda j: j.update(eos_token=None))
    # the stop token is then that of config.json
    assert read_tokenizer(tokenizer_folder, architecture, 384).eos == 376
    silent = replace(architecture, config={**architecture.config, "text_config": {}})
    with pytest.raises(FormatError, match="no eos_token"):
        read_tokenizer(tokenizer_folder, silent, 384)
    (tokenizer_folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        read_tokenizer(tokenizer_folder, architecture, 384)
    edit(tokenizer_folder / "preprocessor_config.json", lambda j: j.update(image_std=None))
    with pytest.raises(CheckpointError, match="settings of its image processor"):
        image_params(tokenizer_folder)
    (tokenizer_folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        image_params(tokenizer_folder)


def test_tokens_that_only_tokenizer_config_has(tokenizer_folder):
    """transformers 4 saved added tokens in tokenizer_config.json too, some tools only there."""
    whole = read_tokenizer(tokenizer_folder, architecture_of(bundled.REFERENCE_VLM), 384)
    moved: dict[str, dict] = {}

    def take(tokenizer: dict) -> None:
        for token in tokenizer["added_tokens"]:
            number = token.pop("id")
            moved[str(number)] = dict(token)
        tokenizer["added_tokens"] = []

    edit(tokenizer_folder / "tokenizer.json", take)
    edit(tokenizer_folder / "tokenizer_config.json", lambda j: j.update(added_tokens_decoder=moved))
    assert read_tokenizer(tokenizer_folder, architecture_of(bundled.REFERENCE_VLM), 384) == whole
    assert whole.tokens[382] == "<|image_pad|>"


def test_a_tokenizer_of_two_files(tokenizer_folder):
    """Without tokenizer.json, transformers takes vocab.json, merges.txt and added_tokens.json."""
    architecture = architecture_of(bundled.REFERENCE_VLM)
    whole = read_tokenizer(tokenizer_folder, architecture, 384)
    saved = json.loads((tokenizer_folder / "tokenizer.json").read_text("utf-8"))
    (tokenizer_folder / "tokenizer.json").unlink()
    vocabulary, merges = saved["model"]["vocab"], saved["model"]["merges"]
    (tokenizer_folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (tokenizer_folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    added = {t["content"]: t["id"] for t in saved["added_tokens"]}
    (tokenizer_folder / "added_tokens.json").write_text(json.dumps(added), "utf-8")
    again = read_tokenizer(tokenizer_folder, architecture, 384)
    assert (again.tokens, again.merges, again.eos) == (whole.tokens, whole.merges, whole.eos)


def test_image_settings_wherever_transformers_saves_them(tokenizer_folder):
    """transformers 4: preprocessor_config.json. transformers 5: inside processor_config.json."""
    old = image_params(tokenizer_folder)
    assert (old.min_pixels, old.max_pixels) == (3136, 200704)
    file = tokenizer_folder / "preprocessor_config.json"
    settings = json.loads(file.read_text("utf-8"))
    file.unlink()
    nested = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": settings}
    (tokenizer_folder / "processor_config.json").write_text(json.dumps(nested))
    assert image_params(tokenizer_folder) == old
    # What is not stated is transformers' default, and not one of ours.
    edit(
        tokenizer_folder / "processor_config.json",
        lambda j: [j["image_processor"].pop(k) for k in ("image_std", "min_pixels", "max_pixels")],
    )
    default = image_params(tokenizer_folder)
    assert default.std == old.std and (default.min_pixels, default.max_pixels) == (3136, 1003520)


def test_another_factor_than_255_is_in_mean_and_deviation(tokenizer_folder):
    edit(
        tokenizer_folder / "preprocessor_config.json", lambda j: j.update(rescale_factor=1 / 127.5)
    )
    p, s = image_params(tokenizer_folder), image_settings(tokenizer_folder)
    for value in (0.0, 1.0, 200.0, 255.0):
        want = (value * s.rescale - s.mean[1]) / s.std[1]
        assert (value / 255 - p.mean[1]) / p.std[1] == pytest.approx(want, rel=1e-12)


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
