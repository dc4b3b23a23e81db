"""GGUF files of whole models: three readers find the artifact's weights, completeness sees every dropped item.

Both families, nested and flat configs, tied and untied output, on small checkpoints; llama.cpp's own checks of the
same files are in formats/gguf/check.py and its tests.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.artifacts import rtn_artifact
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import bundled, formats
from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions, LinearSpec, ModelPlan, TensorSpec
from vlmq_export.formats.gguf import names, read
from vlmq_export.formats.gguf.complete import complete
from vlmq_export.formats.gguf.container import ARRAY
from vlmq_export.formats.gguf.metadata import CONTROL, NORMAL, UNUSED, USER_DEFINED, file_stem, read_tokenizer
from vlmq_export.formats.gguf.mmproj import write_mmproj
from vlmq_export.formats.gguf.params import image_params, text_params, vision_params
from vlmq_export.formats.gguf.text import write_text
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.plan import artifact_plan
from vlmq_export.quantizer.artifact import (
    Artifact,
)
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.reference import Weights

gguf = formats.get("gguf")
ROOT = Path(__file__).resolve().parents[1]
SIZE_TOLERANCE = 0.03  # of the planned size: metadata and padding are estimated


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory) -> Path:
    """A random Qwen2-VL checkpoint: flat config.json, output matrix of its own."""
    return make_random_checkpoint(tmp_path_factory.mktemp("qwen2_vl"), "qwen2_vl", layers=2, depth=3, tied=False)


GRIDS = {
    "w4g128": QuantConfig(bits=4, group_size=128),
    "w4g256": QuantConfig(bits=4, group_size=256),
    "w4-sym": QuantConfig(bits=4, group_size=128, symmetric=True),
    "w3g128": QuantConfig(bits=3, group_size=128),
    "w3-sym": QuantConfig(bits=3, group_size=-1, symmetric=True),
    "w2g128": QuantConfig(bits=2, group_size=128),
    "w2": QuantConfig(bits=2, group_size=-1),
    "w8g128-sym": QuantConfig(bits=8, group_size=128, symmetric=True),
}
BITS = {
    "w4g128": 5.0,
    "w4g256": 4.5,
    "w4-sym": 4.5,
    "w3g128": 4.5,
    "w3-sym": 3.4375,
    "w2g128": 4.5,
    "w2": 2.625,
    "w8g128-sym": 8.5,
}


WRITTEN = {"w2": 2.0625}  # every zero-point of this artifact is 1 or 2, which only the integers can tell


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory, qwen2_vl):
    made: dict[str, Artifact] = {}

    def get(tag: str, source: Path = bundled.REFERENCE_VLM) -> Artifact:
        key = f"{tag}-{source.name}"
        if key not in made:
            made[key] = rtn_artifact(tmp_path_factory.mktemp(key), GRIDS[tag], source)
        return made[key]

    return get


@pytest.fixture(scope="session")
def exported(artifacts, tmp_path_factory):
    """(artifact, text, mmproj, twin) of the bundled model at 4 bits; tests copy before they damage."""
    artifact, folder = artifacts("w4g128"), tmp_path_factory.mktemp("gguf")
    gguf.write(artifact, folder, FormatOptions(name="tiny-vlm"))
    twin = tmp_path_factory.mktemp("twin") / "twin.gguf"
    write_text(artifact, twin, FormatOptions(name="tiny-vlm"), twin=True)
    return artifact, *read.find_files(folder), twin


READERS = (read.decode_ours, read.decode_gguf_py, read.decode_libggml)


def assert_text(path: Path, artifact: Artifact, reader) -> None:
    weights, hub, seen = Weights(artifact.path), names.text_to_hub(artifact.source_config), set()
    for name, array in reader(path):
        assert array.dtype == np.float32 and np.array_equal(array, weights.array(hub[name])), name
        seen.add(hub[name])
    assert seen == {n for n in weights.names() if not n.startswith("visual.")}


def assert_vision(path: Path, artifact: Artifact, reader, dtype: str) -> None:
    got = dict(reader(path))
    expected = dict(names.expected_mmproj(Weights(artifact.path), artifact.source_config, dtype))
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert np.array_equal(got[name], array), name


# --- whole files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", GRIDS)
def test_three_readers_find_the_artifacts_weights(tag, artifacts, tmp_path):
    artifact = artifacts(tag)
    plan = gguf.plan(artifact_plan(artifact), FormatOptions(name="tiny-vlm"))
    assert not plan.refusals and plan.bits_per_weight == BITS[tag]
    notes = gguf.write(artifact, tmp_path, FormatOptions(name="tiny-vlm"))
    text, mmproj = read.find_files(tmp_path)
    for reader in READERS:
        assert_text(text, artifact, reader)
        assert_vision(mmproj, artifact, reader, "f16")
    seen, size = gguf.inspect(text), text.stat().st_size + mmproj.stat().st_size
    assert seen.bits_per_weight == WRITTEN.get(tag, plan.bits_per_weight)
    if tag not in WRITTEN:
        assert abs(plan.size_bytes - size) < SIZE_TOLERANCE * size
    assert notes[0].startswith("GGUF block types: 42 linears")


def test_a_flat_config_and_an_output_matrix_of_its_own(artifacts, qwen2_vl, tmp_path):
    artifact = artifacts("w4g128", qwen2_vl)
    assert not text_params(artifact.source_config).tied and "lm_head.weight" in artifact.float_names()
    gguf.write(artifact, tmp_path, FormatOptions(name="tiny-vlm", mmproj_dtype="f32"))
    text, mmproj = read.find_files(tmp_path)
    assert mmproj.name.endswith("-F32.gguf")
    for reader in READERS:
        assert_text(text, artifact, reader)
        assert_vision(mmproj, artifact, reader, "f32")
    assert read.GGUFFile(text).tensors["output.weight"].type == "BF16"
    assert read.GGUFFile(mmproj).metadata["clip.projector_type"] == "qwen2vl_merger"


def test_the_twin_is_the_same_file_in_float32(exported):
    artifact, text, _, twin = exported
    assert_text(twin, artifact, read.decode_ours)
    one, other = read.GGUFFile(text), read.GGUFFile(twin)
    assert {t.type for t in other.tensors.values()} == {"F32"}
    assert {n: t.shape for n, t in one.tensors.items()} == {n: t.shape for n, t in other.tensors.items()}
    differing = {k for k in one.metadata if one.metadata[k] != other.metadata.get(k)}
    assert differing == {"general.file_type"} and set(one.metadata) == set(other.metadata)


def test_a_wrong_scale_by_one_ulp_is_seen_by_every_reader(exported, tmp_path):
    """The readers decode the file, not the artifact: one bit of one scale must show."""
    artifact, text, _, _ = exported
    at = read.GGUFFile(text).tensors["blk.3.ffn_down.weight"].offset
    raw = bytearray(text.read_bytes())
    raw[at] ^= 1
    path = tmp_path / text.name
    path.write_bytes(raw)
    for reader in READERS:
        with pytest.raises(AssertionError, match=r"blk\.3\.ffn_down"):
            assert_text(path, artifact, reader)


def test_the_same_artifact_gives_the_same_bytes(exported, tmp_path):
    artifact, text, mmproj, _ = exported
    gguf.write(artifact, tmp_path, FormatOptions(name="tiny-vlm"))
    for file in (text, mmproj):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_names_of_files(exported):
    _, text, mmproj, _ = exported
    assert (text.name, mmproj.name) == ("tiny-vlm-3.6M-Q4_1.gguf", "mmproj-tiny-vlm-3.6M-F16.gguf")
    assert file_stem("Qwen2.5-VL-7B-Instruct", 7_600_000_000, "Q4_1") == "Qwen2.5-VL-7B-Instruct-Q4_1"
    assert file_stem("a name/with parts", 2_000_000_000, "f16") == "a-name-with-parts-2.0B-F16"


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=120), st.integers(1, 10**12))
def test_any_name_makes_a_file_name(name, parameters):
    stem = file_stem(name, parameters, "Q4_1")
    assert (
        Path("x", f"{stem}.gguf").name == f"{stem}.gguf"
        and "\0" not in stem
        and not stem.startswith(("mmproj-", "-", "."))
    )
    assert stem.endswith("-Q4_1") and len(stem.encode()) < 250


def test_odd_names():
    assert file_stem("a/../b", 10_000_000, "Q4_1") == "a-..-b-10M-Q4_1"
    assert file_stem("../../etc/passwd", 10_000_000, "Q4_1") == "etc-passwd-10M-Q4_1"
    assert (
        file_stem("mmproj-x", 10_000_000, "Q4_1") == "x-10M-Q4_1"
        and file_stem("/", 10_000_000, "f16") == "model-10M-F16"
    )


def test_float_dtypes_of_the_source_are_kept(artifacts, qwen2_vl, tmp_path):
    """F16 and F32 embeddings stay so; vectors are F32 whatever they were."""
    for dtype, kind in ((torch.float16, "F16"), (torch.float32, "F32")):
        source = tmp_path / f"source-{kind}"
        shutil.copytree(qwen2_vl, source)
        tensors = load_file(source / "model.safetensors")
        save_file({k: v.to(dtype) for k, v in tensors.items()}, source / "model.safetensors", {"format": "pt"})
        artifact = rtn_artifact(tmp_path / f"artifact-{kind}", GRIDS["w4g128"], source)
        path = tmp_path / f"{kind}.gguf"
        write_text(artifact, path, FormatOptions())
        types = {n: t.type for n, t in read.GGUFFile(path).tensors.items()}
        assert types["token_embd.weight"] == types["output.weight"] == kind and types["output_norm.weight"] == "F32"
        assert_text(path, artifact, read.decode_gguf_py)


# --- completeness -----------------------------------------------------------------------------------------------------


def rewrite(path: Path, out: Path, *, drop: str = "", change: dict | None = None, reshape: str = "") -> Path:
    """The same GGUF without a key or tensor, with other values, or with one tensor transposed."""
    file = read.GGUFFile(path)
    writer = gguf_py.GGUFWriter(out, file.metadata["general.architecture"])
    writer.kv_data[0].clear()
    for key, value in (file.metadata | (change or {})).items():
        if key != drop:
            kind, of = file.types[key], gguf_py.GGUFValueType
            if isinstance(value, list):
                writer.add_key_value(key, value, of(ARRAY), of(kind))
            else:
                writer.add_key_value(key, value, of(kind))
    for name, t in file.tensors.items():
        if name != drop:
            kind = gguf_py.GGMLQuantizationType(TYPES[t.type].id)
            shape = t.shape[::-1] if name == reshape else t.shape
            writer.add_tensor(name, file.raw(name).view(np.int8), raw_shape=shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


OPTIONAL = (
    "general.",
    "vlmq.",
    "tokenizer.chat_template",
    "clip.vision.image_m",
    "tokenizer.ggml.bos",
    "tokenizer.ggml.pad",
)


def test_completeness_sees_every_dropped_key_and_tensor(exported, tmp_path):
    artifact, text, mmproj, _ = exported
    for path in (text, mmproj):
        file, out = read.GGUFFile(path), tmp_path / "cut.gguf"
        assert complete(path, artifact.source_config, artifact.source) == []
        assert complete(rewrite(path, out), artifact.source_config, artifact.source) == []
        for key in file.metadata:
            problems = complete(rewrite(path, out, drop=key), artifact.source_config)
            assert key.startswith(OPTIONAL) or any(key in p for p in problems), key
        for name in file.tensors:
            problems = complete(rewrite(path, out, drop=name), artifact.source_config)
            assert problems == [f"tensor {name} is missing"]


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("qwen2vl.rope.freq_base", 1e6, "rope.freq_base"),
        ("qwen2vl.rope.dimension_sections", [12, 8, 12, 0], "dimension_sections"),
        ("qwen2vl.rope.dimension_sections", [8, 12, 12], "dimension_sections"),
        ("qwen2vl.attention.layer_norm_rms_epsilon", 1e-5, "rms_epsilon"),
        ("qwen2vl.attention.head_count_kv", 4, "head_count_kv"),
        ("tokenizer.ggml.pre", "llama3", "tokenizer.ggml.pre"),
        ("tokenizer.ggml.tokens", ["a"], "tokenizer.ggml.tokens has 1 entries"),
        ("tokenizer.ggml.token_type", [1], "tokenizer.ggml.token_type has 1 entries"),
        ("tokenizer.ggml.eos_token_id", 3, "eos_token_id is not that of the source"),
        ("tokenizer.ggml.merges", ["a b"], "merges is not that of the source"),
        ("tokenizer.ggml.add_bos_token", True, "add_bos_token is not that of the source"),
        ("tokenizer.chat_template", "{{ x }}", "chat_template is not that of the source"),
        ("general.architecture", "llama", "neither qwen2vl nor clip"),
    ],
)
def test_completeness_sees_wrong_values(exported, tmp_path, key, value, said):
    artifact, text, _, _ = exported
    problems = complete(
        rewrite(text, tmp_path / "x.gguf", change={key: value}), artifact.source_config, artifact.source
    )
    assert any(said in p for p in problems), problems


@pytest.mark.parametrize(
    "key, value",
    [
        ("clip.projector_type", "qwen2vl_merger"), ("clip.use_silu", False), ("clip.vision.n_wa_pattern", 4),
        ("clip.vision.attention.layer_norm_epsilon", 1e-5), ("clip.vision.image_mean", [0.5, 0.5, 0.5]),
        ("clip.vision.patch_size", 16), ("general.type", "model"),
    ],
)  # fmt: skip
def test_completeness_sees_wrong_values_of_the_mmproj(exported, tmp_path, key, value):
    artifact, _, mmproj, _ = exported
    problems = complete(
        rewrite(mmproj, tmp_path / "x.gguf", change={key: value}), artifact.source_config, artifact.source
    )
    assert len(problems) == 1 and key in problems[0]


def test_completeness_sees_other_shapes_types_and_tensors_that_do_not_belong(exported, tmp_path):
    artifact, text, mmproj, _ = exported
    config = artifact.source_config
    problems = complete(rewrite(text, tmp_path / "x.gguf", reshape="token_embd.weight"), config)
    assert problems == ["tensor token_embd.weight has shape (256, 384) where config.json says (384, 256)"]
    untied = {**config, "tie_word_embeddings": False}
    assert complete(text, untied) == ["tensor output.weight is missing"]
    fewer = {**config, "text_config": {**config["text_config"], "num_hidden_layers": 5}}
    assert any("blk.5.attn_q.bias belongs to no part" in p for p in complete(text, fewer))
    gelu = {
        **config,
        "model_type": "qwen2_vl",
        "vision_config": {**config["vision_config"], "embed_dim": 128, "mlp_ratio": 3},
    }
    gelu["vision_config"] |= {"hidden_size": 256, "hidden_act": "quick_gelu"}
    assert any("clip.use_silu is True" in p for p in complete(mmproj, gelu))  # Qwen2-VL's is quick-GELU: neither switch


def test_an_incomplete_file_is_not_left_behind(exported, tmp_path, monkeypatch):
    """What the writer itself forgets: the file is removed, with one line that names it."""
    artifact = exported[0]
    monkeypatch.setattr(gguf_py.GGUFWriter, "add_rope_freq_base", lambda self, value: None)
    with pytest.raises(FormatError, match=r"key qwen2vl\.rope\.freq_base is missing"):
        gguf.write(artifact, tmp_path, FormatOptions(name="tiny-vlm"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_a_tensor_is_missing(artifacts, tmp_path):
    artifact = Artifact(shutil.copytree(artifacts("w4g128").path, tmp_path / "artifact"))
    file = next(artifact.path.glob("float-*.safetensors"))
    for name, side in (("model.norm.weight", "output_norm.weight"), ("visual.merger.mlp.2.bias", "mm.2.bias")):
        tensors = load_file(file)
        save_file({k: v for k, v in tensors.items() if k != name}, file)
        with pytest.raises(FormatError, match=f"{name} is missing.*{side}"):
            gguf.write(Artifact(artifact.path), tmp_path / "out", FormatOptions())
        save_file(tensors, file)
        assert not list((tmp_path / "out").iterdir())


def test_a_tensor_of_another_shape_is_named(artifacts, tmp_path):
    artifact = Artifact(shutil.copytree(artifacts("w4g128").path, tmp_path / "artifact"))
    file = next(artifact.path.glob("float-*.safetensors"))
    tensors = load_file(file)
    for name, side in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("visual.blocks.0.attn.proj.weight", "attn.proj"),
    ):
        save_file(tensors | {name: tensors[name][:-8].contiguous()}, file)
        with pytest.raises(FormatError, match=side):
            gguf.write(Artifact(artifact.path), tmp_path / "out", FormatOptions())
    assert not list((tmp_path / "out").iterdir())


def test_a_weight_beyond_float16_asks_for_f32(artifacts, tmp_path):
    artifact = Artifact(shutil.copytree(artifacts("w4g128").path, tmp_path / "artifact"))
    file = next(artifact.path.glob("float-*.safetensors"))
    tensors = load_file(file)
    tensors["visual.merger.mlp.0.weight"][0, 0] = 1e5
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"visual\.merger\.mlp\.0\.weight.*--mmproj-dtype f32"):
        write_mmproj(Artifact(artifact.path), tmp_path / "x.gguf")
    write_mmproj(Artifact(artifact.path), tmp_path / "x.gguf", "f32")


def test_find_files_wants_one_of_each(tmp_path):
    (tmp_path / "a-Q4_1.gguf").touch()
    with pytest.raises(FormatError, match="1 text models and 0 mmproj"):
        read.find_files(tmp_path)
    (tmp_path / "mmproj-a-F16.gguf").touch()
    assert [f.name for f in read.find_files(tmp_path)] == ["a-Q4_1.gguf", "mmproj-a-F16.gguf"]


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


def config_of(source: Path) -> dict:
    return json.loads((source / "config.json").read_text("utf-8"))


def test_parameters_of_nested_and_flat_configs(qwen2_vl):
    nested, flat = config_of(bundled.REFERENCE_VLM), config_of(qwen2_vl)
    p = text_params(nested)
    assert (p.layers, p.hidden, p.kv_heads, p.sections, p.rope_theta, p.tied) == (6, 256, 2, (8, 12, 12), 10000.0, True)
    assert "text_config" not in flat and replace(text_params(flat), layers=6, tied=True) == p
    old = {k: v for k, v in nested["text_config"].items() if k != "rope_parameters"}
    old |= {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
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


def edit(file: Path, change) -> None:
    value = json.loads(file.read_text("utf-8"))
    change(value)
    file.chmod(0o644)
    file.write_text(json.dumps(value), "utf-8")


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
        (lambda j: j["model"].update(type="Unigram"), "byte-level BPE"),
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


def test_metadata_of_the_files(exported):
    artifact, text, mmproj, _ = exported
    meta, vision = read.GGUFFile(text).metadata, read.GGUFFile(mmproj).metadata
    assert (
        meta["general.name"] == "tiny-vlm" and meta["general.size_label"] == "3.6M" and meta["general.file_type"] == 3
    )
    assert meta["vlmq.bits"] == "4" and meta["general.base_model.0.name"] == artifact.manifest.name
    assert vision["general.size_label"] == "1.4M" and vision["general.file_type"] == 1
    assert vision["clip.vision.image_min_pixels"] == 3136 and vision["clip.vision.image_max_pixels"] == 200704
    assert "clip.use_gelu" not in vision


# --- plan and inspect -------------------------------------------------------------------------------------------------


def model_plan(config: QuantConfig, shapes=((256, 512),), source: Path = bundled.REFERENCE_VLM) -> ModelPlan:
    linears = [LinearSpec(f"model.layers.{i}.mlp.down_proj", *s, bias=False) for i, s in enumerate(shapes)]
    floats = [TensorSpec("model.embed_tokens.weight", (384, 256), "BF16")]
    return ModelPlan("m", "qwen2_5_vl", config_of(source), linears, floats, config)


@pytest.mark.parametrize(
    "config, said",
    [
        (QuantConfig(bits=8, group_size=128), "use --sym"),
        (QuantConfig(bits=4, group_size=128, act_order="dynamic"), "--act-order"),
        (QuantConfig(bits=4, group_size=16), "--group-size 32"),
    ],
)
def test_refusals_name_the_option(config, said):
    refusals = gguf.plan(model_plan(config), FormatOptions()).refusals
    assert len(refusals) == 1 and said in refusals[0]


def test_refusals_are_raised_before_anything_is_written(tmp_path):
    for config, said in (
        (QuantConfig(bits=8, group_size=128), "--sym"),
        (QuantConfig(act_order="dynamic"), "--act-order"),
    ):
        artifact = rtn_artifact(tmp_path / f"a{config.bits}", config)
        with pytest.raises(FormatError, match=said):
            gguf.write(artifact, tmp_path / "out", FormatOptions())
    assert not (tmp_path / "out").exists()


def test_dynamic_order_with_one_group_a_row_is_written(tmp_path):
    config = QuantConfig(bits=4, group_size=-1, act_order="dynamic")
    assert not gguf.plan(model_plan(config), FormatOptions()).refusals


def test_a_row_that_no_block_divides_is_refused_by_name():
    refusals = gguf.plan(
        model_plan(QuantConfig(bits=4, group_size=-1), [(64, 512), (64, 3420)]), FormatOptions()
    ).refusals
    assert refusals == [
        "model.layers.1.mlp.down_proj has rows of 3420 columns, not a multiple of 32; GGUF cannot hold this layer quantized"
    ]


@pytest.mark.parametrize(
    "bits, group_size, symmetric, cheaper",
    [
        (2, 128, False, "--group-size -1 (or groups of 256) costs 2.625 in Q2_K"),
        (2, 32, True, "costs 2.0625 in TQ2_0"),
        (3, 128, False, "--sym --group-size -1 (or groups of 256) costs 3.4375 in Q3_K"),
        (3, -1, False, "--sym --group-size -1 (or groups of 256) costs 3.4375 in Q3_K"),
        (3, 128, True, "costs 3.4375 in Q3_K"),
        (2, -1, False, None), (3, -1, True, None), (4, 128, False, None), (8, 128, True, None),
    ],
)  # fmt: skip
def test_dear_containers_name_the_cheaper_choice(bits, group_size, symmetric, cheaper):
    config = QuantConfig(bits=bits, group_size=group_size, symmetric=symmetric)
    plan = gguf.plan(model_plan(config), FormatOptions())
    dear = [n for n in plan.notes if "4.5 bits per weight;" in n or "4.5 bits per weight (" in n]
    dear = [n for n in dear if not n.startswith("GGUF block types")]
    assert bool(dear) == (cheaper is not None) and (not cheaper or cheaper in dear[0])
    assert (plan.bits_per_weight == 4.5) == bool(cheaper)


def test_two_bit_notes_name_q2_0_where_it_would_fit():
    note = next(
        n
        for n in gguf.plan(model_plan(QuantConfig(bits=2, group_size=64, symmetric=True)), FormatOptions()).notes
        if "2-bit" in n
    )
    assert "Q2_0 would take 2.25" in note


def test_a_high_pixel_limit_is_said(artifacts, tmp_path):
    artifact = Artifact(shutil.copytree(artifacts("w4g128").path, tmp_path / "artifact"))
    edit(artifact.source / "preprocessor_config.json", lambda j: j.update(max_pixels=12845056))
    notes = gguf.write(artifact, tmp_path / "out", FormatOptions())
    assert any("16384 tokens" in n and "--image-max-tokens" in n for n in notes)
    _, mmproj = read.find_files(tmp_path / "out")
    assert read.GGUFFile(mmproj).metadata["clip.vision.image_max_pixels"] == 12845056


def test_planning_and_inspecting_need_no_gguf_py(exported):
    """Dry runs and inspect work without the extra; only writing and checking need it."""
    code = (
        "import sys; sys.modules['gguf'] = sys.modules['xllamacpp'] = None\n"
        "from vlmq_export import formats\n"
        f"print(formats.get('gguf').inspect({str(exported[1])!r}).bits_per_weight)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "5.0", done.stderr


def test_inspect_a_file_and_a_folder(exported):
    _, text, mmproj, _ = exported
    one, both = gguf.inspect(text), gguf.inspect(text.parent)
    assert one.kind == "GGUF v3" and one.bits_per_weight == 5.0 and len(one.tensors) == 74
    assert one.metadata["qwen2vl.rope.freq_base"] == "10000.0" and one.metadata["tokenizer.ggml.tokens"].endswith(
        "(384)"
    )
    assert len(both.tensors) == 74 + 71 and both.metadata[f"{mmproj.name}: clip.projector_type"] == "qwen2.5vl_merger"
    assert all(len(v) < 200 and v.isprintable() for v in both.metadata.values())


def test_the_package_offers_the_five_functions_after_its_modules_are_imported():
    """Modules named plan, write, check and inspect must not take the functions' place."""
    import importlib

    for name in ("check", "inspect", "plan", "write"):
        importlib.import_module(f"vlmq_export.formats.gguf.{name}")
    package = formats.get("gguf")
    assert all(callable(getattr(package, name)) for name in package.__all__)
