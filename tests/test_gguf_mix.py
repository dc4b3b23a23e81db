"""The mixes against a table that stock llama-quantize made (tools/llama_quantize_types.py)."""

import json
from pathlib import Path

import pytest

from tests.test_cli import refused
from tools.llama_quantize_types import shapes
from vlmq_export.errors import UsageError
from vlmq_export.formats.gguf.mix import MIXES, Shape, Tensor, fallback, mix_named, parse_overrides, tensor_types
from vlmq_export.recipe import load_recipe

TABLE = json.loads((Path(__file__).parent / "data" / "llama_quantize_types.json").read_text("utf-8"))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['mix']}-{row['shape'][3]}x{row['shape'][0]}")
def test_types_are_those_of_llama_quantize(row):
    layers, heads, kv, _, _, tied = row["shape"]
    tensors = [Tensor(name, size[1]) for name, size in shapes(*row["shape"]).items()]
    assert tensor_types(row["mix"], tensors, Shape(layers, heads, kv, tied)) == dict(
        zip(shapes(*row["shape"]), row["types"], strict=True)
    )


def test_the_table_has_every_mix_and_both_kinds_of_head():
    assert {row["mix"] for row in TABLE} == set(MIXES)
    assert {row["shape"][1] // row["shape"][2] >= 4 for row in TABLE} == {True, False}


def test_overrides_win_in_order_and_fall_back_too():
    tensors = [
        Tensor("blk.0.attn_v.weight", 256),
        Tensor("blk.0.ffn_up.weight", 896),
        Tensor("blk.1.attn_q.weight", 256),
    ]
    overrides = parse_overrides([r"attn_v=q8_0", r"blk\.0=Q6_K"])
    types = tensor_types("Q4_K_S", tensors, Shape(2, 4, 2, True), overrides)
    assert types == {"blk.0.attn_v.weight": "Q8_0", "blk.0.ffn_up.weight": "Q8_0", "blk.1.attn_q.weight": "Q4_K"}


@pytest.mark.parametrize("columns, kind, wanted", [(256, "Q2_K", "Q2_K"), (224, "Q2_K", "Q4_0"), (224, "Q5_K", "Q5_1"), (100, "Q6_K", "F16")])  # fmt: skip
def test_fallback(columns, kind, wanted):
    assert fallback(kind, columns) == wanted


@pytest.mark.parametrize("flags, said", [
    ({"gguf_type": "Q4_K_M", "bits": 3}, "--bits and --gguf-type Q4_K_M exclude each other"),
    ({"gguf_type": "Q4_K_M", "act_order": "dynamic"}, "use gar or off"),
    ({"gguf_type": "Q4_K_M", "format": ["gptq"]}, "only GGUF holds these integers"),
    ({"tensor_type": ["attn_v=Q8_0"]}, "give --gguf-type or --target-bpw too"),
])  # fmt: skip
def test_one_line_for_a_mix_that_cannot_be(flags, said):
    with pytest.raises(UsageError, match=r"^[^\n]*$") as raised:
        load_recipe(None, flags)
    assert said in str(raised.value)


def test_one_line_for_names_that_are_none():
    with pytest.raises(UsageError, match="--gguf-type Q9_K is not known; choose one of Q2_K_S"):
        mix_named("Q9_K")
    for given, said in (("attn_v", "give regex=TYPE"), ("(=Q8_0", "not a regular expression"), ("a=IQ4_XS", "Q2_K")):
        with pytest.raises(UsageError, match=said):
            parse_overrides([given])


def test_aliases_are_llama_cpps():
    assert [mix_named(n) for n in ("q4_k", "Q3_K", "Q5_K", "q8_0")] == ["Q4_K_M", "Q3_K_M", "Q5_K_M", "Q8_0"]


def test_a_type_that_gguf_py_does_not_know_is_refused_by_name(tmp_path):
    said = refused("--format", "gguf", "--gguf-type", "Q2_0", "--out", tmp_path / "o", code=2)
    assert "Q2_0: gguf-py 0.19.0 does not know this type" in said and "use TQ2_0" in said
