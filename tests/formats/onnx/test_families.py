"""The parts of the traced graphs that handle images and positions, run in torch.

They are compared with the code of the models in transformers.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from tests.artifacts import ROPE_KEYS
from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.graphs.build import float_graphs
from vlmq_export.formats.onnx.graphs.families import graph_refusals
from vlmq_export.formats.onnx.graphs.traced import empty
from vlmq_export.formats.onnx.graphs.traced_positions import Rotary, seen_keys
from vlmq_export.formats.onnx.graphs.traced_text import Embedding, Text
from vlmq_export.formats.onnx.graphs.traced_vision import (
    LlavaOnevision,
    hidden_state,
    patch_grid,
    resized,
    taps,
)
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import FAMILIES

# Images as (frames, height / 2, width / 2), in patches.
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
GRIDS = st.lists(SIZES, min_size=1, max_size=4)


@settings(deadline=None)
@given(GRIDS)
def test_patches_find_their_place(images):
    grid = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in images])
    patches = int(grid.prod(1).sum())
    frame, row, column, height, width = patch_grid(patches, grid, 2)
    assert torch.equal(torch.stack([row, column], 1), get_vision_position_ids(grid, 2))
    lengths = [int(h * w) for t, h, w in grid for _ in range(t)]
    assert torch.equal(frame, torch.repeat_interleave(torch.tensor(lengths)))
    assert int(height[-1]) == grid[-1, 1] and int(width[-1]) == grid[-1, 2]


@settings(deadline=None)
@given(GRIDS, st.integers(2, 48))
def test_learned_positions_are_sampled_as_the_model_does(images, side):
    grid = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in images])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    draw = torch.Generator().manual_seed(side)
    table = torch.randn(side * side, 5, dtype=torch.float64, generator=draw)
    want = (table[indices] * weights[..., None].double()).sum(1)
    _, row, column, height, width = patch_grid(int(grid.prod(1).sum()), grid, 2)
    (top, bottom, down), (left, right, along) = taps(row, height, side), taps(column, width, side)
    down, along = down.double()[:, None], along.double()[:, None]
    upper = table[top * side + left] * (1 - along) + table[top * side + right] * along
    lower = table[bottom * side + left] * (1 - along) + table[bottom * side + right] * along
    assert torch.allclose(upper * (1 - down) + lower * down, want, atol=1e-6)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_rows_are_resized_as_torch_does(source, target):
    values = torch.randn(source, generator=torch.Generator().manual_seed(source))
    image = values[None, None, :, None]
    want = torch.nn.functional.interpolate(image, (target, 1), mode="bilinear")[0, 0, :, 0]
    first, second, share = resized(torch.arange(target), torch.tensor(source), torch.tensor(target))
    assert torch.allclose(values[first] * (1 - share) + values[second] * share, want, atol=2e-5)


def onevision(side: int, patch: int, most: int, largest: int) -> SimpleNamespace:
    """A LLaVA-OneVision model without weights: what is read of it to lay out the tiles of an image.

    side: of a tile, in pixels.
    most: tiles whose features are kept at full resolution.
    largest: tiles along the longest side of a resolution that an image may be given.
    """
    vision = SimpleNamespace(image_size=side, patch_size=patch)
    pinpoints = [[side * i, side * j] for i in range(1, largest + 1) for j in range(1, largest + 1)]
    config = SimpleNamespace(
        vision_config=vision,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=f"anyres_max_{most}",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    parts = SimpleNamespace(
        vision_tower=SimpleNamespace(encoder=SimpleNamespace(layers=torch.nn.ModuleList())),
        multi_modal_projector=None,
        image_newline=torch.zeros(1),
    )
    return SimpleNamespace(model=parts, config=config)


PUBLISHED = onevision(384, 14, 9, 6)
TINY = onevision(104, 14, 9, 6)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.booleans())
def test_a_picture_has_as_many_rows_as_in_the_model(height, width, published):
    """A row more or less would change the number of tokens, so the rounding must be Python's."""
    model = PUBLISHED if published else TINY
    size, side = [height, width], model.config.vision_config.image_size
    # The size that was drawn, and a square of whole tiles.
    for h, w in (size, [side * (1 + height % 6)] * 2):
        layout = LlavaOnevision(model)._picture(torch.tensor([h, w]))
        try:
            want = packed(model, h, w)
        except RuntimeError:
            # The image would be less than a row high, which torch refuses in the model as well.
            continue
        rows, columns = layout[2]
        assert int(rows) * (int(columns) + 1) == want, (h, w)


def packed(model, height: int, width: int) -> int:
    """Number of features after those of the first tile, newlines included, by the model's code."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    tall, wide = best(model, height, width)
    tiles = torch.zeros(1 + tall * wide, side * side, 1)
    size, newline = torch.tensor([[height, width]]), torch.zeros(1)
    _, lengths = LlavaOnevisionModel.pack_image_features(
        model, [tiles], size, newline, model.config.vision_aspect_ratio
    )
    return int(lengths[0]) - side * side


def best(model, height: int, width: int) -> tuple[int, int]:
    """Tiles down and across, as the model chooses them."""
    size = model.config.vision_config.image_size
    tall, wide = select_best_resolution((height, width), model.config.image_grid_pinpoints)
    return tall // size, wide // size


def test_features_go_to_their_tokens_and_too_few_are_an_error():
    words = torch.nn.Embedding(10, 3)
    model = SimpleNamespace(get_input_embeddings=lambda: words)
    embedding = Embedding(model, image_token=9, deepstack=1)
    ids = torch.tensor([[1, 9, 2], [9, 9, 3]])
    features = torch.arange(18.0).reshape(3, 6)
    with torch.no_grad():
        got = embedding(ids, features)
        assert torch.equal(got[ids == 9], features)
        assert torch.equal(got[ids != 9], torch.cat([words(ids[ids != 9]), torch.zeros(3, 3)], 1))
        assert torch.equal(embedding(ids[:, 2:], features[:0])[..., :3], words(ids[:, 2:]))
        with pytest.raises(IndexError):
            embedding(ids, features[:2])
        # Without features an image token was generated, and is embedded as a word. The models
        # themselves do the same.
        assert torch.equal(embedding(ids, features[:0])[..., :3], words(ids))


def test_marked_embeddings_tell_images_from_words():
    words = torch.nn.Embedding(10, 3)
    words.embed_scale, words.scalar_embed_scale = torch.tensor(2.0), 2.0
    model = SimpleNamespace(get_input_embeddings=lambda: words)
    ids, features = torch.tensor([[1, 12, 2], [12, 12, 3]]), torch.arange(9.0).reshape(3, 3)
    with torch.no_grad():
        got = Embedding(model, image_token=12, marked=True)(ids, features)  # no word of the table
        assert torch.equal(got[..., 3], (ids == 12).float())
        assert torch.equal(got[ids == 12][:, :3], features)
        assert torch.equal(got[ids != 12][:, :3], 2 * words(ids[ids != 12]))
        # A token that was generated is a word, and sees what words see.
        generated = Embedding(model, image_token=9, marked=True)(torch.tensor([[9]]), features[:0])
        assert torch.equal(generated[0, 0], torch.cat([2 * words.weight[9], torch.zeros(1)]))


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(-30, 30))
def test_hidden_states_are_counted_as_in_a_list(layers, index):
    states = list(range(layers + 1))  # state k is the output of k layers
    if not -len(states) <= index < len(states):
        return
    assert hidden_state(index, torch.nn.ModuleList([torch.nn.Identity()] * layers)) == states[index]


def test_no_weight_is_in_memory():
    """Every parameter has its shape, and the storage of a single element."""
    first = torch.nn.Linear(4000, 3000, device="meta")
    model = torch.nn.Sequential(first, torch.nn.Linear(3000, 4000, device="meta"))
    model[1].bias = model[0].bias  # tied
    empty(model, lambda name: torch.float16 if name == "1.weight" else torch.float32)
    assert model[0].weight.shape == (3000, 4000) and model[1].bias is model[0].bias
    assert [p.untyped_storage().nbytes() for p in model.parameters()] == [4, 4, 2]


def language(**changes):
    """A Qwen2 of one layer, in the place that the language model has in a vision-language model."""
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
        **changes,
    )
    model = Qwen2ForCausalLM(config)
    model.model.language_model = model.model
    return model


def test_positions_that_depend_on_the_prompts_length_are_refused():
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
    }
    with pytest.raises(FormatError, match="longrope"):
        Rotary(language(rope_parameters=rope).model)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.lists(st.booleans(), min_size=9, max_size=9)),
             min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
)  # fmt: skip
def test_what_a_token_sees(rows, new, window):
    """One key at a time, by the words of the docstring. A row is its padding, and its images."""
    total, past = 9, 9 - new
    mask = torch.tensor([[int(i >= pad) for i in range(total)] for pad, _ in rows])
    image = torch.tensor([marks[past:] for _, marks in rows])
    got = seen_keys(mask, image, window)
    assert {g.shape for g in got.values()} == {(len(rows), 1, new, total)}
    for b, (pad, marks) in enumerate(rows):
        for query in range(past, total):
            for key in range(total):
                one_image = query >= past and key > query and all(marks[query : key + 1])
                full = key >= pad and (key <= query or one_image)
                place = (b, 0, query - past, key)
                assert got["full_attention"][place] == full
                assert got["sliding_attention"][place] == (full and key > query - window)


def test_sliding_windows_are_refused():
    with pytest.raises(FormatError, match="sliding_attention"):
        model = language(use_sliding_window=True, sliding_window=8, max_window_layers=0)
        Text(model, FAMILIES["internvl"])


@pytest.mark.parametrize(
    "arch",
    [
        "internvl",
        "smolvlm",
        "gemma3",
        *(
            pytest.param(arch, marks=pytest.mark.slow)
            for arch in (
                *("qwen3_vl", "qwen3_vl_moe", "qwen3_5"),
                *("llava_onevision", "idefics3", "ministral3"),
            )
        ),
    ],
)
def test_every_weight_of_the_checkpoint_is_a_parameter_of_a_graph(tiny, arch, capfd):
    source = tiny(arch)
    known = set(Checkpoint(source).tensors)
    capfd.readouterr()
    graphs = float_graphs(source, known)
    assert capfd.readouterr().out == ""  # stdout is for the result of `--json`
    values = [v for g in graphs.values() for v in g.graph.initializers.values()]
    assert {v.name for v in values if v.const_value is None} == known
    constants = [v.const_value for v in values if v.const_value is not None]
    assert sum(np.prod(c.shape) for c in constants) < 200


SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
FLAT_SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


def scaled(kind: str) -> dict:
    """Scaled rotary positions as transformers 4 saved them."""
    return {"rope_scaling": {"type": kind, "mrope_section": [8, 12, 12], **ROPE_KEYS[kind]}}


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
PHI = {"text_config": {"model_type": "phi"}}


@pytest.mark.parametrize(
    ("arch", "change", "words"),
    [
        ("internvl", {"text_config": SLIDING}, "sliding"),
        ("internvl", {"vision_feature_layer": [-1, -2]}, "one vision layer"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "every patch"),
        ("llava_onevision", PHI, "do not know this llava_onevision"),
        ("qwen2_vl", FLAT_SLIDING, "sliding"),
        ("qwen2_vl", scaled("yarn"), "yarn"),
        ("qwen2_vl", scaled("linear"), "linear"),
        ("qwen2_vl", scaled("dynamic"), "dynamic"),
        ("qwen2_5_vl", {"text_config": scaled("yarn")}, "yarn"),
        ("qwen2_5_vl", {"text_config": scaled("llama3")}, "llama3"),
        ("qwen2_5_vl", {"text_config": scaled("longrope")}, "longrope"),
        ("qwen3_vl", {"text_config": scaled("longrope")}, "longrope"),
        ("qwen3_vl", {"text_config": scaled("yarn")}, None),  # traced, with scaled frequencies
        ("internvl", {"text_config": scaled("dynamic")}, None),  # as it was published
        ("idefics3", {"text_config": {"model_type": "phi"}}, "do not know this idefics3"),
        ("idefics3", {"vision_config": {"image_size": 350}}, "25 patches along a side"),
        ("smolvlm", {"text_config": scaled("yarn")}, None),
        ("internvl3_5", {}, None),
        ("gemma3", {}, None),
        ("gemma3", {"text_config": {"use_bidirectional_attention": True}}, "see both ways"),
        ("gemma3", {"text_config": {"rope_scaling": LONG}}, "longrope"),
        ("mistral3", {}, None),
        ("ministral3", {}, None),
        ("mistral3", {"text_config": {"sliding_window": 64}}, "sliding_window"),
        ("mistral3", {"vision_feature_layer": [-1, -2]}, "one vision layer"),
        ("qwen3_vl_moe", {}, None),
        ("qwen3_5", {}, None),
        ("qwen3_5", {"text_config": {"hidden_act": "gelu"}}, "no gelu in a linear attention"),
        ("qwen3_5", {"text_config": {"layer_types": ["conv"] * 2}}, "conv"),
        ("qwen2_vl", {}, None),
        ("qwen3_vl", {}, None),
        ("smolvlm", {}, None),
    ],
)
def test_what_the_graphs_lack_is_refused_before_anything_is_quantized(tiny, arch, change, words):
    config = json.loads((tiny(arch) / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**(config.get(key) or {}), **value} if isinstance(value, dict) else value
    found = graph_refusals(Architecture.of(config))
    if words is None:
        assert found == []
    else:
        assert words in found[0] and "\n" not in found[0]


@pytest.mark.parametrize("names", [None, [], ["Foo"], ["InternVLModel"], ["Qwen2ForCausalLM"]])
def test_the_class_is_that_of_model_type_whichever_was_saved(tiny, names):
    config = json.loads((tiny("internvl") / "config.json").read_text())
    assert graph_refusals(Architecture.of(config | {"architectures": names})) == []
