"""The tokenizer of a model folder as llama.cpp takes it: the keys tokenizer.* of the text model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.files.sentencepiece import (
    BYTE,
    SPACE,
    byte_tokens,
    is_sentencepiece,
    scores_of,
)
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.samples.companions import chat_template, load_tokenizer
from vlmq_export.quantizer.storage.untrusted import read_json

# The patterns by which the byte-level BPE tokenizers of these families split text, and llama.cpp's
# names of these pre-tokenizers. A pre-tokenizer is code in llama.cpp, so a pattern that llama.cpp
# does not have cannot be written into a file.
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_REGEX = QWEN2_REGEX.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
# Mistral's tokenizers. Those of Mistral Small 3.1 were published with the pattern of Llama 3.
PIXTRAL_REGEX = QWEN2_REGEX.replace(r"\p{N}| ", r"\p{N}{1,3}| ")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_REGEX = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    QWEN2_REGEX: "qwen2",
    QWEN35_REGEX: "qwen35",
    PIXTRAL_REGEX: "pixtral",
    TEKKEN_REGEX: "tekken",
}
# Pre-tokenizers with which llama.cpp leaves a word whole that is a token, whatever the merges are.
_WHOLE_WORDS = ("pixtral", "tekken")
# Pre-tokenizer → what its users should know.
NOTES = {
    "tekken": "llama.cpp's pre-tokenizer tekken splits words at combining marks, and knows A to Z"
    " alone as capitals: text in Hindi, Thai or pointed Arabic, and words with an accented capital,"
    " may have other tokens than in transformers"
}
# GPT-2's pattern is that of the step ByteLevel itself.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_BY_STEPS = {"gpt-2": [_BYTE_LEVEL], "smollm": [_DIGITS, _BYTE_LEVEL]}
WHOLE_TEXTS = "default"  # of a tokenizer that does not split texts: see sentencepiece.py
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Tokenizer:
    """A BPE of bytes (`gpt2`), or one of characters as SentencePiece makes it (`llama`)."""

    model: str  # llama.cpp's name of the algorithm
    pre: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]  # one for each row of the embedding
    types: list[int]  # one for each token: NORMAL, CONTROL, USER_DEFINED, UNUSED or BYTE
    # Of `gpt2`: two tokens with a space between them, in order of priority. Of `llama`: nothing.
    merges: list[str]
    scores: list[float]  # of `llama`: one for each token, and the higher is merged first
    eos: int  # token ids
    bos: int | None
    pad: int | None
    unknown: int | None  # of `llama`
    add_bos: bool  # whether llama.cpp puts `bos` before a prompt
    chat_template: str | None

    def keys(self) -> dict[str, object]:
        """The metadata. llama.cpp's `llama` would put a space before a text if it were not told."""
        pieces = self.model == "llama"
        own = {
            "ggml.model": self.model,
            "ggml.pre": self.pre,
            "ggml.tokens": self.tokens,
            "ggml.token_type": self.types,
            "ggml.scores" if pieces else "ggml.merges": self.scores if pieces else self.merges,
            "ggml.eos_token_id": self.eos,
            "ggml.bos_token_id": self.bos,
            "ggml.padding_token_id": self.pad,
            "ggml.unknown_token_id": self.unknown if pieces else None,
            "ggml.add_bos_token": self.add_bos,
            "ggml.add_space_prefix": False if pieces else None,
            "chat_template": self.chat_template,
        }
        return {f"tokenizer.{key}": value for key, value in own.items() if value is not None}


def read_tokenizer(folder: Path, architecture: Architecture, rows: int) -> Tokenizer:
    """transformers' tokenizer of a model folder, as llama.cpp's byte-level BPE takes it.

    rows: the rows of the embedding. The tokens are padded to this number.

    Raises CheckpointError for files that transformers cannot read, and FormatError for a tokenizer
    whose pre-tokenizer llama.cpp does not have by name, for one that does not fit the embedding,
    and for one that lacks a token that llama.cpp needs.
    """
    loaded = load_tokenizer(folder)
    raw = _bpe(folder, loaded)
    pre = _pre_tokenizer(raw, type(loaded).__name__)
    _same_splitting(folder, loaded, pre)
    _same_words(raw, loaded, pre)
    pieces = pre == WHOLE_TEXTS
    added = {t["id"]: t for t in raw["added_tokens"]}
    vocabulary = raw["model"]["vocab"]
    tokens = {i: token for token, i in vocabulary.items()}
    bytes_ = byte_tokens(vocabulary) if pieces else {}
    tokens |= bytes_ | {i: t["content"] for i, t in added.items()}
    if max(tokens) >= rows:
        raise FormatError(
            f"tokenizer: token id {max(tokens)} is beyond the {rows} rows of the embedding"
        )
    special = partial(_special, loaded=loaded, architecture=architecture, rows=rows)
    eos, bos = special("eos"), special("bos")
    if eos is None:
        raise FormatError(
            "tokenizer_config.json: no eos_token and no eos_token_id in config.json;"
            " llama.cpp would not stop"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    types = dict.fromkeys(tokens, NORMAL) | dict.fromkeys(bytes_, BYTE)
    types |= {i: _added_type(t["content"], t["special"]) for i, t in added.items()}
    return Tokenizer(
        "llama" if pieces else "gpt2",
        pre,
        [tokens.get(i, f"[PAD{i}]") for i in range(rows)],
        [types.get(i, UNUSED) for i in range(rows)],
        [] if pieces else merges,
        scores_of(merges, vocabulary, rows) if pieces else [],
        eos,
        bos,
        special("pad"),
        vocabulary.get(raw["model"].get("unk_token")),
        bos is not None and loaded("a")["input_ids"][:1] == [bos],
        chat_template(folder, loaded),
    )


def _added_type(token: str, special: bool) -> int:
    """The type of an added token. Only normal tokens are printed with spaces in the places of ▁."""
    if special:
        return CONTROL
    return USER_DEFINED if token.strip(SPACE) else NORMAL


def _bpe(folder: Path, loaded: Any) -> dict:
    """What the tokenizer would be saved as: the content of a tokenizer.json.

    Raises FormatError for a tokenizer that has no such file.
    """
    inner = getattr(loaded, "backend_tokenizer", None)
    if inner is None:
        raise FormatError(
            f"{folder.name}: {type(loaded).__name__} is no BPE of the library tokenizers,"
            " which is all that is written to GGUF"
        )
    return json.loads(inner.to_str())


def _same_splitting(folder: Path, loaded: Any, pre: str) -> None:
    """Raises FormatError where tokenizer.json splits text otherwise than transformers does.

    Some classes of transformers bring a pre-tokenizer of their own, and ignore that of the file.
    Other programs read the file, so that the model would mean different things to them.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        name = type(loaded).__name__
        if (own := _pre_tokenizer(read_json(file), name)) != pre:
            raise FormatError(
                f"tokenizer.json has the pre-tokenizer of {own}, and transformers' {name} that of"
                f" {pre}; save the tokenizer again with transformers"
            )


def _same_words(raw: dict, loaded: Any, pre: str) -> None:
    """Raises FormatError for a token that llama.cpp makes of a word and transformers does not.

    That is one to which no merges lead, unless tokenizer.json says that words are left whole too.
    """
    model = raw["model"]
    if pre not in _WHOLE_WORDS or model.get("ignore_merges"):
        return
    added, merge = {t["content"] for t in raw["added_tokens"]}, loaded.backend_tokenizer.model
    words = (token for token in model["vocab"] if token not in added)
    if odd := next((token for token in words if len(merge.tokenize(token)) != 1), None):
        raise FormatError(
            f"tokenizer.json: no merges lead to the token {odd!r}, and llama.cpp's pre-tokenizer"
            f" {pre} gives it for such a word all the same; set ignore_merges if that is meant"
        )


def _special(
    key: str,  # eos, bos or pad
    *,
    loaded: Any,
    architecture: Architecture,
    rows: int,
) -> int | None:
    """The id of a special token, or None where there is none within the embedding.

    Where the tokenizer has no such token, config.json may have the id.
    """
    name = f"{key}_token_id"
    found = getattr(loaded, name, None)
    if found is None:
        nested, outer = architecture.text.get(name), architecture.config.get(name)
        found = outer if nested is None else nested
    found = found[0] if isinstance(found, list) else found
    return found if found is not None and 0 <= found < rows else None


def _pre_tokenizer(raw: dict, name: str) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises FormatError where it has none.

    raw: the content of a tokenizer.json; name: of the tokenizer's class.
    """
    if is_sentencepiece(raw):
        return WHOLE_TEXTS
    kind, pre = raw["model"].get("type"), raw.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    found = " + ".join(str(s.get("type")) for s in steps)
    for known, wanted in _BY_STEPS.items() if kind == "BPE" else ():
        if len(steps) == len(wanted) and all(w.items() <= s.items() for w, s in zip(wanted, steps)):
            return known
    if kind == "BPE" and found == "Split + ByteLevel":
        split, level = steps
        pattern = (split.get("pattern") or {}).get("Regex")
        usual = split.get("behavior") == "Isolated" and not split.get("invert")
        usual = usual and not level.get("add_prefix_space") and not level.get("use_regex")
        if usual and pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
        found += f" by {pattern}" if usual else " with other settings"
    known = ", ".join([*PRE_TOKENIZERS.values(), *_BY_STEPS])
    raise FormatError(
        f"tokenizer.json: {name} has model {kind} and pre-tokenizer {found};"
        f" llama.cpp would split text differently with those known here: {known}"
    )
