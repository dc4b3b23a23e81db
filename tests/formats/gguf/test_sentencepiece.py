"""Gemma's tokenizer, a BPE of characters, as the scores of llama.cpp's `llama`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.artifacts import architecture_of, edit
from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.files.sentencepiece import BYTE, byte_tokens, scores_of
from vlmq_export.formats.gguf.files.tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    read_tokenizer,
)

ROWS = 512


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny("gemma3"), tmp_path / "gemma3")


def test_tokens_types_and_scores(folder):
    from transformers import AutoTokenizer

    t = read_tokenizer(folder, architecture_of(folder), ROWS)
    theirs = AutoTokenizer.from_pretrained(folder)
    known = len(theirs)
    assert (t.model, t.pre, t.merges) == ("llama", "default", [])
    assert t.tokens[:known] == theirs.convert_ids_to_tokens(list(range(known)))
    assert t.tokens[known:] == [f"[PAD{i}]" for i in range(known, ROWS)]
    assert (t.pad, t.eos, t.bos, t.unknown, t.add_bos) == (0, 1, 2, 3, True)
    type_of = dict(zip(t.tokens, t.types))
    assert [type_of[x] for x in ("<bos>", "<start_of_image>", "<image_soft_token>")] == 3 * [
        CONTROL
    ]
    assert (type_of["\n\n"], type_of["<0x0A>"], type_of["▁is"]) == (USER_DEFINED, BYTE, NORMAL)
    # llama.cpp prints ▁ as a space for normal tokens alone.
    assert (type_of["▁▁▁"], type_of["[PAD500]"]) == (NORMAL, UNUSED)
    score = dict(zip(t.tokens, t.scores))
    assert (
        score["\n\n"] == 0 > score["▁▁"] > score["is"] > score["▁is"] > score["z"] == min(t.scores)
    )


def test_keys_of_the_two_algorithms(folder, tiny):
    keys = read_tokenizer(folder, architecture_of(folder), ROWS).keys()
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert keys["tokenizer.ggml.unknown_token_id"] == 3
    assert len(keys["tokenizer.ggml.scores"]) == ROWS and "tokenizer.ggml.merges" not in keys
    other = tiny("internvl")
    plain = read_tokenizer(other, architecture_of(other), ROWS).keys()
    assert plain["tokenizer.ggml.model"] == "gpt2" and plain["tokenizer.ggml.merges"]
    pieces = {f"tokenizer.ggml.{k}" for k in ("scores", "add_space_prefix", "unknown_token_id")}
    assert not plain.keys() & pieces


def test_a_character_with_the_id_of_a_byte():
    """Some files of Gemma have a tab so. llama.cpp then reads it by its byte."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    assert byte_tokens(vocabulary | {"\t": 9})[9] == "<0x09>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"]["merges"].remove(["▁t", "he"]), "'▁t' and 'he' are no merge"),
        (lambda t: t["model"]["vocab"].pop("<0x41>"), "1 of 256 bytes have no token, first <0x41>"),
    ],
)
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(folder, change, said):
    edit(folder / "tokenizer.json", change)
    with pytest.raises(FormatError, match=said):
        read_tokenizer(folder, architecture_of(folder), ROWS)


def test_another_normalizer_is_no_such_tokenizer(folder):
    """transformers' class of Gemma has its own, and other programs read the file."""
    edit(folder / "tokenizer.json", lambda t: t["normalizer"].update(content="_"))
    with pytest.raises(FormatError, match="model BPE and pre-tokenizer Split"):
        read_tokenizer(folder, architecture_of(folder), ROWS)


def test_scores_are_the_order_of_the_pieces():
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    merges = ["a b", "a bc", "ab c", "b c"]
    assert scores_of(merges, vocabulary, 8) == [-3.0, -3.0, -3.0, -0.0, -2.0, -1.0, -3.0, -3.0]
