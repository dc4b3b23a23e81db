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
