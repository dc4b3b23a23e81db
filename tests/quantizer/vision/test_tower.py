"""The vision tower: what its linears are calibrated on, and what the decoder is given."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tests.jobs import job_for
from tools.reference_vlm.tiny_checkpoints import make_tiny
from tools.reference_vlm.tiny_families import ARCHES
from vlmq_export import bundled
from vlmq_export.errors import ArtifactError, CalibrationError, Interrupted, UsageError
from vlmq_export.formats.model_plan import model_plan
from vlmq_export.planning.run_plan import plan_run, shapes_of
from vlmq_export.quantizer.artifact.manifest import VISION, _is_tower, layer_file
from vlmq_export.quantizer.artifact.read import Artifact, read_layer
from vlmq_export.quantizer.calibration.batches import decoder_inputs
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.config import VISION_TYPES, QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.ranks import ALONE
from vlmq_export.quantizer.run.first_pass import first_pass
from vlmq_export.quantizer.run.memory_plan import on_tower
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row, read_rows
from vlmq_export.quantizer.samples.sample import Length, Lengths
from vlmq_export.quantizer.vision import stage
from vlmq_export.quantizer.vision.stage import put_tower, solve_vision, tower_names
from vlmq_export.quantizer.vision.tower import _evidence, tower_job, tower_method
from vlmq_export.quantizer.vision.walk import Picture, TowerWalk
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONFIG = QuantConfig(method="gptaq-exact", bits=4, group_size=64, vision_bits=4)
ROWS = 4


class Given:
    """A tiny model of a family, and a few samples."""

    def __init__(self, folder, config=CONFIG):
        self.checkpoint = Checkpoint(folder)
        self.job = job_for(config, self.checkpoint.written_config)
        preprocessor = Preprocessor(folder)
        rows = read_rows(bundled.CALIBRATION)[:ROWS]
        self.samples = [preprocessor.sample(row) for row in rows]
        self.names = tower_names(self.checkpoint)

    def solved(self, folder, samples=None):
        folder.mkdir(exist_ok=True)
        model, samples = StreamedModel(self.checkpoint, CPU), samples or self.samples
        return solve_vision(model, self.names, samples, self.job, folder, Shelf(CPU))

    def run(self, out, config=None, **options):
        given = {"name": "m", "calibration": {"rows": ROWS}, "device": "cpu"} | options
        samples = given.pop("samples", list(self.samples))
        quantize(self.checkpoint, samples, config or self.job.config, out, **given)


# What the other families have is in one of these too.
OFTEN = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")


@pytest.fixture(
    scope="module",
    params=[a if a in OFTEN else pytest.param(a, marks=pytest.mark.slow) for a in sorted(ARCHES)],
)
def every(request, tiny):
    return Given(tiny(request.param))


@pytest.fixture(scope="module")
def given(tiny):
    return Given(tiny("qwen2_5_vl"))


# --- what is solved -------------------------------------------------------------------------------


def test_every_linear_of_every_tower_is_solved_in_the_order_of_the_data(every, tmp_path):
    model = load_model(every.checkpoint, CPU)
    family, called = every.job.family, []
    for name in every.names:
        module = model.get_submodule(family.module_name(name))
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        model.model.get_image_features(**every.samples[0].image_inputs())
    tower = every.solved(tmp_path)
    assert [linear.name for linear in tower] == list(dict.fromkeys(called))
    assert set(called) == set(every.names)
    for linear in tower:
        assert linear.bits == 4 and linear.group_size == 32 and linear.symmetric
        weight = every.checkpoint.tensor(f"{linear.name}.weight").float()
        assert float((linear.decode() - weight).norm() / weight.norm()) < 0.2


def test_linears_whose_rows_do_not_fill_blocks_stay_float(every):
    linears = {
        every.job.family.hub_name(name): module.in_features
        for name, module in StreamedModel(every.checkpoint, CPU).model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    inside = {name for name in linears if every.job.family.is_vision(name)}
    assert set(every.names) == {name for name in inside if linears[name] % 32 == 0}
    assert every.names
    assert set(tower_names(every.checkpoint, short=True)) == inside


def test_the_statistics_are_those_of_whole_models(every):
    """A and D of linears in every segment, against float64 sums over transformers' own models."""
    job = tower_job(every.job)
    full, other = load_model(every.checkpoint, CPU), load_model(every.checkpoint, CPU)
    streamed = StreamedModel(every.checkpoint, CPU)
    modules = [job.family.module_name(name) for name in every.names]
    pictures = [Picture(sample.image_inputs()) for sample in every.samples]
    ids = torch.cat([sample.input_ids for sample in every.samples])
    with streamed.filled_prefix(ids) as prefix:
        walk = TowerWalk(prefix, modules, pictures, Shelf(CPU), two_streams=True)
        assert len(walk.segments) == len(walk._blocks) > 1
        for segment in walk.segments:
            for names in segment.groups:
                sums = _evidence(walk, names, job, ALONE).fitted
                hessian, drift = brute_force(full, other, names[-1], every.samples)
                assert torch.allclose(sums.hessian, hessian, rtol=1e-4, atol=1e-5 * hessian.max())
                found = sums.drift
                if found is None:  # few outputs: W·D alone is summed
                    weights = walk.model.get_submodule(names[0]).weight
                    assert len(names) == 1 and 2 * len(weights) < len(hessian)
                    found, drift = sums.pull, weights.double() @ drift
                size = max(float(drift.abs().max()), 1e-6 * float(hessian.max()))
                assert torch.allclose(found, drift, rtol=1e-3, atol=2e-3 * size)
                for name in names:  # a coarse grid, so that the drift is far above rounding
                    coarse = rounded(other.get_submodule(name).weight)
                    other.get_submodule(name).weight.data = coarse
                    walk.put(name, Coarse(coarse))
            walk.advance()


def test_of_many_pictures_some_are_counted(given, tmp_path, monkeypatch):
    """Three of 8 samples, from the shortest on: the integers are those of these alone."""
    samples = given.samples * (8 // len(given.samples))
    assert len(stage._pictures(samples, 3)) == 3
    assert len(stage._pictures(samples, 9)) == 8 and stage._pictures([], 3) == []
    ordered = sorted(samples, key=lambda s: len(s.input_ids))
    kept = [ordered[place] for place in (0, 2, 5)]
    monkeypatch.setattr(stage, "COUNTED", 3)
    few = given.solved(tmp_path / "few", samples)
    monkeypatch.setattr(stage, "COUNTED", 8)
    same = given.solved(tmp_path / "same", kept)
    assert all(torch.equal(a.decode(), b.decode()) for a, b in zip(few, same, strict=True))


def test_a_tower_takes_as_many_pictures_as_its_linears_have_inputs():
    """Those of README's 3B: 384 rows of 5120 numbers enter its projector, and 1536 of 3420 down."""
    assert stage.enough(5120, 384, 8) == 54 and stage.enough(3420, 1536, 6) == stage.FEWEST == 32
    assert stage.enough(12288, 64, 8) == stage.COUNTED == 128  # SmolVLM's connector
    assert stage.enough(5120, 384, 4) == stage.COUNTED  # where the tower costs most


@pytest.mark.parametrize(("bits", "streams"), [(8, 1), (6, 1), (4, 2), (3, 2)])
def test_a_tower_of_many_bits_needs_one_stream(given, monkeypatch, tmp_path, bits, streams):
    config = dataclasses.replace(given.job.config, method="exact", vision_bits=bits)
    job, passes = job_for(config, given.checkpoint.written_config), []
    reach = TowerWalk._reach

    def counted(self, name, *args, **kwargs):
        passes.append(name)
        return reach(self, name, *args, **kwargs)

    monkeypatch.setattr(TowerWalk, "_reach", counted)
    model = StreamedModel(given.checkpoint, CPU)
    tower = solve_vision(model, given.names, given.samples, job, tmp_path, Shelf(CPU))
    assert {linear.bits for linear in tower} == {bits}
    pictures = len(given.samples)
    assert passes.count(passes[0]) == streams * pictures
    assert tower_method(job.method, bits).two_streams == (streams == 2)


def test_the_plan_takes_the_projector_to_be_the_widest(given):
    shapes = shapes_of(model_plan(given.checkpoint, CONFIG, "m"))
    lengths = Lengths((Length(200, 16),) * 4 + (Length(50, 0),) * 4)
    assert on_tower(shapes, lengths, 8).samples == 4
    many = Lengths((Length(200, 16),) * 400)
    widest = max(columns for _, columns in shapes.tower)
    for bits in (4, 8):
        assert on_tower(shapes, many, bits).samples == stage.enough(widest, 16, bits)


@dataclasses.dataclass
class Coarse:
    """Stands in for a solved linear."""

    weight: torch.Tensor
    bias: None = None

    def decode(self) -> torch.Tensor:
        return self.weight


def rounded(weight: torch.Tensor) -> torch.Tensor:
    step = weight.abs().max() / 7
    return (weight / step).round() * step


@torch.no_grad()
def brute_force(full, other, name, samples):
    """Σ x xᵀ and Σ (x̃ − x) xᵀ, float64."""
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for which, model in enumerate((full, other)):
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook(
            lambda _, args, which=which: seen[which].append(args[0].flatten(0, -2).double())
        )
        for sample in samples:
            model.model.get_image_features(**sample.image_inputs())
        hook.remove()
    source, x = (torch.cat(each) for each in (seen[0], seen[1]))
    return x.T @ x, (source - x).T @ x


# --- what the decoder is given --------------------------------------------------------------------


def test_the_decoder_begins_with_the_tower_that_ships_and_with_the_source_s(every, tmp_path):
    tower = every.solved(tmp_path)
    model, ship = StreamedModel(every.checkpoint, CPU), load_model(every.checkpoint, CPU)
    batches = first_pass(model, every.samples, [], tower, every.job, Shelf(CPU), ALONE)
    options = {"two_streams": False, "device": CPU, "added": every.job.family.added}
    source = decoder_inputs(ship, every.samples, **options)
    put_tower(ship, tower, every.job)
    shipped = decoder_inputs(ship, every.samples, **options)
    for batch, full, quantized in zip(batches, source, shipped, strict=True):
        assert torch.allclose(batch.full, full.quantized, atol=1e-5)
        assert torch.allclose(batch.quantized, quantized.quantized, atol=1e-5)
        assert not torch.allclose(batch.quantized, batch.full, atol=1e-3)
        for mine, theirs, own in zip(batch.added, quantized.added, full.added, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
            assert not torch.allclose(mine, own, atol=1e-4)
        # What the first layers add differs between the streams too (DeepStack).
        states, features = (batch.quantized, batch.full), (quantized.added, full.added)
        batch.pass_layer(*states)
        for before, after, added in zip(states, (batch.quantized, batch.full), features):
            want = before.clone()
            if added:
                want[batch.vision] += added[0]
            assert torch.allclose(after, want, atol=1e-5)


def test_a_solved_tower_serves_better_than_a_rounded_one(tiny, tmp_path):
    """Random weights have no structure, so that little is gained; but something is."""
    errors = {}
    for method in ("rtn", "exact"):
        config = dataclasses.replace(CONFIG, method=method, vision_bits=3)
        own = Given(tiny("llava_onevision"), config)
        (tmp_path / method).mkdir()
        tower = own.solved(tmp_path / method)
        model = load_model(own.checkpoint, CPU)
        with torch.no_grad():
            want = [features(model, sample) for sample in own.samples]
            put_tower(model, tower, own.job)
            got = [features(model, sample) for sample in own.samples]
        errors[method] = sum(float((g - w).square().sum()) for g, w in zip(got, want))
    assert errors["exact"] < 0.7 * errors["rtn"], errors


def features(model, sample) -> torch.Tensor:
    found = model.model.get_image_features(**sample.image_inputs()).pooler_output
    return torch.cat([f.reshape(-1, f.shape[-1]) for f in found])


# --- files ----------------------------------------------------------------------------------------


def test_without_the_option_nothing_of_it_is_in_the_artifact(given, tmp_path):
    given.run(tmp_path / "a", dataclasses.replace(CONFIG, vision_bits=0))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert "vision_bits" not in manifest["config"]
    assert not (tmp_path / "a" / layer_file(VISION)).exists()
    assert all(m["layer"] >= 0 for m in manifest["modules"])


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The artifact of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "a"
    given.run(out)
    return Artifact(out)


def test_the_artifact_has_the_tower_in_a_file_of_its_own(given, whole):
    found = {r.name: r for r in whole.manifest.modules if r.layer == VISION}
    assert set(found) == set(given.names)
    tower = read_layer(whole.path, VISION)
    assert [linear.name for linear in tower] == list(found)
    assert whole.config.vision_bits == 4
    assert not {f"{name}.weight" for name in found} & set(whole.float_names())
    assert all(0 < r.metrics["relative_error"] < 0.5 for r in found.values())


@pytest.mark.parametrize("stop", ["behind the tower", "within the decoder"])
def test_a_stopped_run_ends_with_the_same_bytes(stop, given, whole, tmp_path):
    asked = iter([stop == "behind the tower", True])
    with pytest.raises(Interrupted, match="continue with --resume"):
        given.run(tmp_path / "a", should_stop=lambda: next(asked))
    assert (tmp_path / "a" / layer_file(VISION)).is_file()
    assert (tmp_path / "a" / layer_file(0)).is_file() == (stop != "behind the tower")
    given.run(tmp_path / "a", resume=True)
    names = {file.name for file in whole.path.glob("*.safetensors")} | {"manifest.json"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_a_resumed_run_wants_the_same_width(given, tmp_path):
    with pytest.raises(Interrupted):
        given.run(tmp_path / "a", should_stop=lambda: True)
    other = dataclasses.replace(CONFIG, vision_bits=8)
    with pytest.raises(ArtifactError, match="vision_bits was 4, now 8"):
        given.run(tmp_path / "a", other, resume=True)


def test_activations_may_rest_on_disk(given, whole, tmp_path):
    given.run(tmp_path / "a", place="disk")
    name = layer_file(VISION)
    assert (tmp_path / "a" / name).read_bytes() == (whole.path / name).read_bytes()
    assert not list((tmp_path / "a").glob(".*"))


# --- refusals -------------------------------------------------------------------------------------


def test_samples_without_images_are_refused(given, tmp_path, tiny):
    preprocessor = Preprocessor(tiny("qwen2_5_vl"))
    row = read_rows(bundled.CALIBRATION)[0]
    text = Row("text", tuple({**m, "content": [{"type": "text", "text": "Two and two"}]}
                             for m in row.messages), ())  # fmt: skip
    with pytest.raises(
        CalibrationError, match="--vision-bits 4: no calibration sample has an image"
    ):
        given.run(tmp_path / "a", samples=[preprocessor.sample(text)] * 2)


def test_images_that_are_all_damaged_are_refused(given, tmp_path):
    bad = [
        dataclasses.replace(s, pixel_values=torch.full_like(s.pixel_values, torch.nan))
        for s in given.samples
    ]
    with pytest.raises(CalibrationError, match="no sample has finite activations"):
        given.run(tmp_path / "a", samples=bad)


def test_one_damaged_image_is_left_out(given, tmp_path):
    first, *others = given.samples
    bad = dataclasses.replace(first, pixel_values=torch.full_like(first.pixel_values, torch.nan))
    given.run(tmp_path / "a", samples=[bad, *others])
    assert all(
        torch.isfinite(linear.decode()).all() for linear in Artifact(tmp_path / "a").linears()
    )


def test_a_width_that_no_format_has_is_refused(given, tmp_path):
    with pytest.raises(UsageError, match="vision bits 5 is not supported"):
        given.run(tmp_path / "a", dataclasses.replace(CONFIG, vision_bits=5))
    with pytest.raises(UsageError, match="--vision-bits 7: the runtimes decode 2, 3, 4 or 8 bits"):
        load_recipe(None, {"vision_bits": 7})
    for other in ({}, {"format": ["onnx"]}, {"format": ["gguf"], "bits": 4}):
        with pytest.raises(
            UsageError, match="--vision-bits 5: GGUF's block types alone have 5 and"
        ):
            load_recipe(None, {"vision_bits": 5} | other)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_on_block_types_the_tower_has_the_type_of_its_width(bits, tmp_path):
    shape = {"vision_config": {"hidden_size": 256, "intermediate_size": 500}}
    checkpoint = Checkpoint(make_tiny(tmp_path / "model", "llava_onevision", shape=shape))
    recipe = Recipe(format=["gguf"], vision_bits=bits).with_native_types()
    config = recipe.quant_config()
    kind, others = VISION_TYPES[bits]
    assert config.vision_type == kind and config.vision.bits == others
    plan = plan_run(model_plan(checkpoint, config, "m"), recipe)
    (said,) = (note for note in plan.formats["gguf"].notes if "vision tower" in note)
    fallback = {4: "Q4_0", 8: "Q8_0"}[others]
    assert f"20 linears {kind} (3 of them {fallback}, whose rows no block of 256" in said
    affine = Recipe(format=["gguf", "onnx"], vision_bits=8).quant_config()
    assert affine.vision_type == "" and "vision_type" not in affine.to_dict()


def test_an_artifact_of_another_type_is_damaged(tmp_path):
    config = dataclasses.replace(CONFIG, vision_bits=6, vision_type="Q6_K")
    assert _is_tower(config) and not _is_tower(dataclasses.replace(config, vision_type="Q5_K"))
    assert not _is_tower(dataclasses.replace(config, vision_type=""))


def test_the_option_takes_off(tmp_path):
    file = tmp_path / "recipe.yaml"
    for said, bits in (("off", 0), ("'off'", 0), ("null", None)):
        file.write_text(f"vision_bits: {said}\n")
        assert load_recipe(file, {}).vision_bits == bits
    file.write_text("vision_bits: 8\n")
    assert load_recipe(file, {}).vision_bits == 8
    assert load_recipe(file, {"vision_bits": "off"}).vision_bits == 0
    assert Recipe(vision_bits=4).label() == "w4g128-vlmq-vision4"


def odd_tower(folder):
    """Rows of 500 columns, as SigLIP has some of 4304."""
    shape = {"vision_config": {"intermediate_size": 500}}
    return make_tiny(folder, "llava_onevision", shape=shape)


@pytest.mark.parametrize("formats", [("onnx",), ("gguf",), ("onnx", "gguf")])
def test_short_groups_are_quantized_where_every_format_holds_them(formats, tmp_path):
    checkpoint = Checkpoint(odd_tower(tmp_path / "model"))
    recipe = Recipe(format=list(formats), vision_bits=8, bits=4, group_size=64)
    model = model_plan(checkpoint, recipe.quant_config(), "m")
    plan = plan_run(model, recipe)
    assert 500 in {x.in_features for x in model.tower} and not plan.refusals
    assert "stay float" not in " ".join(plan.formats[formats[0]].notes)


def test_short_rows_that_no_linear_beside_them_writes_stay_float(tmp_path):
    """A tower of 40 columns: zeros behind these would have to stand in every tensor of it."""
    shape = {"vision_config": {"hidden_size": 40, "intermediate_size": 500}}
    checkpoint = Checkpoint(make_tiny(tmp_path / "model", "llava_onevision", shape=shape))
    recipe = Recipe(format=["gguf", "onnx"], vision_bits=8, bits=4, group_size=64)
    model = model_plan(checkpoint, recipe.quant_config(), "m")
    inside = {x.in_features for x in model.tower if ".encoder." in x.name}
    assert inside == {500}
    for plan in plan_run(model, recipe).formats.values():
        assert "rows of 40 columns" in " ".join(plan.notes) and not plan.refusals


def test_compressed_tensors_has_no_short_groups(tmp_path):
    """Rows that groups do not fill stay float beside it, and an artifact with such is refused."""
    checkpoint = Checkpoint(odd_tower(tmp_path / "model"))

    def planned(*formats):
        recipe = Recipe(format=list(formats), vision_bits=8, bits=4, group_size=64)
        return model_plan(checkpoint, recipe.quant_config(), "m"), recipe

    model, recipe = planned("compressed-tensors", "gguf", "onnx")
    assert 500 not in {x.in_features for x in model.tower}
    for plan in plan_run(model, recipe).formats.values():
        assert "rows of 500 columns" in " ".join(plan.notes) and not plan.refusals
    model, recipe = planned("gguf")
    recipe = recipe.model_copy(update={"format": ["compressed-tensors"]})
    (said,) = plan_run(model, recipe).refusals
    assert "rows of 500 columns" in said and "quantize again" in said


def test_a_calibrated_tower_has_short_groups_in_its_artifact(tmp_path):
    config = dataclasses.replace(CONFIG, vision_short=True)
    own = Given(odd_tower(tmp_path / "model"), config)
    own.run(tmp_path / "a")
    artifact = Artifact(tmp_path / "a")
    assert artifact.config.vision_short
    found = [linear for linear in artifact.linears() if linear.in_features == 500]
    assert found
    for linear in found:
        assert linear.solution.scales.shape[1] == 16 and not linear.out_of_range()
        weight = own.checkpoint.tensor(f"{linear.name}.weight").float()
        assert float((linear.decode() - weight).norm() / weight.norm()) < 0.2
        assert artifact.records[linear.name].metrics["dead_columns"] < 12


def test_gptq_has_a_float_tower_and_refuses(tiny):
    recipe = Recipe(
        format=["gptq", "compressed-tensors", "gguf", "onnx"],
        vision_bits=8,
        bits=4,
        group_size=64,
    )
    model = model_plan(Checkpoint(tiny("internvl")), recipe.quant_config(), "m")
    (said,) = plan_run(model, recipe).refusals
    assert said.startswith("gptq: --vision-bits 8") and "leave out --format gptq" in said


def test_a_tower_is_not_rounded_twice(tiny):
    recipe = Recipe(format=["gguf"], vision_bits=8, bits=4, group_size=64, mmproj="q8_0")
    model = model_plan(Checkpoint(tiny("internvl")), recipe.quant_config(), "m")
    (refusal,) = plan_run(model, recipe).refusals
    assert "--mmproj q8_0" in refusal and "--vision-bits 8" in refusal
