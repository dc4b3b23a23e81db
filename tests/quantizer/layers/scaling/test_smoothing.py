"""Scaled input channels: the function stays, the sums follow, and a stopped run ends the same."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.jobs import job_for
from tests.quantizer.run.test_quantize import files, run, write
from vlmq_export import bundled
from vlmq_export.errors import ArtifactError, Interrupted
from vlmq_export.formats.gguf.types.exact import home_of
from vlmq_export.quantizer.calibration.batches import decoder_inputs
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.choice import GridChoice
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer
from vlmq_export.quantizer.layers.scaling.smoothing import divided, divided_norm
from vlmq_export.quantizer.layers.stack import linear_of, nearest
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import DECODER
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
EIGHT = QuantConfig(method="exact", bits=8, group_size=16, symmetric=True, smooth=True)


def samples_of(folder, count):
    preprocessor = Preprocessor(folder)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:count]]


# --- norms and rows -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_norm_and_what_is_left_make_the_gain(seed, dtype):
    """For norms of every type, with and without an offset; no channel is lost in the rounding."""
    g = torch.Generator().manual_seed(seed)
    for offset in (0.0, 1.0):
        weight = (torch.randn(64, generator=g) * 0.2 + 1 - offset).to(dtype).float()
        weight[:4] = torch.tensor([0.0, -0.0, -1.0, 3e4])
        scale = torch.randn(64, generator=g).mul(3).exp2()
        scale[3] = 0.25  # 1.2e5 is more than float16 holds
        new, left = divided_norm("norm", weight, scale, lambda _, x: x.to(dtype).float(), offset)
        assert torch.equal(new, new.to(dtype).float())
        torch.testing.assert_close((new + offset) * left, weight + offset, rtol=1e-6, atol=0)
        assert bool(torch.isfinite(left).all())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q2_K", "Q8_0", "TQ2_0", "IQ3_S", ""])
def test_divided_rows_keep_their_integers_and_decode_to_their_share(kind):
    weights = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    grid = GRIDS[kind] if kind else job_for(QuantConfig(bits=3)).grid("x", 256).grid
    choice = GridChoice(grid, 256 if kind else 128, 128, "off")
    linear = linear_of("x", nearest(weights, choice), torch.arange(8.0), choice)
    scale = torch.arange(-4, 4).float().exp2()
    new = divided(linear, scale, grid)
    assert torch.equal(new.solution.codes, linear.solution.codes)
    torch.testing.assert_close(new.decode() * scale[:, None], linear.decode(), rtol=2e-3, atol=0)
    assert torch.equal(new.bias * scale, linear.bias)
    assert new.out_of_range() == ""


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_divided_portable_scales_are_portable_still(seed):
    """So that Q4_1 holds up_proj in GGUF, as the plan says."""
    g = torch.Generator().manual_seed(seed)
    config = QuantConfig(bits=4, group_size=64)
    choice = job_for(config).grid("x", 64)
    linear = linear_of("x", nearest(torch.randn(64, 64, generator=g), choice), None, choice)
    assert home_of(linear) == "Q4_1"
    scale = torch.randn(64, generator=g).mul(2).exp2()
    new = divided(linear, scale, choice.grid)
    assert home_of(new) == "Q4_1"
    torch.testing.assert_close(new.decode() * scale[:, None], linear.decode(), rtol=2**-7, atol=0)
    products = new.solution.scales.float() * new.solution.zero_points
    assert torch.equal(products, products.half().float())


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", [0, 5])
def test_divided_sums_are_those_of_divided_inputs(pull):
    g = torch.Generator().manual_seed(0)
    x, full = torch.randn(40, 16, generator=g), torch.randn(40, 16, generator=g)
    weights, behind = torch.rand(40, generator=g), torch.randn(40, pull, generator=g)
    scale, image = torch.randn(16, generator=g).exp2(), torch.rand(40, generator=g) > 0.5

    def sums(x, full):
        found = Statistics.empty(16, drift=True, modal=True, pull=pull)
        found.add(x, full, weights, image, behind if pull else None)
        return found

    ours, theirs = sums(x, full), sums(x / scale, full / scale)
    ours.divide(scale)
    for name in ("hessian", "drift", "diagonal", "modal", "pull", "moments"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("room", [0, 10**9])
@torch.no_grad()
def test_both_streams_leave_a_smoothed_layer_as_its_own_forward_passes_do(room):
    """The full-precision stream bit for bit, whether what MLPs have made is kept or made again."""
    folder = bundled.REFERENCE_VLM
    model, samples = load_model(Checkpoint(folder), CPU), samples_of(folder, 6)
    layer = model.model.language_model.layers[1]
    batches = decoder_inputs(model, samples, two_streams=True, device=CPU)
    full = [layer(b.full, **b.kwargs) for b in batches]
    entering = [b.quantized.clone() for b in batches]
    source = {n: p.clone() for n, p in layer.named_parameters()}
    walk = LayerWalk(layer, DECODER, batches, two_streams=True, room=room)
    job = job_for(QuantConfig(method="exact", bits=3, smooth=True))
    _, floats = quantize_layer(walk, "l.", job)
    walk.advance()
    for name, value in floats.items():
        assert torch.equal(layer.get_parameter(name.removeprefix("l.")), value)
        assert not torch.equal(source[name.removeprefix("l.")], value)
    assert set(floats) == {"l.input_layernorm.weight", "l.post_attention_layernorm.weight"}
    for batch, x, expected in zip(batches, entering, full):
        assert torch.equal(batch.full, expected)
        torch.testing.assert_close(batch.quantized, layer(x, **batch.kwargs), rtol=1e-5, atol=1e-5)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "gemma3", "qwen3_5", "internvl"])
def test_scales_leave_the_function_alone(arch, tiny, tmp_path):
    """With 8 bits the rounding alone is left, and less of it where the norms are the new ones."""
    folder = tiny(arch)
    samples, checkpoint = samples_of(folder, 4), Checkpoint(folder)
    artifact, model = run(folder, samples, tmp_path / "a", EIGHT), load_model(checkpoint, CPU)
    family = checkpoint.architecture.family
    new, old = {}, {}
    for index in range(checkpoint.architecture.layers):
        for block in checkpoint.architecture.blocks(index):
            for module in (block.norm, *block.kept):
                name = f"{family.layers}{index}.{module}.weight"
                new[name] = artifact.float_tensor(name).float()
                old[name] = checkpoint.tensor(name).float()
                assert not torch.equal(new[name], old[name]), name

    @torch.no_grad()
    def logits(floats):
        for name, value in floats.items():
            model.get_parameter(family.module_name(name)).copy_(value)
        return model(**samples[3].model_inputs(), use_cache=False).logits

    before = logits({})
    write(model, artifact)
    error = float((logits(new) - before).norm() / before.norm())
    wrong = float((logits(old) - before).norm() / before.norm())
    assert error < 0.02
    assert wrong > 3 * error, "the norms carry nothing, so the check above proves nothing"


def test_energies_are_those_of_the_sources_own_inputs(tiny, tmp_path):
    """They make an imatrix, which is for a file of the source's weights."""
    folder = tiny("qwen2_5_vl")
    samples = samples_of(folder, 4)
    plain, smooth = (
        run(folder, samples, tmp_path / str(t), dataclasses.replace(EIGHT, smooth=t))
        for t in (False, True)
    )
    for name in plain.records:
        own, theirs = (a.linear(name).energy for a in (smooth, plain))
        torch.testing.assert_close(own, theirs, rtol=0.05, atol=0.02 * float(theirs.mean()))


@pytest.mark.parametrize("config", [{"tune": 2}, {"method": "vlmq", "types": "Q4_0"}])
def test_stopped_and_resumed_has_the_same_bytes(config, tiny, tmp_path):
    folder = tiny("qwen2_5_vl", layers=3)
    samples = samples_of(folder, 9)
    recipe = QuantConfig(method="exact", bits=2, group_size=32, smooth=True)
    if kind := config.get("types"):
        names = job_for(recipe, Checkpoint(folder).config).linears
        config = config | {"types": dict.fromkeys(names, kind)}
    recipe = dataclasses.replace(recipe, **config)
    run(folder, samples, tmp_path / "whole", recipe)
    parts = tmp_path / "parts"
    for resume in (False, True):
        with pytest.raises(Interrupted):
            run(folder, samples, parts, recipe, resume=resume, should_stop=lambda: True)
    run(folder, samples, parts, recipe, resume=True)
    assert files(parts) == files(tmp_path / "whole")
    assert (parts / "float-changed-00000.safetensors").is_file()


def test_damaged_norms_are_named_when_a_run_goes_on(tiny, tmp_path):
    folder = tiny("qwen2_5_vl")
    samples = samples_of(folder, 4)
    with pytest.raises(Interrupted):
        run(folder, samples, tmp_path / "a", EIGHT, should_stop=lambda: True)
    (tmp_path / "a" / "float-changed-00000.safetensors").write_bytes(b"gone")
    with pytest.raises(ArtifactError, match=r"float-changed-00000\.safetensors: damaged"):
        run(folder, samples, tmp_path / "a", EIGHT, resume=True)


# --- the recipe -----------------------------------------------------------------------------------


def test_the_default_method_alone_is_smoothed_by_default():
    for kind in ({"format": ["gguf"], "gguf_type": "Q4_K_M"}, {"format": ["gptq"]}):
        recipe = Recipe(**kind)
        label = recipe.label()
        assert recipe.quant_config().smooth and "smoothed" not in label
        off = Recipe(**kind, smooth=False)
        assert not off.quant_config().smooth and off.label() == label + "-unsmoothed"
        assert not Recipe(**kind, method="gptq").quant_config().smooth
    named = Recipe(format=["onnx"], method="exact", smooth=True)
    assert named.quant_config().smooth and named.label() == "w4g128-exact-smoothed"


@pytest.mark.parametrize("method", ["rtn", "awq", "mbq"])
def test_methods_without_sums_are_not_smoothed(method):
    assert not Recipe(format=["gptq"], method=method).quant_config().smooth
    with pytest.raises(ValidationError, match=f"--smooth: --method {method}"):
        Recipe(format=["gptq"], method=method, smooth=True)
