"""Recipes: flags win over the YAML file, and what cannot work is refused in one line."""

import pytest

from vlmq_export.errors import UsageError
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import load_recipe


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("bits: 3\ngroup-size: 64\nformat: [gguf]\n")
    recipe = load_recipe(file, {"bits": 2})
    assert (recipe.bits, recipe.group_size, recipe.format) == (2, 64, ["gguf"])


def test_symmetric_by_default_only_at_8_bits():
    assert [Recipe(bits=b).symmetric for b in (2, 3, 4, 8)] == [False, False, False, True]
    assert Recipe(bits=4, sym=True).symmetric


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bit: 4", "did you mean bits?"),
        ("bits: 5", "--bits 5"),
        ("group_size: 100", "--group-size 100"),
        ("method: magic", "method: magic is not known"),
        ("- 1", "keys and values"),
        ("a: [", "not YAML"),
        ("format: [gguf, gguf]", "twice"),
        ("samples: 0", "samples: "),
        ("format: gguf,onnxx", "onnxx is not known"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as e:
        load_recipe(file, {})
    assert says in str(e.value)
    assert str(e.value).startswith(f"--recipe {file}: ") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "flags", "blames"),
    [
        ("bits: 5", {"samples": 1}, "file"),
        ("bits: 4", {"bits": 5}, "flags"),
        ("bits: 5", {"bits": 5}, "flags"),
        ("samples: 3", {"samples": 0}, "flags"),
        ("emit_imatrix: true\nformat: [gguf]", {"format": ["gptq"]}, "both"),
    ],
)
def test_the_error_says_whether_file_or_flags_are_at_fault(tmp_path, text, flags, blames):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as e:
        load_recipe(file, flags)
    said = str(e.value)
    found = "file" if said.startswith(f"--recipe {file}: ") else "flags"
    assert ("both" if "the flags together" in said else found) == blames, said


@pytest.mark.parametrize("given", ["gguf,onnx", "gguf, onnx", ["gguf,onnx"], ["gguf", "onnx"]])
def test_formats_may_be_listed_with_commas(given):
    assert Recipe(format=given).format == ["gguf", "onnx"]


def test_a_recipe_survives_its_yaml(tmp_path):
    recipe = Recipe(format=["onnx", "gptq"], bits=3, sym=True, out=tmp_path / "x")
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml", {}) == recipe


def test_options_of_onnx_reach_the_format(tmp_path):
    file = tmp_path / "r.yaml"
    lines = "onnx-graph: plain", "onnx_dtype: float16", "onnx_provider: cuda", "accuracy_level: 4"
    file.write_text("\n".join(lines) + "\n")
    options = load_recipe(file, {}).format_options("x")
    assert (options.onnx_graph, options.onnx_dtype) == ("plain", "float16")
    assert (options.onnx_provider, options.onnx_accuracy_level) == ("cuda", 4)
    assert Recipe().format_options("x").onnx_graph == "fused"
    with pytest.raises(UsageError, match="--onnx-dtype"):
        load_recipe(None, {"onnx_dtype": "float8"})
    file.write_text("lm_head_bits: 4\n")  # the right key is head_bits
    with pytest.raises(UsageError, match="lm_head_bits"):
        load_recipe(file, {})
