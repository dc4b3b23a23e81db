"""What llama.cpp would miss in silence is found after writing and by `verify`; a failed write leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from vlmq_export import formats
from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.complete import complete
from vlmq_export.formats.gguf.container import ARRAY
from vlmq_export.formats.gguf.mmproj import write_mmproj
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.artifact import (
    Artifact,
)

gguf = formats.get("gguf")
SIZE_TOLERANCE = 0.03  # of the planned size: metadata and padding are estimated


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


def test_completeness_sees_every_dropped_key_and_tensor(gguf_files, tmp_path):
    artifact, text, mmproj, _ = gguf_files
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
def test_completeness_sees_wrong_values(gguf_files, tmp_path, key, value, said):
    artifact, text, _, _ = gguf_files
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
def test_completeness_sees_wrong_values_of_the_mmproj(gguf_files, tmp_path, key, value):
    artifact, _, mmproj, _ = gguf_files
    problems = complete(
        rewrite(mmproj, tmp_path / "x.gguf", change={key: value}), artifact.source_config, artifact.source
    )
    assert len(problems) == 1 and key in problems[0]


def test_completeness_sees_other_shapes_types_and_tensors_that_do_not_belong(gguf_files, tmp_path):
    artifact, text, mmproj, _ = gguf_files
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


def test_an_incomplete_file_is_not_left_behind(gguf_files, tmp_path, monkeypatch):
    """What the writer itself forgets: the file is removed, with one line that names it."""
    artifact = gguf_files[0]
    add = gguf_py.GGUFWriter.add_key_value
    monkeypatch.setattr(
        gguf_py.GGUFWriter, "add_key_value", lambda self, key, *a, **kw: "freq_base" in key or add(self, key, *a, **kw)
    )
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
    with pytest.raises(FormatError, match=r"visual\.merger\.mlp\.0\.weight.*--mmproj f32"):
        write_mmproj(Artifact(artifact.path), tmp_path / "x.gguf")
    write_mmproj(Artifact(artifact.path), tmp_path / "x.gguf", "f32")


def test_find_files_wants_one_of_each(tmp_path):
    (tmp_path / "a-Q4_1.gguf").touch()
    with pytest.raises(FormatError, match="1 text models and 0 mmproj"):
        read.find_files(tmp_path)
    (tmp_path / "mmproj-a-F16.gguf").touch()
    assert [f.name for f in read.find_files(tmp_path)] == ["a-Q4_1.gguf", "mmproj-a-F16.gguf"]
