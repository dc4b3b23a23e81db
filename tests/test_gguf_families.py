"""The five families' names, keys and refusals: tables against gguf-py's own, and both generations of source names."""

from __future__ import annotations

import gguf as gguf_py
import numpy as np
import pytest

from tests.artifacts import GRIDS, config_of, rtn_artifact
from vlmq_export import formats
from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf import names, read
from vlmq_export.formats.gguf.families import GRAPHS, graphs_of
from vlmq_export.formats.gguf.params import text_params, vision_params
from vlmq_export.plan import artifact_plan
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.reference import Weights

gguf = formats.get("gguf")
# Qwen2.5-VL's full-attention blocks must be every n-th, and llama.cpp's Qwen3-VL needs a layer behind its DeepStack ones.
SHAPE = {"qwen2_5_vl": {"depth": 4}, "qwen3_vl": {"layers": 3}}
ARCHES = {"qwen2vl": "QWEN2VL", "qwen3vl": "QWEN3VL", "qwen2": "QWEN2"}
NEW = ("qwen3_vl", "internvl", "llava_onevision")


@pytest.fixture(scope="module")
def artifact(tiny, tmp_path_factory):
    """get(family, **options) → an artifact at 4 bits, made once."""
    made: dict[str, Artifact] = {}

    def get(arch: str, **options) -> Artifact:
        key = f"{arch}-{options}"
        if key not in made:
            source = tiny(arch, **SHAPE.get(arch, {}), **options)
            made[key] = rtn_artifact(tmp_path_factory.mktemp(arch), GRIDS["w4"], source)
        return made[key]

    return get


@pytest.mark.parametrize("arch", GRAPHS)
def test_every_hub_tensor_has_a_place_and_every_place_a_tensor(arch, artifact):
    a = artifact(arch)
    weights, config = Weights(a.path), a.source_config
    present = set(weights.names())
    assert set(names.to_hub(config).values()) == present - names.unused(config)
    assert names.without_place(config, weights.names()) == []
    assert names.without_place(config, ["model.extra.weight"]) == ["model.extra.weight"]
    shapes = {name: array.shape for name, array in names.expected_mmproj(weights, config)}
    assert shapes == names.vision_shapes(vision_params(config))
    sizes = sum(np.prod(s) for s in shapes.values())
    text = sum(np.prod(s) for s in names.text_shapes(text_params(config)).values())
    assert sizes + text == weights.count - sum(weights.array(n).size for n in names.unused(config))


def _converter_name(name: str, module: str) -> str:
    """The name that llama.cpp's converter looks up, which for some tensors is not transformers 5's."""
    module = module.replace("model.vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers")
    module = module.replace("model.vision_tower.embeddings.patch_emb", "vision_tower.vision_model.embeddings.patch_emb")
    module = module.replace(
        "model.vision_tower.embeddings.position_embedding.", "vision_tower.vision_model.embeddings.position_embedding."
    )
    module = module.replace("model.language_model.", "model.").removeprefix("model.visual.")
    if "attn_q." in name or "attn_k." in name or "attn_v." in name:
        module = module.replace("qkv", name.split("attn_")[1][0])
    return module


@pytest.mark.parametrize("arch", GRAPHS)
def test_names_are_llama_cpps_own(arch, artifact):
    """gguf-py's map of the same graphs, where it has an entry; most of the rest is checked by the converter's output
    (tools/gguf_converter.py)."""
    config = artifact(arch).source_config
    t, v = text_params(config), vision_params(config)
    text = gguf_py.get_tensor_name_map(getattr(gguf_py.MODEL_ARCH, ARCHES[t.graph.arch]), t.layers)
    vision = gguf_py.get_tensor_name_map(gguf_py.MODEL_ARCH.MMPROJ, v.layers)
    unknown = []
    for name, place in names.text_places(t).items():
        module = place.module.replace("model.language_model.", "model.")
        assert text.get_name(module, try_suffixes=(".weight", ".bias")) == name
    for name, place in names.vision_places(v).items():
        if name == "v.patch_embd.weight.1":  # the second time slice has no name of its own in the map
            continue
        looked = (_converter_name(name, place.module), "visual." + _converter_name(name, place.module), place.module)
        found = [vision.get_name(n, try_suffixes=(".weight", ".bias")) for n in looked]
        if place.module.endswith(
            ("position_embeddings", "lambda_1", "lambda_2")
        ):  # a bare parameters: the converter adds .weight
            found = [f and f"{f}.weight" for f in found]
        if "deepstack" in name:  # numbered from 0 in the map and by their block in the file
            found = []
        assert name in found or not any(found), (name, place.module, found)
        unknown += [] if name in found else [name]
    # hand-written names: the projector's, DeepStack's, the second time slice, bare parameters
    assert all(n.startswith(("mm.", "v.deepstack.", "v.post_ln.", "v.image_newline", "v.class_embd")) or ".ls" in n or "position" in n for n in unknown), unknown  # fmt: skip


@pytest.mark.parametrize("arch", NEW)
def test_both_generations_of_names_give_the_same_bytes(arch, artifact, tmp_path):
    """But for the hash of the source's config in nothing: metadata comes from the same numbers."""
    options, found = FormatOptions(name="tiny-vlm"), []
    for generation in ("hub", "modules"):
        gguf.write(artifact(arch, generation=generation), tmp_path / generation, options)
        found.append([read.GGUFFile(f) for f in read.find_files(tmp_path / generation)])
    for old, new in zip(*found):
        assert old.metadata == new.metadata and list(old.tensors) == list(new.tensors)
        assert all(np.array_equal(old.raw(n), new.raw(n)) for n in old.tensors)


@pytest.mark.parametrize("dtype", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("arch", NEW)
def test_the_mmproj_decodes_to_the_source(arch, dtype, artifact, tmp_path):
    a = artifact(arch)
    gguf.write(a, tmp_path, FormatOptions(name="tiny-vlm", mmproj_dtype=dtype))
    mmproj = read.find_files(tmp_path)[1]
    expected = dict(names.expected_mmproj(Weights(a.path), a.source_config, dtype))
    for name, array in read.decode_gguf_py(mmproj):
        assert np.array_equal(array, expected.pop(name)), name
    assert not expected
    types = {t.type for t in read.GGUFFile(mmproj).tensors.values()}
    assert types == {"F32", *({dtype.upper()} - {"F32"})}
    planned = gguf.plan(artifact_plan(a), FormatOptions(mmproj_dtype=dtype)).size_bytes
    written = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert abs(planned - written) < 0.03 * written


def test_rows_that_do_not_fill_the_blocks_stay_in_float16():
    place = names.Place("x.weight", (32, 4304), None, True)  # SigLIP's MLP
    from vlmq_export.formats.gguf.mmproj import stored_type

    assert [stored_type(place, d) for d in ("q8_0", "f16", "f32")] == ["F16", "F16", "F32"]
    assert stored_type(names.Place("x.weight", (4304, 1152), None, True), "q8_0") == "Q8_0"
    assert stored_type(names.Place("pos", (729, 1152), None, False), "q8_0") == "F32"


def test_metadata_that_only_one_family_has(artifact):
    keys = {arch: vision_params(artifact(arch).source_config).keys() for arch in GRAPHS}
    text = {arch: text_params(artifact(arch).source_config).keys() for arch in GRAPHS}
    assert keys["qwen3_vl"]["clip.vision.is_deepstack_layers"] == [True, False, True]
    assert keys["qwen3_vl"]["clip.vision.image_size"] == 12 * 16
    assert text["qwen3_vl"]["qwen3vl.n_deepstack_layers"] == 2
    assert text["qwen3_vl"]["qwen3vl.attention.key_length"] == 64
    assert text["qwen3_vl"]["qwen3vl.rope.dimension_sections"] == [11, 11, 10, 0]
    assert keys["internvl"]["clip.vision.projector.scale_factor"] == 2
    assert keys["llava_onevision"]["clip.vision.feature_layer"] == [3]
    assert "qwen2.rope.dimension_sections" not in text["internvl"]
    acts = {arch: [k for k in ("clip.use_gelu", "clip.use_silu") if k in keys[arch]] for arch in GRAPHS}
    gelu = ["clip.use_gelu"]
    assert acts == {"qwen2_vl": [], "qwen2_5_vl": ["clip.use_silu"], **dict.fromkeys(NEW, gelu)}


def test_where_the_class_row_goes(artifact):
    a = artifact("internvl")
    weights, config = Weights(a.path), a.source_config
    rows = weights.array("vision_tower.embeddings.position_embeddings")[0]
    last = dict(names.expected_mmproj(weights, config))["v.position_embd.weight"]
    first = dict(names.expected_mmproj(weights, config, class_row="first"))["v.position_embd.weight"]
    assert np.array_equal(first, rows)
    assert np.array_equal(last[:-1], rows[1:]) and np.array_equal(last[-1], rows[0])


@pytest.mark.parametrize(
    "arch, where, change, said",
    [
        ("qwen3_vl", "vision_config", {"hidden_act": "gelu"}, "qwen3vl_merger knows only gelu_pytorch_tanh"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [0, 1, 2]}, "fails at the last of 3"),
        ("qwen3_vl", "text_config", {"attention_bias": True}, "attention_bias"),
        ("qwen3_vl", "text_config", {"rope_scaling": {"rope_type": "yarn", "mrope_section": [11, 11, 10]}}, "rope type yarn"),
        ("internvl", "text_config", {"model_type": "qwen3"}, "model_type is qwen3; llama.cpp's qwen2 knows only qwen2"),
        ("internvl", "vision_config", {"norm_type": "rms_norm"}, "norm_type is rms_norm"),
        ("internvl", "vision_config", {"use_qk_norm": True}, "use_qk_norm"),
        ("internvl", "vision_config", {"image_size": [448, 224]}, "only squares"),
        ("internvl", None, {"vision_feature_layer": -2}, "vision_feature_layer"),
        ("internvl", "text_config", {"head_dim": 32}, "head_dim 32"),
        ("llava_onevision", "text_config", {"use_sliding_window": True}, "use_sliding_window"),
        ("llava_onevision", "vision_config", {"model_type": "clip_vision_model"}, "siglip_vision_model"),
        ("llava_onevision", "vision_config", {"intermediate_size": 256}, "as wide as the tower"),
        ("llava_onevision", None, {"vision_feature_select_strategy": "default"}, "knows only full"),
        ("llava_onevision", None, {"projector_hidden_act": "relu"}, "projector_hidden_act"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_express_is_refused_by_name(tiny, arch, where, change, said):
    config = config_of(tiny(arch, **SHAPE.get(arch, {})))
    config = {**config, where: {**config[where], **change}} if where else {**config, **change}
    with pytest.raises(FormatError, match=said):
        text_params(config)
        vision_params(config)


def test_a_family_that_llama_cpp_lacks_is_refused_by_name():
    with pytest.raises(FormatError, match="model_type idefics3 is not written to GGUF; known are qwen2_vl"):
        graphs_of({"model_type": "idefics3"})
