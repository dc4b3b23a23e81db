"""The types that a mix gives to the tensors, against a table that llama-quantize itself made.

tools/llama_cpp/quantize_types.py writes the table.
"""

import json
from pathlib import Path

import pytest

from tests.vlmq_export.test_cli import call, refused
from tools.llama_cpp.quantize_types import shapes
from vlmq_export.errors import UsageError
from vlmq_export.formats import NATIVE_MIX
from vlmq_export.formats.gguf.types.mix import (
    MIXES,
    Shape,
    Tensor,
    fallback,
    mix_named,
    parse_overrides,
    tensor_types,
)
from vlmq_export.recipes.recipe_file import load_recipe

DATA = Path(__file__).parents[2] / "data"
TABLE = json.loads((DATA / "llama_quantize_types.json").read_text("utf-8"))


def row_id(row: dict) -> str:
    return f"{row['mix']}-{row['shape'][3]}x{row['shape'][0]}"


@pytest.mark.parametrize("row", TABLE, ids=row_id)
def test_types_are_those_of_llama_quantize(row):
    layers, heads, kv, _, _, tied = row["shape"]
    sizes = shapes(*row["shape"])
    tensors = [Tensor(name, size[1]) for name, size in sizes.items()]
    found = tensor_types(row["mix"], tensors, Shape(layers, heads, kv, tied))
    assert found == dict(zip(sizes, row["types"], strict=True))


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
    assert types == {
        "blk.0.attn_v.weight": "Q8_0",
        "blk.0.ffn_up.weight": "Q8_0",
        "blk.1.attn_q.weight": "Q4_K",
    }


@pytest.mark.parametrize(
    "columns, kind, wanted",
    [
        (256, "Q2_K", "Q2_K"),
        (224, "Q2_K", "Q4_0"),
        (224, "Q5_K", "Q5_1"),
        (224, "IQ4_XS", "IQ4_NL"),
        (224, "IQ2_XXS", "IQ4_NL"),
        (100, "Q6_K", "F16"),
    ],
)
def test_fallback(columns, kind, wanted):
    assert fallback(kind, columns) == wanted


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"gguf_type": "Q4_K_M", "bits": 3}, "--bits and --gguf-type Q4_K_M exclude each other"),
        ({"gguf_type": "Q4_K_M", "act_order": "dynamic"}, "use gar or off"),
        ({"gguf_type": "Q4_K_M", "format": ["gptq"]}, "only GGUF holds these integers"),
        ({"tensor_type": ["a=Q8_0"]}, "give --gguf-type, --target-bpw or --target-size too"),
        ({"tensor_type": ["a=Q8_0"], "format": ["gguf"], "bits": 4}, "--format gguf alone"),
    ],
)
def test_one_line_for_a_mix_that_cannot_be(flags, said):
    with pytest.raises(UsageError, match=r"^[^\n]*$") as raised:
        load_recipe(None, flags)
    assert said in str(raised.value)


def test_gguf_alone_is_a_mix_that_may_be_changed():
    recipe = load_recipe(None, {"tensor_type": ["attn_v=Q8_0"], "format": ["gguf"]})
    assert recipe.with_native_types().gguf_type == NATIVE_MIX


def test_one_line_for_names_that_are_none():
    with pytest.raises(UsageError, match="--gguf-type Q9_K is not known; choose one of Q2_K_S"):
        mix_named("Q9_K")
    wrong = {
        "attn_v": "give regex=TYPE",
        "(=Q8_0": "not a regular expression",
        "a=IQ9_XS": "Q2_K",
    }
    for given, said in wrong.items():
        with pytest.raises(UsageError, match=said):
            parse_overrides([given])


def test_aliases_are_llama_cpps():
    named = [mix_named(n) for n in ("q4_k", "Q3_K", "Q5_K", "q8_0")]
    assert named == ["Q4_K_M", "Q3_K_M", "Q5_K_M", "Q8_0"]


def test_a_type_that_gguf_py_does_not_know_is_refused_by_name(tmp_path):
    said = refused("--format", "gguf", "--gguf-type", "Q2_0", "--out", tmp_path / "o", code=2)
    assert "Q2_0: gguf-py 0.19.0 does not know this type" in said and "use TQ2_0" in said


def test_an_artifact_on_block_types_is_refused_for_other_formats(tmp_path):
    """It is refused as MODEL, as the recipe that makes one is."""
    out = tmp_path / "out"
    flags = ("--format", "gguf", "--gguf-type", "Q4_0", "--method", "rtn", "--no-verify")
    assert call(*flags, "--out", out, "--quiet")[0] == 0
    for name in ("gptq", "onnx"):
        again = ("--format", name, "--out", tmp_path / name)
        said = refused(out / "artifact", *again, code=2)
        assert f"leave out --format {name}" in said and "GGUF's block types" in said
        assert not (tmp_path / name).exists()
    for flag, value in (("--gguf-type", "Q2_K"), ("--target-bpw", 4), ("--target-size", 1)):
        again = (flag, value, "--format", "gguf", "--out", tmp_path / "again")
        said = refused(out / "artifact", *again, code=2)
        assert f"{flag} {value}: the artifact has Q4_0 already" in said


def test_block_types_are_refused_for_an_artifact_of_affine_integers(artifacts, tmp_path):
    for flag, value in (("--gguf-type", "Q2_K"), ("--target-bpw", 4), ("--target-size", 1)):
        again = (flag, value, "--format", "gguf", "--out", tmp_path / "again")
        said = refused(artifacts("w4g128").path, *again, code=2)
        assert f"{flag} {value}: the artifact has 4 bits already" in said
    assert not (tmp_path / "again").exists()
