"""--target-size: vision tower, embedding and output head are chosen with the decoder's matrices."""

import re
import shutil

import pytest

from tests.vlmq_export.test_cli import call, refused
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import Recipe, bundled
from vlmq_export.errors import UsageError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.planning import target_bpw
from vlmq_export.planning.budget import budget_of as types_budget
from vlmq_export.planning.mixed_widths import choices_of
from vlmq_export.planning.parts import open_parts
from vlmq_export.planning.target_bpw import measured_costs
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import TOWER
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.recipes.recipe_file import load_recipe
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.locate import open_source

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--method", "gptq", "--samples", 4, "--no-verify", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("m") / "model", layers=1, depth=3)


def planned(model, *formats, **keys):
    """(plan of a run, its recipe)."""
    source, recipe = open_source(str(model)), Recipe(model=str(model), format=[*formats], **keys)
    recipe = source.recipe_for(recipe, CalibrationRows(recipe))
    return source.plan(recipe), recipe


def least_of(model, *formats, **keys):
    """The size in GB that the refusal of a much too small one names."""
    with pytest.raises(UsageError) as raised:
        planned(model, *formats, target_size=1e-5, **keys)
    return float(re.findall(r"at least ([\d.]+) GB", str(raised.value))[0])


def parts(config):
    """The bits of tower, embedding and head."""
    return config.vision_bits, config.embedding_bits, config.head_bits


@pytest.mark.parametrize(
    ("formats", "keys", "want"),
    [
        (["onnx"], {}, {"vision": (4, 8), "embed_tokens": (4, 8)}),
        (["onnx", "gguf"], {"vision_bits": 8}, {"embed_tokens": (4, 8)}),
        (["onnx"], {"vision_bits": 8, "embedding_bits": 0}, {}),
        (["gguf"], {}, {"vision": (4, 5, 6, 8)}),
        (["gguf"], {"vision_bits": 6}, {}),
        (["compressed-tensors"], {}, {}),  # which keeps the parts as they are
    ],
)
def test_parts_that_the_recipe_leaves_open_are_chosen(formats, keys, want, model):
    found, recipe = planned(model, *formats, target_size=1, **keys)
    opened = open_parts(found.model, recipe)
    assert {name.rpartition(".")[2]: widths for name, widths in opened.items()} == want
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_only_a_tower_that_blocks_fit_may_have_five_or_six_bits(model):
    found, recipe = planned(model, "gguf", target_size=1)
    choices = types_budget(found.model, recipe).choices[TOWER]
    assert choices[4] < choices[5] < choices[6] < choices[8]
    found, recipe = planned(bundled.REFERENCE_VLM, "gguf", target_size=1)
    assert open_parts(found.model, recipe)[TOWER] == (4, 8)


def test_an_open_tower_leaves_the_decoder_the_types_that_one_of_8_bits_leaves_it():
    opened, fixed = (
        types_budget(found.model, recipe).choices
        for found, recipe in (
            planned(bundled.REFERENCE_VLM, "gguf", target_size=0.0034, **keys)
            for keys in ({}, {"vision_bits": 8})
        )
    )
    assert {name: {*kinds} for name, kinds in opened.items() if name != TOWER} == {
        name: {*kinds} for name, kinds in fixed.items()
    }
    assert any("IQ2_XXS" in kinds for kinds in fixed.values())


def test_an_output_head_of_its_own_has_all_widths(tiny):
    found, recipe = planned(tiny("internvl", tied=False), "onnx", target_size=1)
    head = found.model.architecture.family.head
    assert [*choices_of(found.model, recipe)[(head,)]] == [2, 3, 4, 8]


@pytest.mark.parametrize("formats", [("onnx",), ("gguf",), ("onnx", "gguf")])
def test_the_least_size_has_the_smallest_parts(formats, model):
    keys = {"sym": True} if len(formats) > 1 else {}
    least = least_of(model, *formats, **keys)
    assert least < least_of(model, *formats, vision_bits=8, **keys)
    found, _ = planned(model, *formats, target_size=least, **keys)
    assert found.refusals == []
    assert max(plan.size_bytes for plan in found.formats.values()) <= least * 1e9
    assert parts(found.model.config)[:2] == ((4, 0) if formats == ("gguf",) else (4, 4))


def test_only_the_decoders_matrices_make_up_for_each_other(model, monkeypatch):
    """Measured alone, a matrix costs more than beside the others. A part costs what it costs."""
    found, recipe = planned(model, "onnx", target_size=1)
    linear = next(iter(found.model.config.widths))
    bits = {name: {4: 1} for name in (linear, *open_parts(found.model, recipe))}

    def alone(_model, _job, kinds, *_):
        return {name: dict.fromkeys(each, 1.0) for name, each in kinds.items()}

    monkeypatch.setattr(target_bpw, "measured", alone)
    checkpoint = Checkpoint(model)
    costs = measured_costs(found.model, recipe, bits, checkpoint, [], 10**9, lambda *_: None)
    assert {name: cost[4][1] for name, cost in costs.items() if cost[4][1] < 1} == {linear: 0.4}


@pytest.fixture(scope="module", params=["onnx", pytest.param("gguf", marks=pytest.mark.slow)])
def made(request, model, tmp_path_factory):
    """(output folder, its flags, its size) of a run that chooses its parts."""
    size = 1.25 * least_of(model, request.param)
    out = tmp_path_factory.mktemp("made") / "out"
    flags = (model, "--format", request.param, *QUICK, "--target-size", size)
    code, _, err = call(*flags, "--out", out)
    assert code == 0, err
    return out, flags, size


def test_what_is_written_keeps_the_size(made):
    out, flags, size = made
    plan = FORMATS[flags[2]].plan(artifact_plan(Artifact(out / "artifact")), FormatOptions())
    assert 0.9 * size * 1e9 < plan.size_bytes <= size * 1e9
    vision, embedding, _ = parts(Artifact(out / "artifact").config)
    assert vision in (4, 5, 6, 8) and embedding in ((4, 8) if flags[2] == "onnx" else (0,))
    recipe = load_recipe(out / "recipe.yaml", {})
    assert recipe.vision_bits is None  # so that the same file chooses again
    assert "-vision" not in recipe.label()


def test_a_resumed_run_keeps_the_widths_of_its_parts(made, tmp_path):
    out, flags, _ = made
    shutil.copytree(out, tmp_path / "out")
    before = Artifact(out / "artifact").config
    (tmp_path / "out" / "artifact" / "manifest.json").unlink()
    code, _, err = call(*flags, "--out", tmp_path / "out", "--resume")
    assert code == 0, err
    assert Artifact(tmp_path / "out" / "artifact").config == before
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "artifact" / "manifest.json").unlink()
    run = tmp_path / "out" / "artifact" / "run.json"
    run.write_text(run.read_text().replace('"vision_bits": ', '"vision_bits": 1'))
    said = refused(*flags, "--out", tmp_path / "out", "--resume", code=1)
    assert "are not those of this recipe" in said
