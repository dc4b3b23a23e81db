"""A SentencePiece tokenizer that transformers keeps as a BPE of characters: Gemma's.

Spaces become ▁, whole texts are merged without being split into words, and a character that is no
token becomes its bytes. llama.cpp's `llama` does the same by scores: of all neighbours that are a
token together, it merges those of the highest score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmq_export.errors import FormatError

BYTE = 6  # value of tokenizer.ggml.token_type
SPACE = "▁"
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# It splits at spaces, and there are none left.
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "invert": False}


def is_sentencepiece(raw: Mapping) -> bool:
    """Whether the content of a tokenizer.json is such a tokenizer."""
    model, pre = raw["model"], raw.get("pre_tokenizer") or _SPLIT
    plain = not any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix"))
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback"))
        and plain
        and raw.get("normalizer") == _NORMALIZER
        and _SPLIT.items() <= pre.items()
    )


def byte_tokens(vocabulary: Mapping[str, int]) -> dict[int, str]:
    """Id → name of the token of each byte. Some files give the id of a byte to a character too.

    Raises FormatError where a byte has no token: llama.cpp would end the process on such a byte.
    """
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if lost := [name for name in names if name not in vocabulary]:
        raise FormatError(
            f"tokenizer.json: {len(lost)} of 256 bytes have no token, first {lost[0]}; llama.cpp"
            " could not read a text that needs them"
        )
    return {vocabulary[name]: name for name in names}


def scores_of(merges: Sequence[str], vocabulary: Mapping[str, int], rows: int) -> list[float]:
    """The score of each of `rows` tokens: 0 of the first that is merged, −1 of the next, and so on.

    Tokens that no merge makes have the lowest score. They are single characters.

    Raises FormatError where two tokens are a third together and no merge says so. A tokenizer that
    was converted from SentencePiece has every such merge, and llama.cpp would do it in any case.
    """
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    said = set(merges)
    for token in vocabulary:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and f"{left} {right}" not in said:
                raise FormatError(
                    f"tokenizer.json: {left!r} and {right!r} are no merge, and llama.cpp would make"
                    f" {token!r} of them; this tokenizer cannot be written to GGUF"
                )
    scores = [-float(len(ranks))] * rows
    for token, rank in ranks.items():
        scores[vocabulary[token]] = -float(rank)
    return scores
