"""The GGUF tables of the families: names of tensors, metadata keys and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import gguf as gguf_py
import numpy as np
import pytest
import torch

from tests.artifacts import GRIDS, config_of, edit, rtn_artifact, tower_of
from tools.reference_vlm import tiny_families
from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.files.mmproj import stored_type
from vlmq_export.formats.gguf.tables.families import graphs_of
from vlmq_export.formats.gguf.tables.layout import Layout, Place, shapes
from vlmq_export.formats.gguf.tables.params import image_params
from vlmq_export.formats.gguf.types.mix import module_choices, module_types
from vlmq_export.formats.gguf.types.order import in_order
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.families import Family

gguf = FORMATS["gguf"]
ARCHES = tiny_families.ARCHES
PIXTRAL = tiny_families.PIXTRAL
# llama.cpp wants every n-th block of Qwen2.5-VL's tower to have full attention, and of Qwen3-VL a
# layer after the last one that takes DeepStack features.
SHAPE = {"qwen2_5_vl": {"depth": 4}, "qwen3_vl": {"layers": 3}, "qwen3_vl_moe": {"layers": 3}}
NEW = ("qwen3_vl", "internvl", "llava_onevision", "idefics3", "smolvlm", "internvl3_5", "gemma3")
NEW += ("ministral3", "qwen3_5")


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


@pytest.mark.parametrize("arch", ARCHES)
def test_every_hub_tensor_has_a_place_and_every_place_a_tensor(arch, artifact):
    a = artifact(arch)
    weights, layout = Weights(a.path), Layout.of(a.architecture)
    assert layout.held == set(weights.names()) - layout.unused
    assert layout.without_place(weights.names()) == []
    assert layout.without_place(["model.extra.weight"]) == ["model.extra.weight"]
    assert shapes(layout.vision) == {name: x.shape for name, x in tower_of(a).items()}
    held = sum(np.prod(x.shape) for x in (*layout.text.values(), *layout.vision.values()))
    twice = sum(np.prod(x.shape) for x in layout.shared.values())
    assert held - twice == weights.count - sum(weights.array(n).size for n in layout.unused)
    assert bool(twice) == (arch in PIXTRAL)


def _converter_name(name: str, module: str) -> str:
    """The name that llama.cpp's converter looks up. For some tensors transformers 5 has another."""
    for part in ("encoder.layers", "embeddings.patch_emb", "embeddings.position_embedding."):
        module = module.replace(f"model.vision_tower.{part}", f"vision_tower.vision_model.{part}")
    module = module.replace("model.language_model.", "model.").removeprefix("model.visual.")
    if "attn_q." in name or "attn_k." in name or "attn_v." in name:
        module = module.replace("qkv", name.split("attn_")[1][0])
    return module


@pytest.mark.parametrize("arch", ARCHES)
def test_names_are_llama_cpps_own(arch, artifact):
    """Compares with gguf-py's map of names, where it has an entry for the tensor.

    Most of the other names are checked by tools/checks/gguf_converter.py, with the output of
    llama.cpp's converter.
    """
    layout = Layout.of(artifact(arch).architecture)
    t, v = layout.text_params, layout.vision_params
    text = gguf_py.get_tensor_name_map(gguf_py.MODEL_ARCH[t.graph.arch.upper()], t.layers)
    vision = gguf_py.get_tensor_name_map(gguf_py.MODEL_ARCH.MMPROJ, v.layers)
    suffixes, unknown = (".weight", ".bias"), []
    for name, place in layout.text.items():
        module = place.module.replace("model.language_model.", "model.")
        module = module.replace("model.text_model.", "model.").replace(".experts.0.", ".experts.")
        module = module.replace(".dt_bias", ".dt_proj.bias")  # as the converter renames it
        assert text.get_name(module, try_suffixes=suffixes) == name
    for name, place in layout.vision.items():
        # The map has no name for the second time slice of the patch convolution, and it numbers
        # DeepStack's tensors from 0, where the file has the number of their block.
        if name == "v.patch_embd.weight.1":
            continue
        converted = _converter_name(name, place.module)
        looked = (converted, f"visual.{converted}", place.module)
        if arch in PIXTRAL:  # whose tower has the published names
            looked = (place.module.removeprefix("model."),)
        found = [vision.get_name(n, try_suffixes=suffixes) for n in looked]
        if place.module.endswith(("position_embeddings", "lambda_1", "lambda_2")):
            # Parameters that are no module's weight: the converter appends .weight.
            found = [f and f"{f}.weight" for f in found]
        if "deepstack" in name:
            found = []
        assert name in found or not any(found), (name, place.module, found)
        unknown += [] if name in found else [name]
    # The names that the map does not have are those of the projector and DeepStack, and those of
    # parameters that are no module's weight.
    begin = ("mm.", "v.deepstack.", "v.post_ln.", "v.image_newline", "v.class_embd", "v.token_embd")
    other = [
        n for n in unknown if not n.startswith(begin) and ".ls" not in n and "position" not in n
    ]
    assert not other


@pytest.mark.parametrize("arch", NEW)
def test_both_generations_of_names_give_the_same_bytes(arch, artifact, tmp_path):
    """Checkpoints as published for transformers 4, and as transformers 5 saves the same models."""
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
    expected = tower_of(a, dtype)
    for name, array in read.decode_gguf_py(mmproj):
        assert np.array_equal(array, expected.pop(name)), name
    assert not expected
    types = {t.type for t in read.GGUFFile(mmproj).tensors.values()}
    assert types == {"F32", *({dtype.upper()} - {"F32"})}
    planned = gguf.plan(artifact_plan(a), FormatOptions(mmproj_dtype=dtype)).size_bytes
    written = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert abs(planned - written) < 0.03 * written


def test_rows_that_do_not_fill_the_blocks_stay_in_float16():
    place = Place("", "x.weight", (32, 4304), None, True)  # SigLIP's MLP: 4304 is 134.5 blocks
    assert [stored_type(place, d) for d in ("q8_0", "f16", "f32")] == ["F16", "F16", "F32"]
    assert stored_type(Place("", "x.weight", (4304, 1152), None, True), "q8_0") == "Q8_0"
    assert stored_type(Place("", "pos", (729, 1152), None, False), "q8_0") == "F32"


def test_metadata_that_only_one_family_has(artifact):
    layouts = {arch: Layout.of(artifact(arch).architecture) for arch in ARCHES}
    keys = {arch: layout.vision_params.keys() for arch, layout in layouts.items()}
    text = {arch: layout.text_params.keys() for arch, layout in layouts.items()}
    assert keys["qwen3_vl"]["clip.vision.is_deepstack_layers"] == [True, False, True]
    assert keys["qwen3_vl"]["clip.vision.image_size"] == 12 * 16
    assert text["qwen3_vl"]["qwen3vl.n_deepstack_layers"] == 2
    assert text["qwen3_vl"]["qwen3vl.attention.key_length"] == 64
    assert text["qwen3_vl"]["qwen3vl.rope.dimension_sections"] == [11, 11, 10, 0]
    assert keys["internvl"]["clip.vision.projector.scale_factor"] == 2
    assert keys["llava_onevision"]["clip.vision.feature_layer"] == [3]
    assert "qwen2.rope.dimension_sections" not in text["internvl"]
    experts = {k: v for k, v in text["qwen3_vl_moe"].items() if ".expert_" in k}
    said = {"count": 6, "used_count": 2, "feed_forward_length": 512}
    assert experts == {f"qwen3vlmoe.expert_{key}": value for key, value in said.items()}
    silu, gelu = "clip.use_silu", "clip.use_gelu"
    switches = {arch: keys[arch].keys() & {silu, gelu} for arch in ARCHES}
    wanted = {"qwen2_vl": set(), "qwen2_5_vl": {silu}, "qwen3_vl_moe": {gelu}}
    wanted |= {arch: {gelu} for arch in NEW}
    wanted |= {arch: {silu} for arch in PIXTRAL}
    assert switches == wanted


def test_what_gemma3_says_of_its_layers(artifact):
    """As llama.cpp's converter writes it, and what it leaves to the defaults of llama.cpp."""
    a = artifact("gemma3")
    layout, weights = Layout.of(a.architecture), Weights(a.path)
    keys = layout.text_params.keys()
    assert keys["gemma3.attention.sliding_window"] == 24
    assert keys["gemma3.attention.sliding_window_pattern"] == [True, False]
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
    assert keys["gemma3.rope.scaling.type"] == "linear"
    assert keys["gemma3.rope.scaling.factor"] == 8.0
    assert keys["gemma3.attention.key_length"] == keys["gemma3.attention.value_length"] == 128
    assert layout.vision_params.keys()["clip.vision.projector.scale_factor"] == 2
    moved = {n for n, x in (layout.text | layout.vision).items() if x.part}
    assert moved == {n for n in layout.text if "norm" in n} | {"mm.soft_emb_norm.weight"}
    for name in moved:
        place = (layout.text | layout.vision)[name]
        assert np.array_equal(
            place.of_array(weights.array(place.hub)), 1 + weights.array(place.hub)
        )


def test_the_published_pattern_of_windows_is_llama_cpp_s_own(tiny):
    """A file without the key has a sixth layer of all tokens, and so have the published models."""
    config = config_of(tiny("gemma3"))
    for n, said in ((6, False), (5, True), (1, False)):
        text = {**config[TEXT], "num_hidden_layers": 7, "sliding_window_pattern": n}
        keys = Layout.of(Architecture.of({**config, TEXT: text})).text_params.keys()
        assert ("gemma3.attention.sliding_window" in keys) == (n > 1)
        assert ("gemma3.attention.sliding_window_pattern" in keys) == said


def test_gemma3_27b_divides_its_queries_by_another_root(tiny):
    """llama.cpp knows the model by its 62 layers; 168 = 5376 / 32, and not its head of 128."""
    sizes = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128}
    config = config_of(tiny("gemma3"))
    for layers, right in ((62, 168), (48, 128)):
        for scalar in (168, 128):
            text = {**sizes, "num_hidden_layers": layers, "query_pre_attn_scalar": scalar}
            told = Architecture.of({**config, TEXT: {**config[TEXT], **text}})
            if scalar == right:
                assert Layout.of(told).text_params.layers == layers
            else:
                with pytest.raises(FormatError, match=f"knows only {right} at {layers} layers"):
                    Layout.of(told)


def test_what_smolvlm_says_of_its_tiles(artifact):
    cut, whole = artifact("idefics3"), artifact("smolvlm")
    params = Layout.of(cut.architecture).vision_params
    assert params.keys()["clip.vision.projector.scale_factor"] == params.merge == 2
    assert params.keys()["clip.projector_type"] == "idefics3"
    assert image_params(cut.source).keys()["clip.vision.preproc_image_size"] == 224
    # Without the key, mtmd would cut a large image into a grid.
    assert image_params(whole.source).keys()["clip.vision.preproc_image_size"] == 112


def test_rows_of_a_rotary_pair_stand_side_by_side(artifact):
    """llama.cpp's `llama` turns neighbours. transformers turns the halves of a head."""
    a = artifact("idefics3")
    layout, weights = Layout.of(a.architecture), Weights(a.path)
    for letter, moved in (("q", True), ("k", True), ("v", False)):
        place = layout.text[f"blk.1.attn_{letter}.weight"]
        source = weights.array(place.hub)
        rows = place.of_array(source)
        heads = source.reshape(-1, 64, source.shape[1])
        for head, own in zip(rows.reshape(heads.shape), heads):
            assert np.array_equal(head[0::2], own[:32]) == moved
            assert np.array_equal(head[1::2], own[32:]) == moved
        assert np.array_equal(rows, source) != moved


def test_what_mistral3_says_of_its_positions(artifact):
    """As llama.cpp's converter writes it."""
    keys = {arch: Layout.of(artifact(arch).architecture).text_params.keys() for arch in PIXTRAL}
    assert not [key for key in keys["mistral3"] if "scal" in key]
    assert keys["mistral3"]["mistral3.rope.freq_base"] == 1e9
    assert {key: value for key, value in keys["ministral3"].items() if "scal" in key} == {
        "mistral3.rope.scaling.type": "yarn",
        "mistral3.rope.scaling.factor": 16.0,
        "mistral3.rope.scaling.original_context_length": 16,
        "mistral3.rope.scaling.yarn_beta_fast": 32.0,
        "mistral3.rope.scaling.yarn_beta_slow": 1.0,
        "mistral3.rope.scaling.yarn_log_multiplier": 1.0,
        "mistral3.attention.temperature_scale": 0.1,
    }


def test_the_mmproj_of_mistral3(artifact):
    a = artifact("ministral3")
    layout, weights = Layout.of(a.architecture, folder=a.source), Weights(a.path)
    keys = layout.vision_params.keys()
    assert keys["clip.projector_type"] == "pixtral"
    assert keys["clip.vision.spatial_merge_size"] == 2
    tokens = {t["content"]: t["id"] for t in tokenizer_of(a.source)["added_tokens"]}
    embedding = weights.array("language_model.model.embed_tokens.weight")
    (end,) = layout.shared.values()
    assert np.array_equal(end.of_array(embedding), embedding[tokens["[IMG_BREAK]"]])
    for letter, moved in (("q", True), ("k", True), ("v", False)):
        place = layout.vision[f"v.blk.1.attn_{letter}.weight"]
        source = weights.array(place.hub)
        rows = place.of_array(source).reshape(4, 64, -1)
        assert np.array_equal(rows[:, 0::2], source.reshape(4, 64, -1)[:, :32]) == moved


def test_a_row_behind_images_that_is_not_known_is_not_made_up(artifact, tiny, tmp_path):
    a = artifact("mistral3")
    (end,) = Layout.of(a.architecture).shared.values()
    with pytest.raises(LookupError, match="which row"):
        end.of_array(np.zeros((4, 4), np.float32))
    shutil.copytree(tiny("mistral3"), tmp_path / "m")
    plan, named = artifact_plan(a), "[IMG_BREAK]"
    assert gguf.plan(plan, FormatOptions()).refusals == []
    edit(tmp_path / "m" / "tokenizer.json", lambda t: t["added_tokens"].pop(-2))
    config = tmp_path / "m" / "tokenizer_config.json"
    edit(config, lambda t: t["additional_special_tokens"].remove(named))
    (said,) = gguf.plan(replace(plan, folder=tmp_path / "m"), FormatOptions()).refusals
    assert f"{named} is no token" in said


def tokenizer_of(source):
    return json.loads((source / "tokenizer.json").read_text("utf-8"))


def test_what_qwen3_5_says_of_its_layers(artifact):
    """As llama.cpp's converter writes it."""
    keys = Layout.of(artifact("qwen3_5").architecture).text_params.keys()
    said = {k.removeprefix("qwen35."): v for k, v in keys.items() if "ssm" in k or "_int" in k}
    assert said == {
        "full_attention_interval": 2,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 512,
    }
    assert keys["qwen35.rope.dimension_count"] == 64  # a quarter of a head
    assert keys["qwen35.rope.dimension_sections"] == [11, 11, 10, 0]
    assert keys["qwen35.attention.key_length"] == 256


def test_value_heads_stand_in_the_order_of_llama_cpp(artifact):
    """Of two for each key head, the first of all come first. Queries and keys stay as they are."""
    a = artifact("qwen3_5")
    layout, weights = Layout.of(a.architecture), Weights(a.path)

    def both(name: str) -> tuple[np.ndarray, np.ndarray]:
        place = layout.text[f"blk.0.{name}"]
        source = weights.array(place.hub)
        return source, place.of(torch.from_numpy(source)).numpy()

    tiled = np.array([0, 2, 1, 3])
    heads = (tiled[:, None] * 128 + np.arange(128)).ravel()
    mixed = np.concatenate([np.arange(512), 512 + heads])
    for name, rows in {
        "attn_qkv.weight": mixed,
        "attn_gate.weight": heads,
        "ssm_alpha.weight": tiled,
        "ssm_beta.weight": tiled,
        "ssm_dt.bias": tiled,
    }.items():
        source, own = both(name)
        assert np.array_equal(own, source[rows]), name
    source, own = both("ssm_conv1d.weight")
    assert np.array_equal(own, source[mixed, 0])
    source, own = both("ssm_a")
    assert np.array_equal(own, -torch.from_numpy(source[tiled]).exp().numpy())
    source, own = both("ssm_out.weight")
    assert np.array_equal(own, source[:, heads])
    source, own = both("ssm_norm.weight")
    assert np.array_equal(own, source)  # the one norm here without 1 + weight
    source, own = both("attn_norm.weight")
    assert np.array_equal(own, 1 + source)


def test_as_many_value_heads_as_key_heads_stay_in_order(tiny):
    """As in the published models of 0.8B and 2B: a row is one run, whatever the blocks."""
    config = config_of(tiny("qwen3_5"))
    text = {**config[TEXT], "linear_num_value_heads": 2}
    layout = Layout.of(Architecture.of({**config, TEXT: text}))
    places = [layout.text[f"blk.0.{n}.weight"] for n in ("attn_qkv", "attn_gate", "ssm_out")]
    assert not any(place.part or place.heads for place in places)
    assert places[-1].run == 256


@pytest.mark.parametrize("tag", ["w4", "w4g32", "w2g128", "w8g128"])
def test_packed_columns_are_moved_with_their_scales(tag, tiny, tmp_path):
    a = rtn_artifact(tmp_path, GRIDS[tag], tiny("qwen3_5"))
    place = Layout.of(a.architecture).text["blk.0.ssm_out.weight"]
    linear = a.linear(place.hub.removesuffix(".weight"))
    assert torch.equal(in_order(linear, place).decode(), place.of(linear.decode()))
    assert not torch.equal(in_order(linear, place).decode(), linear.decode())


def test_groups_that_span_heads_are_refused_in_the_plan(tiny, tmp_path):
    a = rtn_artifact(tmp_path / "a", GRIDS["w4g256"], tiny("qwen3_5"))
    (refusal,) = gguf.plan(artifact_plan(a), FormatOptions()).refusals
    assert "out_proj: llama.cpp has its heads of 128 columns in another order" in refusal
    with pytest.raises(FormatError, match="use --group-size 32, 64, 128 or -1"):
        gguf.write(a, tmp_path / "out", FormatOptions())


def test_a_mix_takes_blocks_that_lie_within_a_head(artifact):
    plan = artifact_plan(artifact("qwen3_5"))
    layer = "model.language_model.layers.0.linear_attn"
    types = module_types(plan, "Q4_K_M", ["ssm_out=Q6_K"])
    assert types[f"{layer}.out_proj"] == "Q8_0"  # in the place of Q6_K
    assert module_types(plan, "Q4_K_M")[f"{layer}.out_proj"] == "Q5_0"
    more = module_types(plan, "Q3_K_M")  # where values are given more bits
    assert more[f"{layer}.in_proj_qkv"] == "Q5_K" and more[f"{layer}.in_proj_z"] == "Q3_K"
    assert not any("in_proj_a" in n or "in_proj_b" in n or "conv1d" in n for n in types)
    choices = module_choices(plan, 3.0)
    assert {*choices[f"{layer}.out_proj"]} == {"Q4_0", "Q5_0", "Q5_1", "Q8_0"}
    assert "Q2_K" in choices[f"{layer}.in_proj_z"]


def test_where_the_class_row_goes(artifact):
    a = artifact("internvl")
    rows = Weights(a.path).array("vision_tower.embeddings.position_embeddings")[0]
    last = tower_of(a, class_row="last")["v.position_embd.weight"]
    first = tower_of(a, class_row="first")["v.position_embd.weight"]
    assert np.array_equal(first, rows)
    assert np.array_equal(last[:-1], rows[1:]) and np.array_equal(last[-1], rows[0])


TEXT, VISION = "text_config", "vision_config"
LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}
MINISTRAL = tiny_families.FAMILIES["ministral3"].config[TEXT]["rope_parameters"]
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mrope_section": [11, 11, 10]}}


@pytest.mark.parametrize(
    "arch, where, change, said",
    [
        ("qwen3_vl", VISION, {"hidden_act": "gelu"}, "qwen3vl_merger knows only gelu_pytorch_tanh"),
        ("qwen3_vl", VISION, {"deepstack_visual_indexes": [0, 1, 2]}, "fails at the last of 3"),
        ("qwen3_vl", TEXT, {"attention_bias": True}, "attention_bias"),
        ("qwen3_vl", TEXT, YARN, "rope type yarn"),
        ("qwen3_5", TEXT, {"layer_types": ["full_attention", "linear_attention"]}, "every n-th"),
        ("qwen3_5", TEXT, {"linear_key_head_dim": 64}, "knows only heads of one width"),
        ("qwen3_5", VISION, {"deepstack_visual_indexes": [1]}, "deepstack_visual_indexes"),
        ("internvl", TEXT, {"model_type": "llama"}, "model_type is llama"),
        ("internvl", VISION, {"norm_type": "rms_norm"},
         "norm_type is rms_norm; .* RMS norms .* 3200 columns and 45 layers"),
        ("internvl", VISION, {"use_qk_norm": True}, "use_qk_norm"),
        ("internvl", VISION, {"image_size": [448, 224]}, "only squares"),
        ("internvl", None, {"vision_feature_layer": -2}, "vision_feature_layer"),
        ("internvl", TEXT, {"head_dim": 32}, "head_dim 32"),
        ("idefics3", TEXT, {"attention_bias": True}, "attention_bias"),
        ("idefics3", TEXT, {"mlp_bias": True}, "mlp_bias"),
        ("idefics3", TEXT, {"model_type": "mistral"}, "llama.cpp's llama knows only llama"),
        ("smolvlm", TEXT, YARN, "rope type yarn"),
        ("smolvlm", VISION, {"hidden_act": "gelu"}, "idefics3 knows only gelu_pytorch_tanh"),
        ("smolvlm", VISION, {"intermediate_size": 256}, "as wide as the tower"),
        ("llava_onevision", TEXT, {"use_sliding_window": True}, "use_sliding_window"),
        ("llava_onevision", VISION, {"model_type": "clip_vision_model"}, "siglip_vision_model"),
        ("llava_onevision", VISION, {"intermediate_size": 256}, "as wide as the tower"),
        ("llava_onevision", None, {"vision_feature_select_strategy": "default"}, "knows only full"),
        ("llava_onevision", None, {"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ("gemma3", TEXT, {"query_pre_attn_scalar": 64}, "is 64; .* knows only 128 at 2 layers"),
        ("gemma3", TEXT, {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope type yarn"),
        ("gemma3", TEXT, {"rope_parameters": LOCAL}, "rope type linear of sliding_attention"),
        ("gemma3", TEXT, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ("gemma3", TEXT, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
        ("gemma3", TEXT, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", TEXT, {"attention_bias": True}, "attention_bias"),
        ("gemma3", TEXT, {"hidden_activation": "silu"}, "knows only gelu_pytorch_tanh"),
        ("gemma3", VISION, {"hidden_act": "gelu"}, "gemma3 knows only gelu_pytorch_tanh"),
        ("gemma3", None, {"mm_tokens_per_image": 15}, "15 tokens of an image of 8 × 8 patches"),
        ("gemma3", None, {"mm_tokens_per_image": 9}, "9 tokens of an image of 8 × 8 patches"),
        ("mistral3", TEXT, {"model_type": "llama"}, "llama.cpp's mistral3 knows only mistral"),
        ("mistral3", TEXT, {"sliding_window": 4096}, "sliding_window is 4096"),
        ("mistral3", TEXT, {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06; .* projector's norm"),
        ("mistral3", TEXT, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
         "rope type linear"),
        ("mistral3", VISION, {"hidden_act": "gelu"}, "pixtral knows only silu"),
        ("mistral3", VISION, {"rope_theta": 1e5}, "rope_theta is 100000.0; .* knows only 10000"),
        ("mistral3", VISION, {"head_dim": 32}, "head_dim is 32; .* knows only 64"),
        ("mistral3", None, {"multimodal_projector_bias": True}, "multimodal_projector_bias"),
        ("mistral3", None, {"vision_feature_layer": -2}, "vision_feature_layer"),
        *(("ministral3", TEXT, {"rope_parameters": MINISTRAL | change}, said) for change, said in (
            ({"mscale": 0.7}, "mscale is 0.7; llama.cpp's YaRN knows only 1.0"),
            ({"attention_factor": 1.2}, "attention_factor is 1.2"),
            ({"truncate": False}, "truncate is False"),
            ({"rope_type": "default", "type": "default"}, "rope type default"),
        )),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_express_is_refused_by_name(tiny, arch, where, change, said):
    config = config_of(tiny(arch, **SHAPE.get(arch, {})))
    config = {**config, where: {**config[where], **change}} if where else {**config, **change}
    with pytest.raises(FormatError, match=said):
        Layout.of(Architecture.of(config))


def test_a_family_without_an_entry_is_refused_by_name():
    said = "model_type paligemma is not written to GGUF; known are qwen2_vl"
    with pytest.raises(FormatError, match=said):
        graphs_of(Architecture({}, Family("paligemma", "", (), ()), tied=False))
