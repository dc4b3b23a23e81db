"""The bundled reference VLM: its data, its weights, and the tools that make both.

The tests need matplotlib (DejaVu fonts) and scikit-learn (handwritten digits). The bytes of the
bundled images depend on Pillow: its FreeType draws the glyphs and its zlib packs the PNGs. They
were drawn with Pillow 13.0.0 (FreeType 2.14.3, zlib-ng 2.3.3), numpy 2.4.6, matplotlib 3.11.2
(DejaVu 2.37) and scikit-learn 1.9.1. After an update that changes them, run
tools/reference_vlm/make_data.py again and score again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor

from tools.reference_vlm import drawing, make_data, model, score, training

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = model.BUNDLED / "data"
PATCH_TOLERANCE = 1e-6  # (x / 255 - mean) / std is computed in another order
QUESTION = "Read the text."


def records(split: str, folder: Path = DATA) -> list[dict]:
    return json.loads((folder / f"{split}.json").read_text())


def fingerprints(split: str) -> set[str]:
    """One hash of the pixels for each image of a bundled set."""
    hashes = set()
    for record in records(split):
        image = Image.open(DATA / record["image"])
        hashes.add(hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest())
    return hashes


@pytest.fixture(scope="module")
def tokenizer():
    return model.load_tokenizer()


# --- data -----------------------------------------------------------------------------------------


def test_no_image_is_in_both_sets():
    calibration, heldout = fingerprints("calibration"), fingerprints("heldout")
    assert len(calibration) == len(heldout) == 512
    assert not calibration & heldout
    assert len(list((DATA / "images").iterdir())) == 1024


def test_no_handwritten_digit_is_in_both_pools():
    assert not set(drawing.TRAINING_DIGITS) & set(drawing.HELDOUT_DIGITS)
    bitmaps, targets = drawing.handwriting()
    assert len(bitmaps) == len(targets) == drawing.DIGIT_COUNT


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_regenerating_gives_the_bundled_bytes(tmp_path, split):
    make_data.make_data(tmp_path, make_data.Split(split), rows=10)
    assert records(split, tmp_path) == records(split)[:10]
    for record in records(split, tmp_path):
        drawn, bundled = tmp_path / record["image"], DATA / record["image"]
        assert drawn.read_bytes() == bundled.read_bytes(), record["id"]


def test_another_set_shares_nothing_with_the_first():
    def pixels(seed: int, row: int) -> bytes:
        return make_data.draw_row(make_data.Split.calibration, seed, row)[1].image.tobytes()

    first, second = ({pixels(seed, row) for row in range(20)} for seed in (0, 1))
    assert len(first) == len(second) == 20
    assert not first & second


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_rows_are_in_the_llava_layout(split):
    for place, record in enumerate(records(split)):
        assert record["id"] == f"{split}-{place:04d}"
        assert record["image"] == f"images/{record['id']}.png"
        human, gpt = record["conversations"]
        assert human["from"] == "human" and human["value"].startswith("<image>\n")
        assert gpt["from"] == "gpt" and gpt["value"]
        with Image.open(DATA / record["image"]) as image:
            assert image.mode == "RGB" and image.size in drawing.SIZES


def test_heldout_asks_the_five_tasks_in_turn():
    in_turn = list(drawing.TASKS)
    asked = [record["task"] for record in records("heldout")]
    assert asked == [in_turn[row % 5] for row in range(512)]
    assert {record["task"] for record in records("calibration")} == set(in_turn)


@pytest.mark.parametrize("task", drawing.TASKS)
@pytest.mark.parametrize("size", drawing.SIZES)
def test_labels_stand_on_the_image(task, size):
    for seed in range(20):
        row = drawing.TASKS[task](RandomState(seed), *size, easy=0.5)
        assert row.image.size == size and row.answer and row.labels
        for label in row.labels:
            assert label.name in drawing.NAMES
            # A wide text may run a little over the right edge; training clamps it to the last cell.
            assert 0 <= label.x < size[0] + 28 and 0 <= label.y < size[1] + 28


# --- checkpoint -----------------------------------------------------------------------------------


def test_bundled_checkpoint_is_what_its_config_says(tokenizer):
    loaded = model.load_model(model.BUNDLED)
    config = loaded.config
    assert config.model_type == "qwen2_5_vl"
    assert len(tokenizer) == config.text_config.vocab_size == 384
    with safe_open(model.BUNDLED / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert all(part.get_dtype() == "BF16" for part in stored.values())
        weights = {hub_name(name): weight for name, weight in loaded.named_parameters()}
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        assert {name: part.get_shape() for name, part in stored.items()} == shapes
        for name, weight in weights.items():
            assert torch.equal(file.get_tensor(name).float(), weight), name


def hub_name(parameter: str) -> str:
    """The name in the checkpoint of a parameter of transformers' model."""
    name = parameter.replace("model.visual.", "visual.")
    return name.replace("model.language_model.", "model.")


def test_config_builder_gives_the_bundled_config(tokenizer):
    bundled = json.loads((model.BUNDLED / "config.json").read_text())
    built = model.make_config("qwen2_5_vl", tokenizer).to_dict()
    for part in ("text_config", "vision_config"):
        assert {key: built[part].get(key) for key in bundled[part]} == bundled[part]
    for key, value in bundled.items():
        if key.endswith("token_id") or key == "tie_word_embeddings":
            assert built[key] == value


def test_bundled_checkpoint_answers(tokenizer):
    """A quick check on 50 rows. The scores in the model card are those of all 512."""
    rows = score.load_rows(DATA / "heldout.json", 50)
    assert score.exact_match(model.load_model(model.BUNDLED), tokenizer, rows)["all"] > 0.6


def test_patches_are_those_of_the_image_processor(tokenizer):
    images = [Image.open(DATA / record["image"]) for record in records("heldout")[:4]]
    theirs = AutoImageProcessor.from_pretrained(model.BUNDLED)(images, return_tensors="pt")
    ours = model.make_batch(tokenizer, [(image, QUESTION, None) for image in images])
    pixels = (ours["pixel_values"], theirs["pixel_values"])
    torch.testing.assert_close(*pixels, atol=PATCH_TOLERANCE, rtol=0)
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])


def test_prompt_is_the_chat_template(tokenizer):
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert model.prompt(QUESTION, 1) == written


QWEN2 = ("qwen2_5_vl", "qwen2_vl")  # Qwen3.5 is trained by tools/bench/linear_attention.py


@pytest.mark.parametrize("arch", QWEN2)
def test_random_checkpoint_is_reproducible_and_not_degenerate(tmp_path, arch, tokenizer):
    first = model.make_random_checkpoint(tmp_path / "first", arch)
    second = model.make_random_checkpoint(tmp_path / "second", arch)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    with safe_open(first / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {"model.layers.3.self_attn.q_proj.bias", "visual.blocks.3.attn.qkv.weight"} <= names
        assert all(file.get_tensor(name).float().std() > 0.01 for name in names)

    loaded = model.load_model(first)
    assert loaded.config.model_type == arch
    files = [DATA / record["image"] for record in records("heldout")[:6]]
    images = [Image.open(file).resize((84, 84)) for file in files]
    inputs = model.make_batch(tokenizer, [(image, QUESTION, None) for image in images])
    inputs.pop("labels")
    with torch.inference_mode():
        logits = loaded(**inputs).logits[:, -1]
    assert logits.isfinite().all() and logits.std() > 0.5
    assert logits.std(0).mean() > 0.2  # the image matters


# --- training -------------------------------------------------------------------------------------

SMALL = training.Settings(batch_size=4)


@pytest.mark.parametrize("arch", QWEN2)
def test_steps_on_one_batch_reduce_its_loss(arch, tokenizer):
    trainer = training.Trainer(training.Settings(arch, batch_size=4), tokenizer)
    phase = training.Phase(learning_rate=1e-3, easy=1.0, localisation=1.0, size=drawing.SIZES[0])
    rng = RandomState(0)
    rows = [training.draw(rng, phase) for _ in range(4)]
    losses = np.array([trainer.step_on(rows, phase) for _ in range(6)])
    assert (losses[-1] < losses[0] - [0.5, 0.1]).all(), losses


def test_resumed_training_takes_the_same_step(tmp_path, tokenizer):
    unbroken = training.Trainer(SMALL, tokenizer)
    unbroken.step(0.0)
    unbroken.save(tmp_path / "state.safetensors")
    resumed = training.Trainer(SMALL, tokenizer)
    resumed.load(tmp_path / "state.safetensors")
    for progress in (0.1, 0.5):
        assert unbroken.step(progress) == resumed.step(progress)
    for (name, one), two in zip(unbroken.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(one, two), name
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_resuming_refuses_other_settings(tmp_path, tokenizer):
    training.Trainer(SMALL, tokenizer).save(tmp_path / "state.safetensors")
    other = training.Trainer(training.Settings(batch_size=8), tokenizer)
    with pytest.raises(ValueError, match="batch_size"):
        other.load(tmp_path / "state.safetensors")


def test_saved_model_loads_and_says_the_same(tmp_path, tokenizer):
    trainer = training.Trainer(training.Settings("qwen2_vl", batch_size=2), tokenizer)
    trainer.step(0.0)
    model.save_model(trainer.model, tmp_path)
    loaded = model.load_model(tmp_path)
    for (name, one), two in zip(trainer.model.named_parameters(), loaded.parameters()):
        assert torch.equal(one.bfloat16().float(), two), name
    bundled = (model.BUNDLED / "tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == bundled
    assert not list(tmp_path.glob(".*"))


def test_training_starts_from_the_other_architecture(tokenizer):
    settings = training.Settings("qwen2_vl", batch_size=2)
    other = training.Trainer(settings, tokenizer, init=model.BUNDLED / "model.safetensors")
    taken, total = other.taken
    assert 100 < taken < total  # the norms of Qwen2-VL's vision tower have biases
    with safe_open(model.BUNDLED / "model.safetensors", "pt") as bundled:
        first = bundled.get_tensor("model.layers.0.mlp.down_proj.weight").float()
    assert torch.equal(other.model.model.language_model.layers[0].mlp.down_proj.weight, first)


def test_schedule_goes_from_easy_to_hard():
    phases = [training.schedule(SMALL, step=300, progress=progress) for progress in (0.0, 0.2, 0.9)]
    assert [phase.easy for phase in phases] == pytest.approx([0.9, 0.3, 0.0])
    assert [phase.localisation for phase in phases] == pytest.approx([1.0, 0.75, 0.0])
    assert phases[0].learning_rate > phases[1].learning_rate > phases[2].learning_rate > 0


def test_cells_put_a_label_where_it_stands():
    row = drawing.Drawing(Image.new("RGB", (84, 84)), "", "", [drawing.Label("7", 30.0, 60.0)])
    target = training.cells(row)  # 3 × 3 tokens of 28 × 28 pixels
    assert target.sum() == 1 and target[2 * 3 + 1, drawing.NAMES.index("7")] == 1
