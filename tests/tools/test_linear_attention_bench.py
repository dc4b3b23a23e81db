"""The questions and the kinds of linears of the bench behind docs/decisions/0012."""

from tools.bench.linear_attention import KINDS, _kind, told
from tools.reference_vlm.make_data import Split, draw_row
from vlmq_export.quantizer.model.families import FAMILIES


def test_questions_in_words_have_their_answers_among_the_words():
    for number in range(40):
        task, shown = draw_row(Split.calibration, 0, number)
        words, question = told(task, shown).split("\n")
        assert question == shown.question
        if task in ("read", "digits"):
            assert words == shown.answer
        elif task == "form":
            key = question.removeprefix("What is the ").removesuffix("?").capitalize()
            assert f"{key} {shown.answer}" in words


def test_every_linear_of_the_family_is_of_one_kind():
    linears = [name for block in FAMILIES["qwen3_5"].every_block for name in block.linears]
    assert {_kind(name) for name in linears} == set(KINDS)
    for name in linears:
        assert sum(any(part in name for part in parts) for parts in KINDS.values()) == 1
