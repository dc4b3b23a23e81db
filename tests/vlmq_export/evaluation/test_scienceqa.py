"""The option letter of an answer, where lmms-eval's own rule and the paper's parser differ."""

import pytest

from vlmq_export.evaluation.scienceqa import option_letter, parsed_result

CHOICES = ["a cat", "a dog", "mammal"]


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "B.",
        "B. a dog",
        "(B)",
        "**B**",
        "B: a dog",
        "The answer is B.",
        "The correct answer is (B) a dog",
        "Answer: B",
        "answer: B",
        "The answer is: \n\nB",
        "The answer is option B, not A",
        "Option B",
        "I would choose B",
        "B is correct",
        "A careful look says B",
        "a dog",
        "A dog",
        "It is a dog.",
        "The answer is a dog",
    ],
)
def test_an_answer_that_names_the_second_option(answer):
    assert option_letter(answer, CHOICES) == "B"
    assert parsed_result({"answer": 1, "choices": CHOICES}, [answer]) == {"exact_match": 1.0}
    assert parsed_result({"answer": 0, "choices": CHOICES}, [answer]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("", ""),
        ("D", ""),  # there are three options
        ("A or B", ""),
        ("I don't know", ""),
        ("a cat or a dog", ""),
        ("A cat is shown", "A"),
        ("the best option is A", "A"),
        ("The answer is a mammal", "C"),
        ("the answer is **C**", "C"),
    ],
)
def test_an_answer_that_names_another_or_none(answer, letter):
    assert option_letter(answer, CHOICES) == letter
