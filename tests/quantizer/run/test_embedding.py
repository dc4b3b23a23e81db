"""The token embedding as integers that every format shares.

It is rounded to nearest on a symmetric grid, and nothing else changes but the stream that begins
with it.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.jobs import job_for, quantized, tied_and_untied
from tests.quantizer.run.test_quantize import files
from tools.docs.sizes import headers
from tools.reference_vlm.random_checkpoint import QWEN2_5_VL_3B
from vlmq_export import bundled, plan
from vlmq_export.errors import ArtifactError, UsageError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.model_plan import artifact_plan, model_plan
from vlmq_export.planning.run_plan import outside_of, plan_run
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.rotation import rotated
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.ranks import ALONE
from vlmq_export.quantizer.run import outer
from vlmq_export.quantizer.run.first_pass import first_pass
from vlmq_export.quantizer.run.refusals import check_shapes
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.solver.nearest import nearest_in_groups, round_to_nearest
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "model.embed_tokens"
CONFIG = QuantConfig(method="gptq", bits=4, group_size=64, embedding_bits=8)


@pytest.fixture(scope="module")
def samples():
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:8]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Whether the output matrix is tied → a random Qwen2-VL of two layers."""
    return tied_and_untied(tmp_path_factory.mktemp("models"))


def run(source, samples, out, config=CONFIG, **options):
    return quantized(source, samples, out, config, **options)


@pytest.fixture(scope="module")
def solved(checkpoints, samples, tmp_path_factory):
    """The same, quantized."""
    folder = tmp_path_factory.mktemp("solved")
    return {t: run(source, samples, folder / str(t)) for t, source in checkpoints.items()}


# --- the grid -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_the_search_gains_over_the_largest_weight_of_a_group_and_zeros_stay_zeros(bits, kind):
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits))
    weights[3] = 0
    found = nearest_in_groups(weights, GRIDS[kind])
    plain = round_to_nearest(weights, Affine(bits, symmetric=True), group=32)
    error, usual = (float((s.decode() - weights).square().sum()) for s in (found, plain))
    assert error < 0.9 * usual
    assert found.out_of_range(bits) == "" and not found.decode()[3].any()
    assert bool((found.zero_points == 2 ** (bits - 1)).all()) and found.natural_order
    assert found.scales.dtype == torch.float16 and found.scales.shape == (64, 4)


# --- the artifact ---------------------------------------------------------------------------------


def test_a_model_without_it_has_the_keys_of_earlier_versions(checkpoints, samples, tmp_path):
    config = dataclasses.replace(CONFIG, embedding_bits=0)
    artifact = run(checkpoints[True], samples, tmp_path / "a", config)
    for file in ("manifest.json", "run.json"):
        recipe = json.loads((artifact.path / file).read_text("utf-8"))["config"]
        assert "embedding_bits" not in recipe and recipe["head_bits"] == 0
    assert NAME not in artifact.records and f"{NAME}.weight" in artifact.float_names()


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_is_integers_and_a_tied_output_matrix_stays_tied(solved, checkpoints, tied):
    artifact, source = solved[tied], Checkpoint(checkpoints[tied])
    record = artifact.records[NAME]
    assert (record.bits, record.group_size, record.symmetric, record.layer) == (8, 32, True, -1)
    weight = source.tensor(f"{NAME}.weight").float()
    assert float((artifact.linear(NAME).decode() - weight).norm() / weight.norm()) < 0.006
    assert f"{NAME}.weight" not in artifact.float_names()
    assert ("lm_head.weight" in artifact.float_names()) == (not tied)
    assert artifact.architecture.tied == tied


@pytest.mark.parametrize("typed", [False, True])
def test_an_output_matrix_that_is_stored_though_tied_does_not_stay_beside_the_integers(
    checkpoints, tmp_path, typed
):
    """A proof would look for two matrices where the files have one."""
    source = shutil.copytree(checkpoints[True], tmp_path / "model")
    (weights,) = source.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors[f"{NAME}.weight"].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    config = dataclasses.replace(CONFIG, method="rtn")
    if typed:
        names = Checkpoint(source).architecture.linears
        config = QuantConfig(method="rtn", types=dict.fromkeys([*names, NAME], "Q4_0"))
    artifact = run(source, [], tmp_path / "a", config)
    assert Checkpoint(source).architecture.tied and "lm_head.weight" not in artifact.float_names()
    planned = model_plan(Checkpoint(source), config, "m")
    assert typed or sorted(t.name for t in planned.floats) == sorted(artifact.float_names())


def test_the_quantized_stream_begins_with_the_rows_that_ship(checkpoints, samples, solved):
    checkpoint = Checkpoint(checkpoints[True])
    shipped = solved[True].linear(NAME)
    job = Job.of(checkpoint.architecture, dataclasses.replace(CONFIG, method="vlmq-paper"))
    assert job.method.two_streams
    device = torch.device("cpu")
    model = StreamedModel(checkpoint, device)
    for batch in first_pass(model, samples, [shipped], [], job, Shelf(device), ALONE):
        words = ~batch.image
        rows = batch.ids[words]
        assert torch.equal(batch.full[words], checkpoint.tensor(f"{NAME}.weight").float()[rows])
        assert torch.equal(batch.quantized[words], shipped.decode()[rows])


def test_it_stands_beside_a_head_of_its_own(checkpoints, samples, tmp_path):
    config = dataclasses.replace(CONFIG, embedding_bits=4, head_bits=8)
    artifact = run(checkpoints[True], samples, tmp_path / "a", config)
    assert artifact.records[NAME].bits == 4 and artifact.records["lm_head"].bits == 8
    assert not artifact.architecture.tied


def test_a_rotated_model_has_its_rotated_rows(checkpoints, tmp_path):
    """Its output matrix takes the last norm's gain, and is another one from then on."""
    config = dataclasses.replace(CONFIG, method="rtn", rotate="folded")
    artifact = run(checkpoints[True], [], tmp_path / "a", config)
    turned = rotated(Checkpoint(checkpoints[True]), "folded", 0).tensor(f"{NAME}.weight").float()
    found = artifact.linear(NAME).decode()
    assert float((found - turned).norm() / turned.norm()) < 0.006
    assert "lm_head.weight" in artifact.float_names() and not artifact.architecture.tied


def test_the_plan_of_a_3b_is_smaller_by_what_the_table_saves(tmp_path):
    """A bfloat16 table of 151 936 × 2048, which is the output matrix too."""
    headers(tmp_path / "3b", QWEN2_5_VL_3B)
    given = {"model": str(tmp_path / "3b"), "format": ["onnx", "gguf"]}
    sizes = {
        bits: {
            n: p.size_bytes for n, p in plan(Recipe(**given, embedding_bits=bits)).formats.items()
        }
        for bits in (0, 8, 4)
    }
    numel = 151936 * 2048
    for bits in (8, 4):
        saved = {n: 8 * (sizes[0][n] - sizes[bits][n]) / numel for n in ("onnx", "gguf")}
        assert saved["gguf"] == pytest.approx(16 - bits - 0.5)
        assert saved["onnx"] == pytest.approx(16 - bits - (16 + bits) / 32, rel=1e-3)


def test_a_killed_run_goes_on_with_the_pieces_that_it_has(checkpoints, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, method="rtn")
    monkeypatch.setattr(outer, "ROWS", 100)
    run(checkpoints[True], [], tmp_path / "whole", config)
    fit, fitted = outer.nearest_in_groups, []

    def killed(weights, grid):
        if len(fitted) == 2:
            raise KeyboardInterrupt
        fitted.append(len(weights))
        return fit(weights, grid)

    monkeypatch.setattr(outer, "nearest_in_groups", killed)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints[True], [], tmp_path / "a", config)
    fitted.insert(0, 0)  # the third piece and all that follow
    run(checkpoints[True], [], tmp_path / "a", config, resume=True)
    rows = Checkpoint(checkpoints[True]).info(f"{NAME}.weight").shape[0]
    assert sum(fitted) == rows
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def test_another_width_does_not_resume_it(checkpoints, tmp_path):
    config = dataclasses.replace(CONFIG, method="rtn")
    run(checkpoints[True], [], tmp_path / "a", config)
    for bits in (0, 4):
        other = dataclasses.replace(config, embedding_bits=bits)
        with pytest.raises(ArtifactError, match="embedding_bits was 8, now"):
            run(checkpoints[True], [], tmp_path / "a", other, resume=True)


# --- plans and refusals ---------------------------------------------------------------------------


def test_the_plan_before_is_the_plan_after(checkpoints, solved):
    for tied, source in checkpoints.items():
        before, after = model_plan(Checkpoint(source), CONFIG, "m"), artifact_plan(solved[tied])
        assert before.linears == after.linears and before.architecture == after.architecture
        assert sorted(t.name for t in before.floats) == sorted(t.name for t in after.floats)
        table = before.linears[0]
        assert outside_of(before) == {"Q8_0": table.out_features * table.in_features}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["onnx", "gguf"])
def test_the_plan_tells_the_size(checkpoints, solved, tied, format, tmp_path):
    options = FormatOptions()
    FORMATS[format].write(solved[tied], tmp_path, options)
    files = [f for f in tmp_path.iterdir() if f.suffix in (".onnx", ".data", ".gguf")]
    written = sum(f.stat().st_size for f in files)
    planned = FORMATS[format].plan(model_plan(Checkpoint(checkpoints[tied]), CONFIG, "m"), options)
    assert not planned.refusals and planned.size_bytes == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_gguf_has_the_same_bytes_as_the_block_type(bits, kind, checkpoints, tmp_path):
    """An embedding that was solved on the block type itself is stored in the same bytes."""
    own = QuantConfig(method="rtn", bits=4, group_size=64, embedding_bits=bits)
    names = Checkpoint(checkpoints[True]).architecture.linears
    typed = QuantConfig(method="rtn", types=dict.fromkeys(names, "Q4_0") | {NAME: kind})
    found = []
    for place, config in (("a", own), ("b", typed)):
        artifact = run(checkpoints[True], [], tmp_path / place, config)
        folder = tmp_path / f"{place}.gguf"
        FORMATS["gguf"].write(artifact, folder, FormatOptions())
        file = GGUFFile(find_files(folder)[0])
        assert file.tensors["token_embd.weight"].type == kind
        assert "output.weight" not in file.tensors
        found.append(file.raw("token_embd.weight").tobytes())
    assert found[0] == found[1]


def test_folders_for_transformers_are_refused_by_name(solved):
    formats = ["gptq", "compressed-tensors", "onnx", "gguf"]
    recipe = Recipe(format=formats, group_size=64, embedding_bits=8)
    refusals = plan_run(artifact_plan(solved[False]), recipe).refusals
    assert [r.partition(" ")[0] for r in refusals] == ["gptq:", "compressed-tensors:"]
    assert all("--embedding-bits 8" in r for r in refusals)
    for format in formats[:2]:
        with pytest.raises(Exception, match="--embedding-bits 8"):
            FORMATS[format].write(solved[False], solved[False].path.parent, FormatOptions())


def test_options_that_make_no_sense_are_one_line():
    with pytest.raises(UsageError, match="--embedding-bits 2: the runtimes look rows up in 4 or 8"):
        load_recipe(None, {"embedding_bits": 2})
    says = "--embedding-bits and --gguf-type .* exclude each other: the mix names the embedding's"
    with pytest.raises(UsageError, match=says):
        load_recipe(None, {"embedding_bits": 8, "gguf_type": "Q4_K_M"})
    with pytest.raises(UsageError, match="embedding bits 3 is not supported"):
        check_shapes([], job_for(QuantConfig(method="rtn", embedding_bits=3)))


@pytest.mark.parametrize(("said", "bits"), [("off", 0), ("8", 8), ("4", 4), (8, 8), (False, 0)])
def test_it_is_said_in_words_or_numbers(said, bits, tmp_path):
    assert Recipe(embedding_bits=said).quant_config().embedding_bits == bits
    file = tmp_path / "r.yaml"
    file.write_text(f"embedding_bits: {said}\n")
    assert load_recipe(file, {}).embedding_bits == bits
    assert load_recipe(file, {"embedding_bits": "off"}).embedding_bits == 0


def test_a_width_asks_for_integers_that_formats_share():
    """`--format gguf` alone would choose llama.cpp's own types."""
    assert Recipe(format=["gguf"], embedding_bits=8).asks_for_affine
    assert not load_recipe(None, {"format": "gguf", "embedding_bits": "off"}).asks_for_affine
    assert Recipe(embedding_bits=4).label() == "w4g128-embed4-vlmq"


def test_rows_that_are_no_groups_are_refused(checkpoints):
    """Groups of one channel fit every width; the embedding's groups of 32 do not."""
    config = QuantConfig(method="rtn", bits=4, group_size=-1, embedding_bits=8)
    model = model_plan(Checkpoint(checkpoints[True]), config, "m")
    table = dataclasses.replace(model.linears[0], in_features=80)
    model = dataclasses.replace(model, linears=[table, *model.linears[1:]])
    (refusal,) = plan_run(model, Recipe(group_size=-1)).refusals
    assert refusal.startswith("--embedding-bits 8: rows of 80 columns do not fill groups of 32")


def test_a_manifest_with_an_impossible_width_is_damaged(solved, tmp_path):
    shutil.copytree(solved[True].path, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["config"]["embedding_bits"] = 5
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="a recipe of"):
        Artifact(tmp_path / "a")
