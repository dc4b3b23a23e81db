"""The option letter of an answer to ScienceQA that is more than a letter.

lmms-eval counts "B" and "B. a text" alone. The VLMQ paper (appendix D) found that too strict for
models of few bits, and looked for "the most probable option letter based on regular expressions and
contextual cues". Its Listing 1 is not in the text that could be read. The rules below are ours, in
the paper's words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# A letter by itself: not of a word, and not the article.
_LETTER = r"(?<![A-Za-z'’])\(?([A-Z])\)?(?![A-Za-z'’])"
_SAID = (  # the first that is found decides
    re.compile(rf"^\W*{_LETTER}\W*$"),  # B, (B), **B**.
    re.compile(rf"^\W*{_LETTER}\s*[.):,\-–—\n]"),  # B. a text
    re.compile(
        r"(?:answer|option|choice)\b\s*(?:letter\s*)?(?:is|was|would be|should be|:|=|-)?\s*"
        rf"(?:the\s+)?(?:option\s+|choice\s+|letter\s+)?[\W_]*{_LETTER}",
        re.IGNORECASE,
    ),
    re.compile(rf"(?:choose|select|pick)\s+(?:option\s+)?\W*{_LETTER}", re.IGNORECASE),
    re.compile(rf"{_LETTER}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)"),
)


def option_letter(answer: str, choices: Sequence[str]) -> str:
    """The letter of the option that an answer names, or an empty text.

    answer: what the model wrote.
    choices: the texts of the options. A letter beyond their number is none.

    It is, in this order: a letter alone, a letter that begins the answer, the letter behind "the
    answer is" and its like, the only letter that stands by itself, and the option whose text is
    the answer or alone stands in it.
    """
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    text = answer.strip()
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    for pattern in _SAID:
        # Letters are capitals: a pattern that takes "Answer" and "answer" alike must not take "a".
        found = [m[1] for m in pattern.finditer(text) if m[1] in letters]
        if found:
            return found[0]
    alone = {m[1] for m in re.finditer(_LETTER, text) if m[1] in letters}
    alone -= {"A", "I"} if re.search(r"\b[AI] (?!or\b|and\b)[a-z]", text) else set()
    if len(alone) == 1:
        return alone.pop()
    said = _plain(text)
    named = [x for x, choice in zip(letters, choices) if _plain(choice) == said]
    named = named or [x for x, choice in zip(letters, choices) if _holds(said, _plain(choice))]
    return named[0] if len(named) == 1 else ""


def parsed_result(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """lmms-eval's `process_results` of a row of ScienceQA, with the letter from `option_letter`."""
    right = chr(ord("A") + doc["answer"])
    return {"exact_match": float(option_letter(results[0], doc["choices"]) == right)}


def _plain(text: str) -> str:
    """A text by its words."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _holds(said: str, choice: str) -> bool:
    """Whether the words of an option stand in an answer, one after the other."""
    return bool(choice) and f" {choice} " in f" {said} "
