"""Recipe: flags win over YAML, what cannot work is refused in one line."""

import pytest

from vlmq_export.errors import UsageError
from vlmq_export.recipe import Recipe, load_recipe


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("bits: 3\ngroup-size: 64\nformat: [gguf]\n")
    recipe = load_recipe(file, {"bits": 2})
    assert (recipe.bits, recipe.group_size, [f.value for f in recipe.format]) == (2, 64, ["gguf"])


def test_symmetric_by_default_only_at_8_bits():
    assert [Recipe(bits=b).symmetric for b in (2, 3, 4, 8)] == [False, False, False, True]
    assert Recipe(bits=4, sym=True).symmetric


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bit: 4", "did you mean bits?"),
        ("bits: 5", "--bits 5"),
        ("group_size: 100", "--group-size 100"),
        ("method: magic", "--method"),
        ("- 1", "keys and values"),
        ("a: [", "not YAML"),
        ("format: [gguf, gguf]", "twice"),
        ("samples: 0", "--samples"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as e:
        load_recipe(file, {})
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_recipe_survives_its_yaml(tmp_path):
    recipe = Recipe(format=["onnx", "gptq"], bits=3, sym=True, out=tmp_path / "x")
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml", {}) == recipe


def test_options_of_onnx_reach_the_format(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("onnx-graph: plain\nonnx_dtype: float16\nonnx_provider: cuda\naccuracy_level: 4\n")
    options = load_recipe(file, {}).format_options("x")
    found = (options.onnx_graph, options.onnx_dtype, options.onnx_provider, options.onnx_accuracy_level)
    assert found == ("plain", "float16", "cuda", 4)
    assert Recipe().format_options("x").onnx_graph == "fused"
    with pytest.raises(UsageError, match="--onnx-dtype"):
        load_recipe(None, {"onnx_dtype": "float8"})
    with pytest.raises(UsageError, match="lm_head_bits"):  # the key is head_bits
        file.write_text("lm_head_bits: 4\n")
        load_recipe(file, {})
