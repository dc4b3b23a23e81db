"""`complete` finds the keys and tensors whose absence llama.cpp does not report.

It runs after every write and in `verify`. A write that fails leaves no file behind.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.completeness import complete
from vlmq_export.formats.gguf.files.mmproj import write_mmproj
from vlmq_export.formats.gguf.files.parse import ARRAY
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.architecture import Architecture, untied_config

gguf = FORMATS["gguf"]
# Beginnings of the keys whose absence need not be reported.
OPTIONAL = (
    "general.",
    "vlmq.",
    "tokenizer.chat_template",
    "clip.vision.image_m",
    "tokenizer.ggml.bos",
    "tokenizer.ggml.pad",
)


# --- completeness ---------------------------------------------------------------------------------


def rewrite(
    path: Path, out: Path, *, drop: str = "", change: dict | None = None, reshape: str = ""
) -> Path:
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


def layout_of(config: dict) -> Layout:
    return Layout.of(Architecture.of(config))


def test_completeness_sees_every_dropped_key_and_tensor(gguf_files, tmp_path):
    artifact, text, mmproj, _ = gguf_files
    layout = Layout.of(artifact.architecture)
    for path in (text, mmproj):
        file, out = read.GGUFFile(path), tmp_path / "cut.gguf"
        assert complete(path, layout, artifact.source) == []
        assert complete(rewrite(path, out), layout, artifact.source) == []
        for key in file.metadata:
            problems = complete(rewrite(path, out, drop=key), layout)
            assert key.startswith(OPTIONAL) or any(key in p for p in problems), key
        for name in file.tensors:
            problems = complete(rewrite(path, out, drop=name), layout)
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
def test_completeness_sees_wrong_values(gguf_files, tmp_path, key, value, said):
    artifact, text, _, _ = gguf_files
    changed = rewrite(text, tmp_path / "x.gguf", change={key: value})
    problems = complete(changed, Layout.of(artifact.architecture), artifact.source)
    assert any(said in p for p in problems), problems


@pytest.mark.parametrize(
    "key, value",
    [
        ("clip.projector_type", "qwen2vl_merger"),
        ("clip.use_silu", False),
        ("clip.vision.n_wa_pattern", 4),
        ("clip.vision.attention.layer_norm_epsilon", 1e-5),
        ("clip.vision.image_mean", [0.5, 0.5, 0.5]),
        ("clip.vision.patch_size", 16),
        ("general.type", "model"),
    ],
)
def test_completeness_sees_wrong_values_of_the_mmproj(gguf_files, tmp_path, key, value):
    artifact, _, mmproj, _ = gguf_files
    changed = rewrite(mmproj, tmp_path / "x.gguf", change={key: value})
    problems = complete(changed, Layout.of(artifact.architecture), artifact.source)
    assert len(problems) == 1 and key in problems[0]


def test_completeness_sees_other_shapes_types_and_tensors_that_do_not_belong(gguf_files, tmp_path):
    artifact, text, mmproj, _ = gguf_files
    config = artifact.source_config
    turned = rewrite(text, tmp_path / "x.gguf", reshape="token_embd.weight")
    problems = complete(turned, layout_of(config))
    assert problems == [
        "tensor token_embd.weight has shape (256, 384) where config.json says (384, 256)"
    ]
    own_head = layout_of(untied_config(config))
    assert complete(text, own_head) == ["tensor output.weight is missing"]
    five = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    fewer = {**config, "text_config": {**config["text_config"], **five}}
    problems = complete(text, layout_of(fewer))
    assert any("blk.5.attn_q.bias belongs to no part" in p for p in problems)
    # the tower of Qwen2-VL has quick-GELU, for which neither clip.use_silu nor clip.use_gelu is set
    tower = {"embed_dim": 128, "mlp_ratio": 3, "hidden_size": 256, "hidden_act": "quick_gelu"}
    vision = config["vision_config"] | tower
    problems = complete(
        mmproj, layout_of({**config, "model_type": "qwen2_vl", "vision_config": vision})
    )
    assert any("clip.use_silu is True" in p for p in problems)


def test_an_incomplete_file_is_not_left_behind(gguf_files, tmp_path, monkeypatch):
    """If the writer forgets a key, the file is removed and the error names the key."""
    artifact = gguf_files[0]
    add = gguf_py.GGUFWriter.add_key_value

    def forgetful(self, key, *a, **kw):
        if "freq_base" not in key:
            add(self, key, *a, **kw)

    monkeypatch.setattr(gguf_py.GGUFWriter, "add_key_value", forgetful)
    with pytest.raises(FormatError, match=r"key qwen2vl\.rope\.freq_base is missing"):
        gguf.write(artifact, tmp_path, FormatOptions(name="tiny-vlm"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_a_tensor_is_missing(artifacts, tmp_path):
    artifact = Artifact(shutil.copytree(artifacts("w4g128").path, tmp_path / "artifact"))
    file = next(artifact.path.glob("float-*.safetensors"))
    gguf_names = {
        "model.norm.weight": "output_norm.weight",
        "visual.merger.mlp.2.bias": "mm.2.bias",
    }
    for name, gguf_name in gguf_names.items():
        tensors = load_file(file)
        save_file({k: v for k, v in tensors.items() if k != name}, file)
        with pytest.raises(FormatError, match=f"{name} is missing.*{gguf_name}"):
            gguf.write(Artifact(artifact.path), tmp_path / "out", FormatOptions())
        save_file(tensors, file)
        assert not list((tmp_path / "out").iterdir())


def test_a_tensor_of_another_shape_is_named(artifacts, tmp_path):
    artifact = Artifact(shutil.copytree(artifacts("w4g128").path, tmp_path / "artifact"))
    file = next(artifact.path.glob("float-*.safetensors"))
    tensors = load_file(file)
    named = {
        "model.embed_tokens.weight": "token_embd.weight",
        "visual.blocks.0.attn.proj.weight": "attn.proj",
    }
    for name, said in named.items():
        save_file(tensors | {name: tensors[name][:-8].contiguous()}, file)
        with pytest.raises(FormatError, match=said):
            gguf.write(Artifact(artifact.path), tmp_path / "out", FormatOptions())
    assert not list((tmp_path / "out").iterdir())


def test_a_weight_beyond_float16_asks_for_f32(artifacts, tmp_path):
    artifact = Artifact(shutil.copytree(artifacts("w4g128").path, tmp_path / "artifact"))
    file = next(artifact.path.glob("float-*.safetensors"))
    tensors = load_file(file)
    tensors["visual.merger.mlp.0.weight"][0, 0] = 1e5
    save_file(tensors, file)
    artifact = Artifact(artifact.path)
    layout = Layout.of(artifact.architecture)
    with pytest.raises(FormatError, match=r"visual\.merger\.mlp\.0\.weight.*--mmproj f32"):
        write_mmproj(artifact, layout, tmp_path / "x.gguf")
    write_mmproj(artifact, layout, tmp_path / "x.gguf", "f32")


def test_find_files_wants_one_of_each(tmp_path):
    (tmp_path / "a-Q4_1.gguf").touch()
    with pytest.raises(FormatError, match="1 text models and 0 mmproj"):
        read.find_files(tmp_path)
    (tmp_path / "mmproj-a-F16.gguf").touch()
    assert [f.name for f in read.find_files(tmp_path)] == ["a-Q4_1.gguf", "mmproj-a-F16.gguf"]
