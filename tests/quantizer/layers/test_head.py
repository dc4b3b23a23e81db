"""The output head, quantized when the recipe asks for it.

It is calibrated on what the last norm gives it, and nothing else changes.
"""

import dataclasses
import json
import shutil

import pytest
import torch

from tests.jobs import quantized, tied_and_untied
from tests.quantizer.run.test_quantize import files, write
from vlmq_export import bundled
from vlmq_export.errors import ArtifactError, Interrupted, UsageError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.model_plan import artifact_plan, model_plan
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.planning.run_plan import plan_run, shapes_of
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers import head as output_head
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.rotation import rotated
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.ranks import ALONE
from vlmq_export.quantizer.run.first_pass import first_pass
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = QuantConfig(method="vlmq-paper", bits=3, group_size=64, head_bits=3)


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
    """The artifact of each of these checkpoints."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {
        t: run(source, samples, tmp_path_factory.mktemp("solved") / "a")
        for t, source in checkpoints.items()
    }
    torch.set_num_threads(before)
    return made


def head_inputs(artifact, source, samples):
    """x of the output head, float64 [tokens, in].

    It comes from transformers' own forward pass with the quantized layers.
    """
    model = load_model(Checkpoint(source), torch.device("cpu"))
    if Checkpoint(source).architecture.tied:  # `write` must replace the head, not the embedding
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    write(model, artifact)
    seen = []
    handle = model.lm_head.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        for sample in samples:
            model(**sample.model_inputs(), use_cache=False)
    handle.remove()
    return torch.cat(seen)


def matrix_of(source):
    """The output matrix, float64 [vocabulary, hidden]. A tied one is the embedding."""
    checkpoint = Checkpoint(source)
    own = "lm_head.weight" in checkpoint.tensors
    return checkpoint.tensor("lm_head.weight" if own else "model.embed_tokens.weight").double()


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_solved_on_what_the_final_norm_gives_it(tied, checkpoints, samples, tmp_path):
    """The loss in its metrics is that of its true inputs, summed over the tokens in float64."""
    config = dataclasses.replace(CONFIG, method="gptq")
    artifact = run(checkpoints[tied], samples, tmp_path / "a", config)
    x, weight = head_inputs(artifact, checkpoints[tied], samples), matrix_of(checkpoints[tied])
    metrics = artifact.records["lm_head"].metrics

    def loss_of(found):
        error = found.linear("lm_head").decode().double() - weight
        return float((error @ x.T).square().sum())

    loss, energy = loss_of(artifact), float((weight @ x.T).square().sum())
    assert metrics["loss"] == pytest.approx(loss, rel=1e-3)
    assert metrics["tokens"] == len(x)
    assert metrics["relative_error"] == pytest.approx((loss / energy) ** 0.5, rel=1e-3)
    nearest = dataclasses.replace(CONFIG, method="rtn")
    assert loss < 0.9 * loss_of(run(checkpoints[tied], [], tmp_path / "rtn", nearest))


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_else_changes(tied, checkpoints, samples, solved, tmp_path):
    artifact, source = solved[tied], Checkpoint(checkpoints[tied])
    plain = dataclasses.replace(CONFIG, head_bits=0)
    without = run(checkpoints[tied], samples, tmp_path / "a", plain)
    for name in without.linear_names():
        for part, value in without.linear(name).tensors().items():
            assert torch.equal(artifact.linear(name).tensors()[part], value), name
    assert set(artifact.linear_names()) - set(without.linear_names()) == {"lm_head"}
    taken = set(without.float_names()) - set(artifact.float_names())
    assert taken == (set() if tied else {"lm_head.weight"})
    name = "model.embed_tokens.weight"
    assert torch.equal(artifact.float_tensor(name), source.tensor(name))
    assert not artifact.architecture.tied
    assert without.architecture.tied is tied
    weight, decoded = matrix_of(checkpoints[tied]), artifact.linear("lm_head").decode().double()
    error = float((decoded - weight).norm() / weight.norm())
    assert artifact.records["lm_head"].metrics["weight_error"] == pytest.approx(error, rel=1e-4)


def test_transformers_computes_with_the_heads_own_matrix(solved, samples):
    """With a config.json that still says tied, transformers would drop the matrix silently."""
    model = Reference(solved[True].path, []).model
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, solved[True].linear("lm_head").decode())


def test_rows_in_slabs_are_the_rows_of_one_matrix(
    checkpoints, samples, solved, tmp_path, monkeypatch
):
    """The head is solved in slabs of rows. Products of other sizes may round another way."""
    monkeypatch.setattr(output_head, "SLAB", 100)
    artifact = run(checkpoints[False], samples, tmp_path / "a")
    whole, slabs = (a.linear("lm_head") for a in (solved[False], artifact))
    one, other = whole.solution, slabs.solution
    assert float((one.codes == other.codes).float().mean()) > 0.999
    assert torch.equal(one.scales[:, :1], other.scales[:, :1])
    assert torch.equal(one.g_idx, other.g_idx)
    for key in ("loss", "relative_error", "nearest_error", "weight_error"):
        before, after = (a.records["lm_head"].metrics[key] for a in (solved[False], artifact))
        assert after == pytest.approx(before, rel=1e-3)


def test_slabs_of_a_head_share_the_samples_that_were_put_aside(checkpoints, samples, monkeypatch):
    """`auto` puts samples aside, and no slab may find them among those that it is solved with."""
    seen = []

    def spy(matrices, evidence, job):
        seen.append((evidence.fitted.tokens, evidence.held.tokens, evidence.everything.tokens))
        return solve_unit(matrices, evidence, job)

    solve_unit = output_head.solve_unit
    model = StreamedModel(Checkpoint(checkpoints[False]), torch.device("cpu"))
    config = dataclasses.replace(CONFIG, method="auto", head_bits=3)
    job = Job.of(model.checkpoint.architecture, config)
    batches = first_pass(model, samples, [], [], job, Shelf(model.device), ALONE)
    whole, metrics = output_head.quantize_head(model, batches, job)
    monkeypatch.setattr(output_head, "solve_unit", spy)
    monkeypatch.setattr(output_head, "SLAB", 100)
    slabs, _ = output_head.quantize_head(model, batches, job)
    tokens = sum(len(sample.input_ids) for sample in samples)
    assert len(seen) > 2 and len(set(seen)) == 1
    assert sum(seen[0][:2]) == seen[0][2] == metrics["tokens"] == tokens
    assert float((whole.solution.codes == slabs.solution.codes).float().mean()) > 0.9


def test_a_run_stopped_before_the_head_resumes_to_the_same_bytes(
    checkpoints, samples, solved, tmp_path
):
    source, folder = checkpoints[True], tmp_path / "a"
    for layer in (1, 2):
        with pytest.raises(Interrupted, match=f"stopped after layer {layer} of 2"):
            run(source, samples, folder, resume=layer > 1, should_stop=lambda: True)
    assert not (folder / "manifest.json").exists()
    run(source, samples, folder, resume=True)
    assert files(folder) == files(solved[True].path)
    (folder / "manifest.json").unlink()  # as if killed between the head and the manifest
    run(source, samples, folder, resume=True)
    assert files(folder) == files(solved[True].path)


def test_eight_bits_are_symmetric_and_the_rest_is_as_the_recipe_says(checkpoints, tmp_path):
    config = dataclasses.replace(CONFIG, method="rtn", bits=4, head_bits=8)
    record = run(checkpoints[True], [], tmp_path / "a", config).records["lm_head"]
    assert (record.bits, record.group_size, record.symmetric, record.layer) == (8, 64, True, 2)
    assert config.of("model.layers.0.mlp.up_proj") is config
    assert config.of("language_model.lm_head").bits == 8


def test_a_family_whose_head_has_another_name(tiny, tmp_path):
    source = tiny("internvl", layers=2)
    artifact = run(source, [], tmp_path / "a", dataclasses.replace(CONFIG, method="rtn"))
    name = artifact.architecture.family.head
    assert name == "language_model.lm_head"
    assert name in artifact.records
    assert not artifact.architecture.tied


def test_the_heads_type_in_a_mix_is_solved_too(checkpoints, samples, tmp_path):
    names = Checkpoint(checkpoints[False]).architecture.linears
    types = dict.fromkeys([*names, "model.embed_tokens"], "Q4_0") | {"lm_head": "Q6_K"}
    config = QuantConfig(method="gptq", gguf_type="Q4_0", types=types)
    artifact = run(checkpoints[False], samples, tmp_path / "a", config)
    head, embedding = artifact.records["lm_head"], artifact.records["model.embed_tokens"]
    assert head.type == "Q6_K" and head.metrics["loss"] > 0 and head.layer == 2
    assert embedding.type == "Q4_0" and embedding.metrics == {} and embedding.layer == -1


# --- plans and refusals ---------------------------------------------------------------------------


def test_the_plan_before_is_the_plan_after(checkpoints, solved):
    for tied, source in checkpoints.items():
        before, after = model_plan(Checkpoint(source), CONFIG, "m"), artifact_plan(solved[tied])
        assert before.linears == after.linears and before.architecture == after.architecture
        assert sorted(t.name for t in before.floats) == sorted(t.name for t in after.floats)
        assert len(shapes_of(before).linears) == 7 and shapes_of(before).layers == 2


def test_gptq_files_are_refused_by_name_before_anything_is_written(solved):
    recipe = Recipe(format=["gptq", "onnx"], head_bits=3, bits=3, group_size=64)
    refusals = plan_run(artifact_plan(solved[False]), recipe).refusals
    assert all("head" in r for r in refusals)
    assert refusals[0].startswith("gptq: --head-bits 3")
    with pytest.raises(Exception, match="--head-bits 3"):
        FORMATS["gptq"].write(solved[False], solved[False].path.parent, FormatOptions())


def test_options_that_make_no_sense_are_one_line():
    with pytest.raises(UsageError, match="--head-bits 5: the runtimes decode 2, 3, 4 or 8 bits"):
        load_recipe(None, {"head_bits": 5})
    says = r"--head-bits and --gguf-type .* exclude each other: the mix names the head's"
    with pytest.raises(UsageError, match=says):
        load_recipe(None, {"head_bits": 4, "gguf_type": "Q4_K_M"})
    assert Recipe(head_bits=4).label() == "w4g128-head4-vlmq"
    assert Recipe().quant_config().head_bits == 0


def test_a_manifest_with_an_impossible_head_is_damaged(solved, tmp_path):
    shutil.copytree(solved[True].path, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["config"]["head_bits"] = 5
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="a recipe of"):
        Artifact(tmp_path / "a")


@pytest.mark.parametrize(
    "method", ["gptq", "awq", *(pytest.param(m, marks=pytest.mark.slow) for m in ("exact", "auto"))]
)
def test_methods_that_choose_or_scale_solve_a_head_too(method, checkpoints, samples, tmp_path):
    """AWQ and MBQ have nothing to scale before the head, and round it to nearest."""
    config = dataclasses.replace(CONFIG, method=method)
    artifact = run(checkpoints[True], samples, tmp_path / "a", config)
    assert ("loss" in artifact.records["lm_head"].metrics) == (method != "awq")


def test_a_rotated_tied_model_gets_a_head_in_the_rotated_space(checkpoints, samples, tmp_path):
    """The gain of the last norm goes into the head alone, so the embedding is another matrix."""
    config = dataclasses.replace(CONFIG, method="gptq", rotate="folded")
    artifact = run(checkpoints[True], samples, tmp_path / "a", config)
    turned = rotated(Checkpoint(checkpoints[True]), "folded", 0)
    rotated_head = turned.tensor("lm_head.weight").double()
    head = artifact.linear("lm_head").decode().double()
    error = float((head - rotated_head).norm() / rotated_head.norm())
    assert artifact.records["lm_head"].metrics["weight_error"] == pytest.approx(error, rel=1e-4)
    embedding = artifact.float_tensor("model.embed_tokens.weight").double()
    assert float((rotated_head - embedding).norm() / embedding.norm()) > 0.05
