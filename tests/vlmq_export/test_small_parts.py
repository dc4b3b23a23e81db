"""Vision tower, embedding and output head are quantized where every format of a run holds them."""

import json

import pytest

from tests.vlmq_export.test_cli import call, refused
from tools.docs.sizes import MODELS, headers
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export import Recipe
from vlmq_export.bundled import CALIBRATION
from vlmq_export.formats.gguf.types.exact import tower_home
from vlmq_export.formats.model_plan import source_parts
from vlmq_export.planning.run_plan import RunPlan
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.recipes.recipe_file import load_recipe
from vlmq_export.sources.calibration import CalibrationRows
from vlmq_export.sources.locate import open_source

pytestmark = pytest.mark.usefixtures("one_thread")


def planned(model, **keys) -> RunPlan:
    """The plan of a run, without its memory and time."""
    recipe = Recipe(model=None if model is None else str(model), **keys)
    source = open_source(recipe.model)
    return source.plan(source.recipe_for(recipe, CalibrationRows(recipe)))


def widths(model, **keys) -> tuple[int, int, int]:
    """The bits of tower, embedding and head that are planned."""
    found = planned(model, **keys).model.config
    return found.vision_bits, found.embedding_bits, found.head_bits


@pytest.fixture(scope="module")
def untied(tiny):
    return tiny("internvl", tied=False)


@pytest.mark.parametrize(
    ("keys", "tied", "apart"),
    [
        ({"format": ["onnx"]}, (8, 8, 0), (8, 8, 8)),
        ({"format": ["gguf"], "bits": 3}, (8, 8, 0), (8, 8, 8)),
        ({"format": ["gguf", "onnx"]}, (8, 8, 0), (8, 8, 8)),
        # Q4_K_M names embedding and head. Most of the tower of `apart` is its projector, whose rows
        # blocks of 256 fill.
        ({"format": ["gguf"]}, (8, 0, 0), (6, 0, 0)),
        ({"format": ["gguf"], "gguf_type": "Q2_K"}, (8, 0, 0), (6, 0, 0)),
        ({"format": ["gguf"], "target_bpw": 4}, (8, 0, 0), (6, 0, 0)),
        ({"format": ["gptq"]}, (0, 0, 0), (0, 0, 0)),
        ({"format": ["compressed-tensors"]}, (0, 0, 0), (0, 0, 0)),
        ({"format": ["gptq", "onnx", "gguf"]}, (0, 0, 0), (0, 0, 0)),
        ({"format": ["onnx"], "vision_bits": 0}, (0, 8, 0), (0, 8, 8)),
        ({"format": ["onnx"], "embedding_bits": "off"}, (8, 0, 0), (8, 0, 8)),
        ({"format": ["onnx"], "head_bits": "off"}, (8, 8, 0), (8, 8, 0)),
        ({"format": ["onnx"], "vision_bits": 4, "embedding_bits": 4}, (4, 4, 0), (4, 4, 8)),
        ({"format": ["onnx"], "method": "rtn"}, (8, 8, 0), (8, 8, 8)),
        ({"format": ["gguf"], "mmproj": "q8_0"}, (0, 0, 0), (0, 0, 0)),
        ({"format": ["gguf"], "bits": 4, "mmproj": "f16"}, (0, 8, 0), (0, 8, 8)),
    ],
)
def test_the_widths_follow_the_formats(keys, tied, apart, untied, tiny):
    keys = {"group_size": 32} | keys if "bits" in keys or "onnx" in keys["format"] else keys
    assert widths(None, **keys) == tied
    assert widths(untied, **keys) == apart


@pytest.mark.parametrize(
    ("keys", "bits"),
    [
        ({}, 6),
        ({"gguf_type": "Q2_K"}, 6),
        ({"gguf_type": "Q6_K"}, 8),
        ({"target_bpw": 4}, 6),
        ({"target_bpw": 6.5}, 8),
        ({"target_size": 9}, 8),  # which is chosen
        ({"vision_bits": 8}, 8),
        ({"bits": 4, "group_size": 64}, 8),
    ],
)
def test_a_tower_of_whole_blocks_has_six_bits_beside_a_smaller_decoder(keys, bits, blocks):
    model = planned(blocks, format=["gguf"], **keys).model
    assert model.config.vision_bits == bits
    kinds = {tower_home(model.config, x.in_features) for x in model.tower}
    assert kinds == ({"Q6_K"} if bits == 6 else {"Q8_0"})
    assert "vision" not in Recipe(format=["gguf"], vision_bits=bits).label()


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A model with a tower that is as wide as the blocks of K types."""
    shape = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
    folder = tmp_path_factory.mktemp("blocks") / "m"
    return make_tiny(folder, "idefics3", shape={"vision_config": shape})


def test_rows_without_images_leave_the_tower_as_it_is(tmp_path):
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": f"Say {i}."},
                                    {"role": "assistant", "content": str(i)}]}
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "text.json").write_text(json.dumps(rows))
    keys = {"format": ["onnx"], "calibration": tmp_path / "text.json", "samples": 2}
    assert widths(None, **keys) == (0, 8, 0)
    assert widths(None, **keys | {"method": "rtn"}) == (8, 8, 0)
    assert widths(None, **keys | {"calibration": CALIBRATION}) == (8, 8, 0)


def test_the_plan_says_what_another_format_costs():
    found = planned(None, format=["compressed-tensors", "onnx", "gptq"]).formats
    (said,) = [note for note in found["onnx"].notes if "stay as they are" in note]
    assert said == (
        "vision tower, embedding and output head stay as they are, because compressed-tensors and"
        " gptq cannot hold them all quantized; without compressed-tensors and gptq they take 8 bits"
    )
    assert not [note for note in found["gptq"].notes if "stay as they are" in note]
    (said,) = [note for note in found["compressed-tensors"].notes if "stays as it is" in note]
    assert said == (
        "the vision tower stays as it is; --vision-bits 8 makes it smaller, for transformers"
        " and vLLM 0.33.0 alone"
    )
    smaller = planned(None, format=["compressed-tensors"], vision_bits=8)
    (plan,) = smaller.formats.values()
    assert smaller.refusals == [] and not [n for n in plan.notes if "stays as it is" in n]
    assert plan.size_bytes < found["compressed-tensors"].size_bytes
    alone = planned(None, format=["onnx"], vision_bits=0).formats["onnx"]
    assert not [note for note in alone.notes if "stay as they are" in note]


@pytest.mark.parametrize(
    ("form", "keys", "limit"),
    [("gguf", {}, 2.6), ("gguf", {"target_size": 2}, 2.0), ("onnx", {}, 2.6)],
)
def test_a_published_3b_is_small(form, keys, limit, published):
    found = planned(published, format=[form], **keys)
    assert found.refusals == [] and found.formats[form].size_bytes / 1e9 <= limit


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Qwen2.5-VL-3B by its config.json and the headers of its tensors."""
    folder = tmp_path_factory.mktemp("published") / "Qwen2.5-VL-3B"
    headers(folder, MODELS["Qwen2.5-VL-3B"])
    return folder


def test_an_artifact_with_them_goes_to_the_formats_that_hold_them(untied, tmp_path):
    given = (untied, "--format", "onnx,gguf", "--method", "rtn", "--group-size", 32)
    code, _, err = call(*given, "--no-verify", "--out", tmp_path / "out")
    assert code == 0, err
    again = load_recipe(tmp_path / "out" / "recipe.yaml", {})
    assert (again.vision_bits, again.embedding_bits, again.head_bits) == (8, 8, 8)
    assert again.label() == "w4g32-rtn"
    artifact = tmp_path / "out" / "artifact"
    made = Artifact(artifact).config
    assert (made.vision_bits, made.embedding_bits, made.head_bits) == (8, 8, 8)
    code, _, err = call(artifact, "--format", "gguf", "--no-verify", "--out", tmp_path / "again")
    assert code == 0, err
    said = refused(artifact, "--format", "gptq", "--out", tmp_path / "no", code=2)
    for part in ("vision", "embedding", "head"):
        assert f"--{part}-bits 8: " in said and f"quantize with --{part}-bits off" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("small", [True, False])
def test_the_parts_are_the_whole(small, tied, tiny):
    """Of the source, by the bytes of its files, and of every format."""
    model = tiny("internvl", tied=tied)
    stored = sum(info.nbytes for info in Checkpoint(model).tensors.values())
    forms = ["onnx", "gguf"] if small else ["onnx", "gguf", "gptq", "compressed-tensors"]
    found = planned(model, format=forms, bits=4, group_size=32)
    assert found.refusals == []
    before = source_parts(found.model)
    assert sum(before.values()) == stored and (before["head"] > 0) is not tied
    for plan in found.formats.values():
        assert sum(plan.parts.values()) == plan.size_bytes
        assert plan.parts["text"] < before["text"] / 2
        assert (plan.parts["embedding"] < before["embedding"]) is small
        assert plan.parts["head"] == before["head"] or (small and not tied)


def test_the_dry_run_shows_the_parts_before_and_after(tiny):
    code, out, err = call(tiny("internvl", tied=False), "-f", "onnx", "--dry-run")
    assert code == 0, err
    table = out[out.index("\nMB") : out.index("\nbits per weight")].strip()
    rows = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert rows["MB"].split() == ["source", "onnx"]
    for part in ("text", "embedding", "head", "vision", "all"):
        before, after = map(float, rows[part].split())
        assert 0 < after < before
    code, out, err = call(tiny("internvl", tied=False), "-f", "onnx", "--dry-run", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert f"{told['source']['text'] / 1e6:.2f}" == rows["text"].split()[0]
    assert f"{told['formats']['onnx']['parts']['text'] / 1e6:.2f}" == rows["text"].split()[1]


def test_a_refused_format_has_no_sizes():
    flags = ("-f", "gguf,onnx", "--bits", 4, "--act-order", "dynamic", "--dry-run")
    code, out, _ = call(*flags)
    assert code == 2
    table = out[out.index("\nMB") : out.index("\nbits per weight") + 80].strip().splitlines()
    assert table[0].split() == ["MB", "source", "gguf", "onnx"]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert len(rows["text"]) == len(rows["all"]) == 2  # of the source and of ONNX
    assert rows["bits"][2] == "refused"
