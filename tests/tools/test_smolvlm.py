"""The third reference VLM: its inputs, and the questions that train its tower.

The language model comes from a package that the tests do not install. What needs it is marked slow
and runs after `make reference-smolvlm`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from safetensors.torch import load_file

from tools.reference_vlm import drawing, make_data, model, score, smolvlm
from tools.reference_vlm import smolvlm_training as training

BUILT = Path(__file__).parents[2] / smolvlm.BUILT


def image_processor():
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    names = ("image_processor_type", "processor_class")
    return Idefics3ImageProcessorPil(
        **{name: value for name, value in smolvlm.PREPROCESSOR.items() if name not in names}
    )


@pytest.mark.parametrize("size", [*drawing.SIZES, (100, 133), (77, 31), (448, 448)])
def test_a_tile_is_what_transformers_makes_of_an_image(size):
    image = drawing.background(RandomState(0), *size)
    expected = image_processor()([image], return_tensors="np")["pixel_values"][0, 0]
    assert np.array_equal(smolvlm.tile(image), expected)


@pytest.mark.parametrize("task", drawing.TASKS)
def test_further_questions_are_answered_by_what_was_drawn(task):
    """The drawing's own question is among those that its labels answer, with the same answer."""
    asked = 0
    for seed in range(60):
        row = drawing.TASKS[task](RandomState(seed), 168, 112)
        elsewhere = dict(training.further_turns(row._replace(question="")))
        assert row.question not in dict(training.further_turns(row))
        if row.question in elsewhere:
            asked += 1
            assert elsewhere[row.question] == row.answer, row
    assert asked == 0 if task in ("read", "digits") else asked > 30


def words(text: str, **_) -> dict[str, list[int]]:
    """A tokenizer that gives every character its number."""
    return {"input_ids": [ord(letter) for letter in text]}


def test_only_what_the_assistant_says_is_learned():
    turns = [("How many bars?", "3"), ("Which bar is tallest?", "red")]
    tokens, labels = training.conversation(words, turns)
    assert len(tokens) == len(labels)
    learned = [t for t, label in zip(tokens, labels) if label != model.IGNORED]
    assert "".join(map(chr, learned)) == f" 3{smolvlm.END} red{smolvlm.END}"
    assert "".join(map(chr, tokens)) == (
        smolvlm.prompt(turns[0][0]) + f" 3{smolvlm.END}"
        f"\nUser: Which bar is tallest?{smolvlm.END}\nAssistant: red{smolvlm.END}"
    )


def test_the_prompt_is_what_the_chat_template_and_the_processor_write():
    from jinja2 import Template

    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    written = Template(smolvlm.CHAT_TEMPLATE).render(messages=[message], add_generation_prompt=True)
    tags = "<fake_token_around_image>", "<global-img>" + "<image>" * smolvlm.IMAGE_TOKENS
    assert written.replace("<image>", "".join((*tags, tags[0]))) == smolvlm.prompt("What?")


def test_cells_lie_where_the_squeezed_drawing_has_them():
    labels = [drawing.Label("A", 10, 10), drawing.Label("red", 167, 111)]
    image = SimpleNamespace(width=168, height=112)
    target = training.cells(SimpleNamespace(image=image, labels=labels)).view(4, 4, -1)
    assert target.sum() == 2
    assert target[0, 0, drawing.NAMES.index("A")] == 1
    assert target[3, 3, drawing.NAMES.index("red")] == 1


def test_the_trained_part_is_small_and_holds_no_language_model():
    assert smolvlm.TRAINED.stat().st_size <= 20e6
    parts = load_file(smolvlm.TRAINED)
    assert all(value.dtype == torch.bfloat16 for value in parts.values())
    heads = {".".join(name.split(".")[:2]) for name in parts}
    assert heads == {"model.vision_model", "model.connector", "added_tokens"}
    assert parts["added_tokens"].shape == (smolvlm.VOCABULARY - smolvlm.LANGUAGE_ROWS, 576)


# --- with the language model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def built():
    if not (BUILT / "model.safetensors").is_file():
        pytest.fail("no third reference here; make reference-smolvlm")
    return model.load_model(BUILT)


@pytest.mark.slow
def test_the_language_model_is_untouched(built):
    language, _ = smolvlm.language_model()
    own = built.model.text_model.state_dict()
    for name, value in language.model.state_dict().items():
        ours = own[name][: smolvlm.LANGUAGE_ROWS] if name == "embed_tokens.weight" else own[name]
        assert torch.equal(ours, value.bfloat16().float()), name


@pytest.mark.slow
def test_it_answers_held_out_questions(built):
    """.6 was the aim; the card has the figures of all 512 rows."""
    rows = [make_data.draw_row(make_data.Split.heldout, 1, row) for row in range(100)]
    asked = [(task, (row.image, row.question), row.answer) for task, row in rows]
    assert score.exact_match(built, model.load_tokenizer(BUILT), asked)["all"] >= 0.6
