"""Greedy answers of several prompts at once are those of each prompt alone."""

import json
from types import SimpleNamespace

import pytest

from tools.reference_vlm.tiny_families import FAMILIES
from vlmq_export.bundled import HELDOUT
from vlmq_export.formats.proof import answers
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.rows import read_rows

ROWS = 8


@pytest.mark.parametrize("arch", ["reference", *FAMILIES])
def test_prompts_of_one_shape_are_answered_together(arch, artifacts, tiny, monkeypatch):
    source = [] if arch == "reference" else [tiny(arch)]
    reference = Reference(artifacts("w4g128", *source).path, read_rows(HELDOUT)[:ROWS])
    alone = {p.id: reference.answer(p) for p in reference.prompts}
    sizes = []
    generate = answers.generate
    monkeypatch.setattr(
        answers,
        "generate",
        lambda m, batch, *a: sizes.append(len(batch["input_ids"])) or generate(m, batch, *a),
    )
    prompts = reference.prompts
    inputs = [prompt.model_inputs() for prompt in prompts]
    answered = answers.greedy_answers(reference.model, inputs, reference.stop_ids)
    together = {prompts[place].id: answer for place, answer in answered}
    assert together == alone
    packed = reference.architecture.family.packed
    assert sum(sizes) == ROWS and (max(sizes) == 1 if packed else max(sizes) > 1)


def test_a_penalty_for_repetition_changes_no_answer(artifacts):
    """Qwen2.5-VL's generation_config.json asks for one, which no other runtime applies."""
    reference = Reference(artifacts("w4g128").path, read_rows(HELDOUT)[:4])
    inputs = [prompt.model_inputs() for prompt in reference.prompts]
    greedy = dict(answers.greedy_answers(reference.model, inputs, frozenset({-1}), 8))
    reference.model.generation_config.repetition_penalty = 100.0
    assert dict(answers.greedy_answers(reference.model, inputs, frozenset({-1}), 8)) == greedy


@pytest.mark.parametrize(
    ("told", "want"),
    [(None, {2}), ({}, {2}), ({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 9]}, {7, 9})],
)
def test_an_answer_ends_where_the_models_own_settings_say(told, want, tmp_path):
    """SmolVLM's answers end with a token of the chat. Its tokenizer may name another."""
    if told is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(told))
    assert answers.stop_ids(tmp_path, SimpleNamespace(eos_token_id=2)) == want
