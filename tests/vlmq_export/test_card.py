"""The model card: licence, data, and code blocks that are code in every kind of export."""

import ast
import hashlib
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest

from vlmq_export import Recipe, bundled
from vlmq_export.formats.gguf.files.modelfile import modelfile, stop_tokens
from vlmq_export.quantizer.storage.whole_files import sha256_file
from vlmq_export.report.card import data, front_matter_licence, licence

TEMPLATES = Path(__file__).parents[2] / "vlmq_export" / "report" / "templates"
RECIPE = Recipe(format=["gptq"])


def written(folder: Path, front: str, name: str = "README.md") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(front, "utf-8")
    return folder / name


def artifact(folder: Path) -> SimpleNamespace:
    (folder / "source").mkdir(parents=True)
    hashes = {"config.json": hashlib.sha256(b"{}").hexdigest()}
    manifest = SimpleNamespace(source=hashes)
    return SimpleNamespace(path=folder, source=folder / "source", manifest=manifest)


# -- licence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front", "keys"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "qwen", "license_link": "LICENSE"},
        ),
        ("# no front matter\n---\nlicense: mit\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense: 'mit\\n---\\nx'\n---\n", {}),
        ("---\nlicense: 'a: b'\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\n{{{\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}),
        ("", {}),
    ],
)
def test_the_licence_of_a_card(tmp_path, front, keys):
    assert front_matter_licence(written(tmp_path, front)) == keys
    assert front_matter_licence(tmp_path / "none.md") == {}


def test_the_licence_is_the_sources_then_what_the_card_said_then_the_text(tmp_path):
    made, out = artifact(tmp_path / "artifact"), tmp_path / "out"
    source = tmp_path / "model"
    recipe = RECIPE.model_copy(update={"model": str(source)})
    assert licence(out, recipe, made) == {}
    written(made.source, "\n  MIT License\n\nCopyright", "LICENSE")
    assert licence(out, recipe, made) == {"license": "mit"}
    written(made.source, "TERMS OF SOMEBODY", "LICENSE")
    written(out / "gptq", "TERMS OF SOMEBODY", "LICENSE")
    other = {"license": "other", "license_name": "as-the-source", "license_link": "gptq/LICENSE"}
    assert licence(out, recipe, made) == other
    written(out, "---\nlicense: gemma\n---\n")
    assert licence(out, recipe, made) == {"license": "gemma"}
    written(source, "---\nlicense: cc-by-4.0\n---\n")
    written(source, "another model", "config.json")
    assert licence(out, recipe, made) == {"license": "gemma"}
    written(source, "{}", "config.json")
    assert licence(out, recipe, made) == {"license": "cc-by-4.0"}


def test_an_artifact_lies_beside_the_card_of_its_run(tmp_path):
    made = artifact(tmp_path / "first" / "artifact")
    written(tmp_path / "first", "---\nlicense: apache-2.0\n---\n")
    recipe = RECIPE.model_copy(update={"model": str(made.path)})
    assert licence(tmp_path / "second", recipe, made) == {}  # the folder of a model has neighbours
    written(made.path, "{}", "manifest.json")
    assert licence(tmp_path / "second", recipe, made) == {"license": "apache-2.0"}


# -- data ------------------------------------------------------------------------------------------


def test_the_card_says_what_was_calibrated_on():
    told = {"rows": 5, "file": "chats.json", "tokens": 90, "vision_tokens": 60, "sha256": "ab"}
    text = data(Recipe(format=["gptq"], seed=7), told)
    assert "5 rows of chats.json" in text and "seed 7" in text and "60 of them" in text
    assert "drawn images" not in text
    assert "drawn images" in data(RECIPE, told | {"sha256": sha256_file(bundled.CALIBRATION)})
    for nothing in ({"rows": 0}, {}):
        assert "without calibration" in data(RECIPE, nothing)


# -- code blocks -----------------------------------------------------------------------------------


def environment() -> jinja2.Environment:
    """As report/page.py makes it, but a name that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


@pytest.mark.parametrize("file", sorted(p.name for p in TEMPLATES.glob("run_*.py.j2")))
@pytest.mark.parametrize("yes", [True, False])
def test_a_block_is_python_in_every_kind_of_export(file, yes):
    kinds = {"onnx_provider": "cuda", "onnx_dtype": "float16"} if yes else {}
    names = ("mrope", "recurrent", "several_tiles", "ends_in_config", "one_grid")
    names = dict.fromkeys(names, yes)
    needs = "torchvision num2words" if yes else "torchvision"
    facts = {"recipe": RECIPE.model_copy(update=kinds), "needs": needs, **names}
    code = environment().get_template(file).render(facts)
    ast.parse(code)
    assert code.endswith("\n") and "{%" not in code and "\n\n\n" not in code
    assert max(len(line) for line in code.splitlines()) <= 100


# -- Modelfile -------------------------------------------------------------------------------------


def test_the_modelfile_names_files_and_stops():
    text = modelfile(["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "mmproj-a.gguf"], ["<e>"])
    assert text.splitlines() == [
        "FROM ./a-00001-of-00002.gguf",
        "FROM ./a-00002-of-00002.gguf",
        "FROM ./mmproj-a.gguf",
        'PARAMETER stop "<e>"',
    ]


@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        ("{}", ["<e>"]),
        ('{"eos_token_id": 2}', ["<t>", "<e>"]),
        ('{"eos_token_id": [1, 2, 99, -1, true, "x"]}', ["<e>", "<t>"]),
        ('{"eos_token_id": [3, 4]}', ["<e>"]),
    ],
)
def test_answers_stop_at_the_tokens_of_both_files(tmp_path, told, tokens):
    written(tmp_path, told, "generation_config.json")
    vocabulary = ["a", "<e>", "<t>", 'a"b', "a\nb"]
    tokenizer = SimpleNamespace(tokens=vocabulary, eos=1)
    assert stop_tokens(tmp_path, tokenizer) == tokens
