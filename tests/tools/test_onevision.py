"""The second reference VLM, a small LLaVA-OneVision: its files, inputs, answers and training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from PIL import Image
from safetensors import safe_open

from tools.reference_vlm import distillation, drawing, make_data, model, onevision, score, training
from vlmq_export import bundled
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = onevision.FOLDER
DATA = model.BUNDLED / "data"
QUESTION = "Read the text."


@pytest.fixture(scope="module")
def tokenizer():
    return model.load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def loaded():
    return model.load_model(FOLDER)


@pytest.fixture(scope="module")
def rows():
    return read_rows(bundled.HELDOUT)[:4]


def round_to_nearest(linear: torch.nn.Linear, bits: int) -> None:
    """Round the weight on an asymmetric min-max grid for each output channel."""
    weight = linear.weight.data
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    linear.weight.data = ((torch.round(weight / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale


# --- checkpoint -----------------------------------------------------------------------------------


def test_checkpoint_is_small_and_has_the_published_names(loaded):
    assert loaded.config.model_type == "llava_onevision"
    assert (FOLDER / "model.safetensors").stat().st_size <= 16e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert all(file.get_slice(name).get_dtype() == "BF16" for name in names)
        tensors = [name for name in names if file.get_slice(name).get_shape() != []]
    parts = {".".join(name.split(".")[:2]) for name in names if "." in name}
    projector = {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}
    assert parts == {"language_model.model", "vision_tower.vision_model"} | projector
    assert len(tensors) == len(dict(loaded.named_parameters()))


def test_config_builder_gives_the_checkpoints_config(tokenizer):
    stored = json.loads((FOLDER / "config.json").read_text())
    built = onevision.make_config(tokenizer).to_dict()
    for part in ("text_config", "vision_config"):
        assert {key: built[part].get(key) for key in stored[part]} == stored[part]
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert built["image_token_index"] == stored["image_token_index"] == image_token


def test_decoder_fits_every_k_quant(loaded):
    for name, linear in loaded.model.language_model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            assert linear.in_features % 256 == 0, name


def test_checkpoint_answers(loaded, tokenizer):
    """A quick check on 60 rows. The scores in the model card are those of all 512."""
    asked = score.load_rows(DATA / "heldout.json", 60)
    assert score.exact_match(loaded, tokenizer, asked)["all"] > 0.45


@pytest.mark.slow
def test_three_bits_per_channel_cost_ten_points(tokenizer):
    asked = score.load_rows(DATA / "heldout.json")
    full = score.exact_match(model.load_model(FOLDER), tokenizer, asked)["all"]
    rounded = model.load_model(FOLDER)
    for module in rounded.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            round_to_nearest(module, 3)
    assert full >= 0.605  # 80 % of the first reference's .756; measured are .648
    assert score.exact_match(rounded, tokenizer, asked)["all"] <= full - 0.10


# --- inputs ---------------------------------------------------------------------------------------


def test_inputs_are_those_the_package_makes(tokenizer, rows):
    """`Preprocessor` makes the same ids, pixels and layout of the image from the same folder."""
    preprocessor = Preprocessor(FOLDER)
    for row in rows:
        theirs = preprocessor.sample(row, prompt_only=True).model_inputs()
        question = row.messages[0]["content"][-1]["text"]
        ours = onevision.make_batch(tokenizer, [(Image.open(row.images[0]), question, None)])
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-6, rtol=0)
        assert torch.equal(ours["batch_num_images"], theirs["batch_num_images"])


def test_prompt_is_the_chat_template(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": content}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert onevision.prompt(QUESTION) == written
    turns.append({"role": "assistant", "content": [{"type": "text", "text": "A"}]})
    written = tokenizer.apply_chat_template(turns, tokenize=False)
    assert onevision.prompt(QUESTION, finished=True) + "A<|im_end|>" == written


def test_a_rows_answer_does_not_depend_on_its_company(loaded, tokenizer, rows):
    batch = [(Image.open(row.images[0]), QUESTION, None) for row in rows]
    together = onevision.make_batch(tokenizer, batch)
    alone = onevision.make_batch(tokenizer, batch[:1])
    del together["labels"], alone["labels"]
    with torch.inference_mode():
        one, many = loaded(**alone).logits[0], loaded(**together).logits[0]
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-4)


# --- uneven channels ------------------------------------------------------------------------------


def test_spreading_channels_changes_no_answer_but_every_range(tokenizer, rows):
    before, after = onevision.make_model(onevision.make_config(tokenizer)), model.load_model(FOLDER)
    before.load_state_dict(after.state_dict())
    onevision.spread_channels(after, 1.0)
    batch = [(Image.open(row.images[0]), QUESTION, None) for row in rows]
    inputs = onevision.make_batch(tokenizer, batch)
    del inputs["labels"]
    with torch.inference_mode():
        spread, plain = after(**inputs).logits, before.eval()(**inputs).logits
    torch.testing.assert_close(spread, plain, atol=2e-3, rtol=1e-3)
    layers, spread_layers = (m.model.language_model.layers for m in (before, after))
    for (name, one), two in zip(layers.named_parameters(), spread_layers.parameters()):
        # the factors are powers of two, so that no bfloat16 value is rounded
        assert torch.equal(two, two.bfloat16().float()), name
        changes = "q_proj.bias" not in name and "k_proj.bias" not in name
        assert torch.equal(one, two) != changes, name


# --- training -------------------------------------------------------------------------------------

SMALL = training.Settings("llava_onevision", batch_size=3)


def test_the_decoder_starts_as_the_firsts(tokenizer):
    """The inserted layers add nothing yet, so text gets the logits of the first reference VLM."""
    teacher = model.load_model(model.BUNDLED)
    student = onevision.make_model(onevision.make_config(tokenizer)).eval()
    onevision.start_from(student, teacher)
    ids = torch.arange(7, 300, 11)[None]
    with torch.inference_mode():
        ours, theirs = student(input_ids=ids).logits, teacher(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_tower_starts_with_the_firsts_patches(tokenizer):
    teacher = model.load_model(model.BUNDLED)
    student = onevision.make_model(onevision.make_config(tokenizer)).eval()
    onevision.start_from(student, teacher)
    image = drawing.read(RandomState(0), 112, 112).image
    values, _ = model.patches(image)
    theirs = distillation._row_by_row(teacher.model.visual.patch_embed(torch.from_numpy(values)), 1)
    ours = student.model.vision_tower.embeddings(torch.from_numpy(onevision.tile(image))[None])
    torch.testing.assert_close(ours[..., : onevision.FIRST_WIDTH], theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", drawing.SIZES)
def test_a_teachers_token_stands_under_its_patch(size):
    """A black corner changes most the tokens of that corner in the grid of 8 × 8 tokens."""
    teacher = distillation.Teacher(model.load_model(model.BUNDLED).model.visual)
    plain = Image.new("RGB", size, (240, 240, 240))
    marked = plain.copy()
    marked.paste((0, 0, 0), (size[0] - 24, 0, size[0], 24))
    tokens, blocks = teacher([plain, marked])
    change = (tokens[1] - tokens[0]).float().norm(dim=-1).view(8, 8)
    assert change.argmax().item() in (5, 6, 7, 13, 14, 15, 21, 22, 23)
    assert change[0, 7] > 2 * change[7, 0]
    assert len(blocks) == (4 if size == (112, 112) else 0)


@pytest.mark.slow  # minutes, and what is trained seldom changes
@pytest.mark.parametrize("stage", distillation.Stage)
def test_steps_on_one_batch_reduce_its_loss(stage, tokenizer):
    trainer = distillation.OneVisionTrainer(SMALL, tokenizer)
    phase = distillation.Phase(stage, 4e-4, easy=1.0, taught=0.5, size=(112, 112))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    rng = RandomState(0)
    rows = [trainer.draw(rng, phase) for _ in range(3)]
    losses = np.array([sum(trainer.step_on(rows, phase, RandomState(1))) for _ in range(8)])
    assert losses[-1] < 0.9 * losses[0], losses
    after = dict(trainer.model.named_parameters())
    moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    if stage is distillation.Stage.look:
        assert moved == {"vision_tower", "multi_modal_projector"}
    else:
        assert moved == {"language_model", "image_newline"}


@pytest.mark.slow
def test_resumed_training_takes_the_same_step(tmp_path, tokenizer):
    unbroken = distillation.OneVisionTrainer(SMALL, tokenizer)
    unbroken.step(0.0)
    unbroken.save(tmp_path / "state.safetensors")
    resumed = distillation.OneVisionTrainer(SMALL, tokenizer)
    resumed.load(tmp_path / "state.safetensors")
    for progress in (0.1, 0.5):
        assert unbroken.step(progress) == resumed.step(progress)
    for (name, one), two in zip(unbroken.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(one, two), name


def test_saved_model_loads_and_says_the_same(tmp_path, tokenizer, loaded):
    onevision.save_model(loaded, tmp_path)
    again = model.load_model(tmp_path)
    for (name, one), two in zip(loaded.named_parameters(), again.parameters()):
        assert torch.equal(one, two), name
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in FOLDER.iterdir()}
    configs = ("preprocessor_config.json", "processor_config.json")
    for name in ("tokenizer.json", "chat_template.jinja", *configs):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_schedule_looks_then_reads():
    times = (0.0, 0.55, 0.65, 0.99)
    phases = [distillation.schedule(SMALL, step=300, progress=progress) for progress in times]
    assert [phase.stage.value for phase in phases] == ["look", "look", "read", "read"]
    assert phases[0].learning_rate > phases[2].learning_rate > phases[3].learning_rate > 0
    assert phases[2].easy > phases[3].easy and phases[2].taught > phases[3].taught


def test_a_page_shows_no_heldout_handwriting(monkeypatch):
    pasted, pick = [], drawing.pick

    def watched(rng, choices):
        pasted.append(choices)
        return pick(rng, choices)

    monkeypatch.setattr(drawing, "pick", watched)
    distillation.page(RandomState(0), 112, 112)
    assert not any(choices is drawing.HELDOUT_DIGITS for choices in pasted)
    assert make_data.HELDOUT_DIGITS is drawing.HELDOUT_DIGITS
