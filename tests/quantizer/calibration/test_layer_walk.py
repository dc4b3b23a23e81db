"""The walk over decoder layers computes what the model itself computes."""

import dataclasses

import pytest
import torch

from tests.jobs import job_for
from tests.oracle import layer_gradients
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import bundled
from vlmq_export.quantizer.calibration import batches as batching
from vlmq_export.quantizer.calibration.batches import decoder_inputs
from vlmq_export.quantizer.calibration.collect import collect, raw_factors
from vlmq_export.quantizer.calibration.collect import importance_factors as of_raw
from vlmq_export.quantizer.calibration.importance import normalized
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.layers import decoder_layer
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer
from vlmq_export.quantizer.methods import METHODS, Method
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import DECODER, groups_of
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

CPU = torch.device("cpu")
GROUPS = groups_of(DECODER)
PROJECTIONS, MLP = ((*block.ins, block.out) for block in DECODER)


@pytest.fixture(scope="module")
def samples():
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:24]]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def folder(request, tmp_path_factory):
    if request.param == "qwen2_5_vl":
        return bundled.REFERENCE_VLM
    return make_random_checkpoint(
        tmp_path_factory.mktemp("random"), arch="qwen2_vl", layers=2, depth=3
    )


@pytest.fixture
def walk(folder):
    """(model, its decoder layers), freshly loaded."""
    checkpoint = Checkpoint(folder)
    model = load_model(checkpoint, CPU)
    family = checkpoint.architecture.family
    return model, list(model.get_submodule(family.module_name(family.layers).rstrip(".")))


def importance_factors(walk, method):
    return of_raw(walk, raw_factors(walk, method), method)


def find(batches, groups, sample):
    """(batch, row in it) of a sample. `groups` has the samples of each batch."""
    return next((b, group.index(sample)) for b, group in zip(batches, groups) if sample in group)


class Same(list):
    """A list that finds its items by identity. Comparing samples would compare their tensors."""

    def __contains__(self, item):
        return any(item is x for x in self)

    def index(self, item):
        return next(i for i, x in enumerate(self) if x is item)


def grouped(samples):
    return [Same(g) for g in batching._equal_lengths(samples)]


@torch.no_grad()
def test_layers_walked_one_by_one_are_the_model(walk, samples):
    model, layers = walk
    batches = decoder_inputs(model, samples, two_streams=True, device=CPU)
    for layer in layers:
        walk = LayerWalk(layer, DECODER, batches, two_streams=True)
        walk.pass_full()
        assert walk.advance() == 0
    for sample in samples[:6]:
        batch, row = find(batches, grouped(samples), sample)
        logits = model.lm_head(model.model.language_model.norm(batch.quantized[row]))
        expected = model(**sample.model_inputs(), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(batch.quantized, batch.full)


def test_batches_have_no_padding_and_lose_nobody(samples, monkeypatch):
    monkeypatch.setattr(batching, "BATCH_TOKENS", 90)
    groups = grouped(samples)
    assert sorted(id(s) for g in groups for s in g) == sorted(id(s) for s in samples)
    for group in groups:
        assert len({len(s.input_ids) for s in group}) == 1
        assert len(group) * len(group[0].input_ids) <= 90
    monkeypatch.setattr(batching, "BATCH_TOKENS", 1)
    assert all(len(g) == 1 for g in batching._equal_lengths(samples))


@pytest.mark.parametrize("kept", [0, 1, 100])
@torch.no_grad()
def test_inputs_are_those_of_the_linears_in_the_layers_own_forward(walk, samples, kept):
    """In both streams and every group, bit for bit. So are the layer's outputs.

    So it is where what the MLP has made of no batch, of one batch or of all is kept.
    """
    model, layers = walk
    layer = layers[1]
    batches = decoder_inputs(model, samples[:6], two_streams=True, device=CPU)
    seen, expected = {}, []
    for stage, (lead, *_) in enumerate(GROUPS):
        layer.get_submodule(lead).register_forward_pre_hook(
            lambda _m, args, s=stage: seen.setdefault(s, args[0])
        )
    for batch in batches:
        batch.full = batch.full * 1.01
        own, full = layer(batch.quantized, **batch.kwargs), None
        inputs, seen = [dict(seen)], {}
        full = layer(batch.full, **batch.kwargs)
        inputs, seen = [*inputs, dict(seen)], {}
        expected.append((inputs, own, full))
    for module in layer.modules():
        module._forward_pre_hooks.clear()
    room = kept * expected[0][0][0][3].nbytes
    steps = LayerWalk(layer, DECODER, batches, two_streams=True, room=room)
    for stage in range(4):
        for i, entering in enumerate(steps.inputs(stage)):
            assert torch.equal(entering.quantized, expected[i][0][0][stage].flatten(0, 1))
            assert torch.equal(entering.full, expected[i][0][1][stage].flatten(0, 1))
    assert len(steps._mixed) == min(kept, len(batches))
    assert steps.advance() == 0 and not steps._mixed
    for batch, (_, own, full) in zip(batches, expected):
        assert torch.equal(batch.quantized, own) and torch.equal(batch.full, full)
    assert not any(m._forward_pre_hooks for m in layer.modules())


@torch.no_grad()
def test_each_projection_runs_once_a_stream(walk, samples):
    """Except gate and up in the quantized stream, which run twice.

    Their product is too wide to be kept until down is solved.
    """
    model, layers = walk
    batches = decoder_inputs(model, samples[:4], two_streams=True, device=CPU)
    runs = {name: 0 for group in GROUPS for name in group}
    for name in runs:
        layers[0].get_submodule(name).register_forward_hook(
            lambda *_, name=name: runs.__setitem__(name, runs[name] + 1)
        )
    steps = LayerWalk(layers[0], DECODER, batches, two_streams=True)
    quantize_layer(steps, "l.", job_for(QuantConfig(method="gptaq", bits=3)))
    steps.advance()
    extra = {"mlp.gate_proj": len(batches), "mlp.up_proj": len(batches)}
    assert runs == {name: 2 * len(batches) + extra.get(name, 0) for name in runs}


def test_text_only_samples_travel_with_the_others(walk, samples):
    model, _ = walk
    text = dataclasses.replace(
        samples[0],
        input_ids=torch.arange(5, 5 + len(samples[1].input_ids)),
        pixel_values=None,
        image_grid_thw=None,
        vision=torch.zeros(len(samples[1].input_ids), dtype=torch.bool),
        answer=samples[1].answer,
    )
    (batch,) = decoder_inputs(model, [text, samples[1]], two_streams=False, device=CPU)
    for row, sample in enumerate((text, samples[1])):
        (alone,) = decoder_inputs(model, [sample], two_streams=False, device=CPU)
        torch.testing.assert_close(batch.quantized[row], alone.quantized[0], rtol=1e-5, atol=1e-5)
        positions = [b.kwargs["position_embeddings"] for b in (batch, alone)]
        for part, own in zip(*positions):
            torch.testing.assert_close(part[row], own[0])


def test_a_sample_with_nan_is_left_out_and_counted_once(walk, samples):
    model, layers = walk
    pixels = torch.full_like(samples[3].pixel_values, float("nan"))
    broken = dataclasses.replace(samples[3], pixel_values=pixels)
    chosen = [*samples[:3], broken, *samples[4:8]]
    batches = decoder_inputs(model, chosen, two_streams=True, device=CPU)
    assert sum(b.drop_non_finite() for b in batches) == 1
    assert sum(int(b.valid.sum()) for b in batches) == 7
    for layer in layers[:2]:
        config = QuantConfig(method="vlmq-paper", bits=3)
        steps = LayerWalk(layer, DECODER, batches, two_streams=True)
        for linear, metrics in quantize_layer(steps, "l.", job_for(config))[0]:
            assert bool(torch.isfinite(linear.solution.scales).all())
            assert metrics["tokens"] == sum(len(s.input_ids) for s in chosen if s is not broken)
            assert not metrics["fallback"]
        assert steps.advance() == 0


@torch.no_grad()
def test_the_quantized_stream_runs_on_what_will_be_on_disk(walk, samples):
    """A solved layer has the decoded integers as weights, and biases rounded to float16."""
    model, layers = walk
    batches = decoder_inputs(model, samples[:8], two_streams=True, device=CPU)
    before = [b.quantized for b in batches]
    source = {n: p.clone() for n, p in layers[0].named_parameters()}
    expected_full = [layers[0](b.full, **b.kwargs) for b in batches]
    steps = LayerWalk(layers[0], DECODER, batches, two_streams=True)
    solved, _ = quantize_layer(steps, "l.", job_for(QuantConfig(method="gptaq", bits=3)))
    changed = set()
    for linear, _ in solved:
        name = linear.name.removeprefix("l.")
        module = layers[0].get_submodule(name)
        assert torch.equal(module.weight, linear.decode())
        changed |= {f"{name}.weight", f"{name}.bias"}
        if module.bias is not None:
            assert torch.equal(module.bias, source[f"{name}.bias"].half().float())
    assert [q.name.removeprefix("l.") for q, _ in solved] == [n for g in GROUPS for n in g]
    for name, value in layers[0].named_parameters():
        assert name in changed or torch.equal(value, source[name])
    steps.advance()
    for batch, hidden, full in zip(batches, before, expected_full):
        assert torch.equal(batch.quantized, layers[0](hidden, **batch.kwargs))
        assert torch.equal(batch.full, full)  # that of the source weights
        assert not torch.equal(batch.quantized, batch.full)


def test_every_linear_has_factors_where_the_method_weighs_all(walk, samples):
    """The MLP's factors come from the loss of the whole layer, and are held against autograd.

    A method with `clip` cuts off the largest ones.
    """
    model, layers = walk
    batches = decoder_inputs(model, samples[:6], two_streams=True, device=CPU)
    for batch in batches:
        batch.quantized = batch.quantized * (1 + 0.05 * torch.randn(batch.quantized.shape))
    every = dataclasses.replace(METHODS["vlmq-paper"], weighs="all")
    factors = importance_factors(LayerWalk(layers[0], DECODER, batches, two_streams=True), every)
    four = importance_factors(
        LayerWalk(layers[0], DECODER, batches, two_streams=True), METHODS["vlmq-paper"]
    )
    assert list(factors) == [*PROJECTIONS, *MLP]
    brute = [layer_gradients(layers[0], b.quantized, b.full, b.kwargs) for b in batches]
    for name in MLP:
        raw = [b.tokens(g[name].abs().mean(-1)) for b, g in zip(batches, brute)]
        torch.testing.assert_close(
            torch.cat(factors[name]), torch.cat(normalized(raw)), rtol=1e-3, atol=1e-5
        )
    for name in PROJECTIONS:
        assert torch.equal(torch.cat(factors[name]), torch.cat(four[name]))
    walk_again = LayerWalk(layers[0], DECODER, batches, two_streams=True)
    cut = importance_factors(walk_again, dataclasses.replace(every, clip=1.5))
    for name, parts in cut.items():
        g, before = torch.cat(parts).square(), torch.cat(factors[name]).square()
        assert float(g.max() / g.mean()) < float(before.max() / before.mean())


def test_equal_streams_weigh_every_token_the_same(walk, samples):
    """The streams are equal in layer 0 and only there: the smallest drift gives importance."""
    model, layers = walk
    batches = decoder_inputs(model, samples[:6], two_streams=True, device=CPU)
    equal = LayerWalk(layers[0], DECODER, batches, two_streams=True)
    for factors in importance_factors(equal, METHODS["vlmq-paper"]).values():
        assert all(bool((g == 1).all()) for g in factors)
    batches[0].quantized = batches[0].quantized * 1.001
    drifted = LayerWalk(layers[0], DECODER, batches, two_streams=True)
    for factors in importance_factors(drifted, METHODS["vlmq-paper"]).values():
        assert float(torch.cat(factors).std()) > 0
        assert all(float(g.max()) == 0 for g in factors[1:])


def test_a_lost_sample_leaves_the_first_layer_its_equal_streams(walk, samples, monkeypatch):
    """NaN equals nothing, not even itself, and another kernel's attention is another by 1e-6.

    So the streams' values cannot tell that they are equal; that nothing came between them can.
    """
    model, layers = walk
    pixels = torch.full_like(samples[0].pixel_values, float("nan"))
    chosen = [samples[0], dataclasses.replace(samples[0], pixel_values=pixels)]
    (batch,) = decoder_inputs(model, chosen, two_streams=True, device=CPU)
    assert batch.drop_non_finite() == 1
    exact = LayerWalk.target

    def noisy(self, index):
        target = exact(self, index)
        return target + 1e-6 * torch.randn(target.shape)

    monkeypatch.setattr(LayerWalk, "target", noisy)
    equal = LayerWalk(layers[0], DECODER, [batch], two_streams=True)
    for (g,) in importance_factors(equal, METHODS["vlmq"]).values():
        assert torch.equal(g, torch.ones(len(samples[0].input_ids)))


@pytest.mark.parametrize("method", ["exact", "gptaq-exact", "vlmq-exact"])
def test_few_outputs_are_summed_in_place_of_the_inputs_drift(walk, samples, monkeypatch, method):
    """W·D, which is all that the exact target needs, in less than the square of many inputs."""
    model, layers = walk
    source = layers[0].state_dict()
    source = {name: value.clone() for name, value in source.items()}
    found = {}
    for short in (True, False):
        seen = []

        def spy(*args, seen=seen, **kwargs):
            seen.append([e.to_float32() for e in collect(*args, **kwargs)])
            return [dataclasses.replace(e) for e in seen[-1]]

        layers[0].load_state_dict(source)
        monkeypatch.setattr(decoder_layer, "collect", spy)
        few = (lambda _, rows, columns: rows < columns) if short else (lambda *_: False)
        monkeypatch.setattr(Method, "sums_outputs", few)
        batches = decoder_inputs(model, samples[:8], two_streams=True, device=CPU)
        steps = LayerWalk(layers[0], DECODER, batches, two_streams=True)
        quantize_layer(steps, "l.", job_for(QuantConfig(method=method, bits=2)))
        found[short] = [sums for step in seen for e in step for sums in (e.fitted, e.held) if sums]
    weights = source["mlp.down_proj.weight"]
    rows, columns = weights.shape
    assert rows < columns
    assert all((s.pull is None) != (s.drift is None) for s in found[True])
    for few, square in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(few.hessian, square.hessian)
        if len(few.hessian) == columns:  # down_proj, the only one with so many inputs
            assert few.pull.shape == weights.shape and square.pull is None
            want = square.mismatch(weights)
            assert float((few.mismatch(weights) - want).norm() / want.norm()) < 1e-4
            some = few.of_rows(3)
            assert torch.equal(some.mismatch(weights[::3]), few.mismatch(weights)[::3])


def test_outputs_are_summed_where_they_are_few():
    exact, paper = METHODS["exact"], METHODS["vlmq-paper"]
    assert exact.sums_outputs(2048, 11008) and not exact.sums_outputs(2048, 2048)
    assert not paper.sums_outputs(2048, 11008)  # GPTAQ's term needs all of D


def test_groups_see_what_the_groups_before_them_did(walk, samples, monkeypatch):
    """As with true_sequential: the input of o_proj comes from attention with quantized q, k, v."""
    model, layers = walk
    batches = decoder_inputs(model, samples[:8], two_streams=True, device=CPU)
    steps_seen = []

    def spy(*args, **kwargs):
        steps_seen.append(collect(*args, **kwargs))
        return steps_seen[-1]

    monkeypatch.setattr(decoder_layer, "collect", spy)
    steps = LayerWalk(layers[0], DECODER, batches, two_streams=True)
    quantize_layer(steps, "l.", job_for(QuantConfig(method="gptaq", bits=2)))
    seen = {names[0]: found[0].fitted for names, found in zip(GROUPS, steps_seen)}
    # At the input of the first layer the streams are still equal.
    assert float(seen["self_attn.q_proj"].drift.abs().max()) == 0
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert float(seen[name].drift.abs().max()) > 0
