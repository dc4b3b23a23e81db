"""--target-size: the package, model and mmproj with all metadata, weighs at most so much."""

import re
from collections import Counter

import pytest

from tests.vlmq_export.test_cli import call, refused
from tools.docs.sizes import MODELS, headers
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import Recipe
from vlmq_export.errors import UsageError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.recipes.recipe_file import load_recipe
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.locate import open_source

pytestmark = pytest.mark.usefixtures("one_thread")
SLACK = 2 * 4096  # bytes that the plan sets aside for the names in both files
QUICK = ("--format", "gguf", "--method", "gptq", "--samples", 4, "--no-verify", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("m") / "model", layers=1, depth=3)


def package(out):
    """Bytes of all that stands in the folder of the GGUF."""
    return sum(f.stat().st_size for f in (out / "gguf").iterdir())


def planned(model, **keys):
    """The plan of a run, without its time."""
    source, recipe = open_source(str(model)), Recipe(model=str(model), format=["gguf"], **keys)
    return source.plan(source.recipe_for(recipe, CalibrationRows(recipe)))


def least_of(model, **keys):
    """The size in GB that the refusal of a much too small one names."""
    with pytest.raises(UsageError, match=r"^[^\n]*$") as raised:
        planned(model, target_size=1e-4, **keys)
    return float(re.findall(r"at least ([\d.]+) GB", str(raised.value))[0])


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Size in bytes → an output folder of it, with the vision tower in 16 or 8 bits."""
    found = {}
    for size, bits in ((3_040_000, "off"), (2_200_000, 8)):
        out = tmp_path_factory.mktemp("out") / str(size)
        given = (model, *QUICK, "--vision-bits", bits, "--target-size", size / 1e9, "--out", out)
        code, _, err = call(*given)
        assert code == 0, err
        found[size] = out, given
    return found


@pytest.mark.parametrize("size", [3_040_000, 2_200_000])
def test_what_is_written_keeps_the_size(written, size):
    out, _ = written[size]
    assert 0.98 * size < package(out) <= size
    types = {t.type for t in GGUFFile(find_files(out / "gguf")[0]).tensors.values()}
    assert len(types - {"F32"}) > 1


@pytest.mark.parametrize("size", [3_040_000, 2_200_000])
def test_the_plan_of_these_types_is_what_was_written(written, size):
    out, _ = written[size]
    found = FORMATS["gguf"].plan(artifact_plan(Artifact(out / "artifact")), FormatOptions())
    assert 0 <= found.size_bytes - package(out) < SLACK
    assert found.size_bytes <= size
    assert sum(found.parts.values()) == found.size_bytes


def test_a_split_package_is_no_larger_than_planned(written, tmp_path):
    artifact = Artifact(written[3_040_000][0] / "artifact")
    options = FormatOptions(name="x" * 200, gguf_split_bytes=30_000)
    FORMATS["gguf"].write(artifact, tmp_path / "gguf", options)
    assert len([*(tmp_path / "gguf").glob("*-of-*.gguf")]) > 5
    found = FORMATS["gguf"].plan(artifact_plan(artifact), options)
    assert 0 <= found.size_bytes - package(tmp_path) < 2 * SLACK


def test_the_dry_run_keeps_the_size(model):
    for size, keys in ((3.04e-3, {"vision_bits": 0}), (2.2e-3, {}), (2.1e-3, {"mmproj": "q8_0"})):
        found = planned(model, target_size=size, **keys)
        assert found.refusals == []
        assert 0.97 * size * 1e9 < found.formats["gguf"].size_bytes <= size * 1e9


def test_a_resumed_run_keeps_its_types(written):
    out, given = written[3_040_000]
    before = Artifact(out / "artifact").config.types
    (out / "artifact" / "manifest.json").unlink()
    code, _, err = call(*given, "--resume")
    assert code == 0, err
    assert Artifact(out / "artifact").config.types == before
    other = [0.005 if x == 3_040_000 / 1e9 else x for x in given]
    assert "target_size was 0.00304, now 0.005" in refused(*other, "--resume", code=2)


def test_the_artifact_is_written_again_within_the_size_alone(written, tmp_path):
    out, _ = written[3_040_000]
    again = (out / "artifact", "--format", "gguf", "--no-verify")
    code, _, err = call(*again, "--target-size", 0.00304, "--out", tmp_path / "a")
    assert code == 0, err
    said = refused(*again, "--target-size", 0.003, "--out", tmp_path / "b", code=2)
    assert "--target-size 0.003: what is chosen already takes 0.0030" in said
    assert not (tmp_path / "b").exists()


def test_the_least_size_that_is_named_can_be(model, tmp_path):
    least = least_of(model, vision_bits=0)
    assert least_of(model) < least
    assert planned(model, target_size=least, vision_bits=0).refusals == []
    flags = (model, "--format", "gguf", "--vision-bits", "off", "--target-size", least * 0.999)
    for run in (("--dry-run",), ("--out", tmp_path / "o")):
        said = refused(*flags, *run, code=2)
        assert f"at least {least:g} GB, and about" in said and "with --vision-bits 8" in said
        assert "vision-bits" not in refused(*flags[:3], "--target-size", 1e-3, *run, code=2)
    assert not (tmp_path / "o").exists()


def test_more_than_the_largest_types_take_is_said_and_not_refused(model):
    code, out, err = call(model, "--format", "gguf", "--target-size", 1, "--dry-run")
    assert code == 0, err
    assert "every matrix has its largest" in " ".join(out.split())
    found = planned(model, target_size=1)
    assert set(found.model.config.types.values()) == {"Q8_0"}


def test_large_matrices_of_given_types_leave_the_smallest_to_the_others(model):
    given = ["ffn|attn_q|attn_output=Q8_0"]
    least = least_of(model, tensor_type=given)
    found = planned(model, target_size=least, tensor_type=given)
    types = Counter(found.model.config.types.values())
    assert types.keys() == {"Q8_0", "IQ2_XXS", "Q2_K"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--target-bpw", 3), "--target-bpw and --target-size exclude each other"),
        (("--gguf-type", "Q4_K_M"), "--gguf-type and --target-size exclude each other"),
        (("--bits", 3), "--bits and --target-size 0.005 exclude each other"),
        (("--head-bits", 4), "--head-bits and --target-size 0.005 exclude each other"),
        (("--embedding-bits", 8), "--embedding-bits and --target-size 0.005 exclude each other"),
        (("--tune", 10), "--tune and --target-size 0.005 exclude each other"),
        (
            ("--tensor-type", "a=Q4_K", "--format", "onnx"),
            "--target-size 0.005 chooses widths here",
        ),
        (("--method", "rtn"), "--method rtn does not use"),
        (("--target-size", 0), "--target-size: Input should be greater than 0"),
        (("--target-size", "nan"), "--target-size: Input should be"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(flags, said, tmp_path):
    given = ("--format", "gguf", "--target-size", 0.005, *flags)
    assert said in refused(*given, "--out", tmp_path / "o", code=2)
    assert said in refused(*given, "--dry-run", code=2)
    assert not (tmp_path / "o").exists()


def test_the_recipe_comes_back_from_its_file(tmp_path):
    recipe = Recipe(format=["gguf"], target_size=2.5, vision_bits=4)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    again = load_recipe(file, {})
    assert again == recipe and again.target_bytes == 2_500_000_000
    assert recipe.label() == "2.5GB-vlmq-vision4" and recipe.grid == "2.5 GB"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Qwen2.5-VL-3B by its config.json and the headers of its tensors."""
    folder = tmp_path_factory.mktemp("published") / "Qwen2.5-VL-3B"
    headers(folder, MODELS["Qwen2.5-VL-3B"])
    return folder


@pytest.mark.parametrize(("size", "keys"), [(2.5, {"vision_bits": 0}), (2.0, {})])
def test_a_published_3b_is_planned_within_its_size(published, size, keys):
    found = planned(published, target_size=size, **keys)
    assert found.refusals == []
    assert 0.999 * size * 1e9 < found.formats["gguf"].size_bytes <= size * 1e9


def test_a_published_3b_of_two_gb_has_no_room_for_a_tower_of_16_bits(published):
    with pytest.raises(UsageError) as raised:
        planned(published, target_size=2.0, vision_bits=0)
    assert str(raised.value) == (
        "--target-size 2: the package takes at least 2.165 GB, and about 1.539 with"
        " --vision-bits 8; raise it"
    )
