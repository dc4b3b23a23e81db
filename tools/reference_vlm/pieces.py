"""A tokenizer in the form of Gemma's, made of the words that the bundled one knows.

As in the published tokenizer.json of Gemma 3, spaces are ▁, texts are not split before they are
merged, runs of line breaks and of ▁ are added tokens, every byte has a token, and whatever two
tokens are a third together have a merge.
"""

from __future__ import annotations

FIRST = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # ids 0 to 4, as published
_RUNS = 4  # the longest run of line breaks or ▁ that is a token; 31 as published


def as_pieces(tokenizer: dict, tokens: tuple[str, ...]) -> dict:
    """The content of a tokenizer.json.

    tokenizer: that of the bundled byte-level BPE.
    tokens: special tokens beside FIRST. The last is no token of the BPE itself, as published.
    """
    words = [_plain(left) + _plain(right) for left, right in tokenizer["model"]["merges"]]
    spaces = ["▁" * n for n in range(2, _RUNS + 1)]
    pieces = [*spaces, *(w for w in words if w.isprintable())]
    breaks = ["\n" * n for n in range(1, _RUNS + 1)]
    single = ["▁", *(chr(c) for c in range(33, 127))]
    known = [*FIRST, *tokens[:-1], *breaks, *_bytes(), *pieces, *single]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(known))}
    special = (*FIRST, *tokens)
    ids = vocabulary | {tokens[-1]: len(vocabulary)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token in special,
            }
            for token in sorted((*special, *breaks, *spaces), key=ids.__getitem__)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _beginning(ids["<bos>"]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges([*breaks[1:], *pieces], vocabulary),
        },
    }


def _plain(token: str) -> str:
    """A token of the byte-level BPE with ▁ for its name of a space."""
    return token.replace("Ġ", "▁")


def _bytes() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _merges(pieces: list[str], vocabulary: dict[str, int]) -> list[list[str]]:
    """All pairs of tokens that are a piece together, in the order of the pieces."""
    return [
        [piece[:cut], piece[cut:]]
        for piece in dict.fromkeys(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


def _beginning(bos: int) -> dict:
    """The post-processor that puts <bos> before a text."""
    start = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            start,
            {"Sequence": {"id": "A", "type_id": 0}},
            start,
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
    }
