"""Experts: which tokens come to each, what is summed of them, and how they are weighed."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.nn.functional import linear, silu

from tests.jobs import job_for
from tests.quantizer.model.test_families import Loaded
from vlmq_export.quantizer.calibration import routed
from vlmq_export.quantizer.calibration.answer_loss import answer_factors
from vlmq_export.quantizer.calibration.batches import _equal_lengths, decoder_inputs
from vlmq_export.quantizer.calibration.collect import raw_factors
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.calibration.routed import RoutedTokens
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer
from vlmq_export.quantizer.methods import METHODS, Method
from vlmq_export.quantizer.model.experts import separate
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.run.memory_plan import Shapes, memory_plan
from vlmq_export.quantizer.samples.sample import Length, Lengths

CPU = torch.device("cpu")
METHOD = dataclasses.replace(METHODS["gptaq"], alpha=1.0)


@pytest.fixture
def loaded(tiny):
    return Loaded(tiny("qwen3_vl_moe"))


def drifted(loaded) -> LayerWalk:
    """A walk of the first layer, whose streams differ, with the attention's steps behind it."""
    torch.manual_seed(0)
    batches = loaded.walked()
    for batch in batches:
        batch.quantized = batch.quantized * (1 + 0.1 * torch.randn(batch.quantized.shape))
    walk = LayerWalk(loaded.layers[0], loaded.blocks(0), batches, two_streams=True)
    for step in (0, 1):
        for _ in walk.inputs(step):
            pass
    return walk


@torch.no_grad()
def by_hand(layer, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What experts are given, [tokens, hidden], and which take a token, [tokens, experts]."""
    x = layer.post_attention_layernorm(stream).flatten(0, 1)
    best = linear(x, layer.mlp.gate.weight).topk(2).indices
    return x, torch.nn.functional.one_hot(best, 6).sum(1).bool()


def brute(x: torch.Tensor, full: torch.Tensor, weights: torch.Tensor) -> tuple:
    """A and D of tokens [n, in] with weights g² [n], in float64."""
    x, full, weights = x.double(), full.double(), weights.double()[:, None]
    return x.T @ (weights * x), (full - x).T @ (weights * x)


def collected(tokens: RoutedTokens, *, closing: bool, source: dict, method=METHOD, factors=None):
    block = tokens.block
    steps = {e: block.expert(e)[closing] for e in range(block.experts)}
    return tokens.collect(steps, factors or {}, method, closing=closing, source=source)


@pytest.mark.parametrize("few", [1, 40, 256])
def test_sums_are_those_of_an_experts_tokens_alone_and_of_all_where_these_are_few(
    loaded, few, monkeypatch
):
    """By hand: the router on the quantized stream, and each token's products in float64."""
    monkeypatch.setattr(RoutedTokens, "few", few)
    layer, walk = loaded.layers[0], drifted(loaded)
    tokens = RoutedTokens(walk, 1)
    stream, before = ([getattr(b, name) for b in walk.batches] for name in ("quantized", "full"))
    given = [by_hand(layer, hidden) for hidden in stream]
    x, come = (torch.cat(parts) for parts in zip(*given))
    full = torch.cat([by_hand(layer, hidden)[0] for hidden in before])
    assert tokens.counts == come.sum(0).tolist() and tokens.tokens == len(x)
    first = collected(tokens, closing=False, source={})
    source = {}
    for e, expert in enumerate(layer.mlp.experts):  # as if the first linears were solved
        source[e] = [(m.weight, m.weight.clone()) for m in (expert.gate_proj, expert.up_proj)]
        expert.gate_proj.weight.data = expert.gate_proj.weight * 1.01
    last = collected(tokens, closing=True, source=source)
    for e in range(6):
        here = come[:, e]
        weights = here.double()
        if (n := int(here.sum())) < few:
            weights[~here] = min(1.0, (few - n) / int((~here).sum()))
            assert float(weights.sum()) == pytest.approx(min(few, len(x)))
        (_, gate), (_, up) = source[e]
        inner = silu(linear(x, 1.01 * gate)) * linear(x, up)
        inner_full = silu(linear(full, gate)) * linear(full, up)
        for sums, pair in ((first[e], (x, full)), (last[e], (inner, inner_full))):
            for ours, slow in zip((sums.fitted.hessian, sums.fitted.drift), brute(*pair, weights)):
                torch.testing.assert_close(
                    ours, slow, rtol=1e-4, atol=1e-5 * float(slow.abs().max())
                )
            assert sums.fitted.tokens == (len(x) if n < few else n)
    assert {tokens.starved(e) for e in range(6)} == {few > 1} or few == 40


def test_tokens_weigh_what_the_answers_need_at_each_expert(loaded):
    """The gradients are autograd's own through the model, and each sample weighs the same."""
    streamed = StreamedModel(loaded.checkpoint, CPU)
    # Two of one length travel in one batch.
    first, second, *_ = loaded.samples
    samples = [first, second, dataclasses.replace(first, answer=first.answer.roll(-1))]
    ids = torch.cat([s.input_ids for s in samples])
    with streamed.filled_prefix(ids) as prefix:
        batches = decoder_inputs(
            prefix, samples, two_streams=False, device=CPU, added=loaded.family.added
        )
    names = [n for n in loaded.blocks(0)[1].linears if ".1." in n or ".4." in n]
    found = answer_factors(streamed, batches, [names] * 2)
    model = loaded.model
    groups = enumerate(_equal_lengths(samples))
    for place, row, sample in [(i, row, s) for i, g in groups for row, s in enumerate(g)]:
        outputs: dict[tuple[int, str], torch.Tensor] = {}

        def keep(_module, _inputs, output, key, outputs):
            outputs[key] = output.requires_grad_()

        hooks = [
            layer.get_submodule(n).register_forward_hook(partial(keep, key=(i, n), outputs=outputs))
            for i, layer in enumerate(loaded.layers)
            for n in names
        ]
        with torch.enable_grad():
            logits = model(**sample.model_inputs(), use_cache=False).logits[0]
            here = sample.answer[1:]
            loss = torch.nn.functional.cross_entropy(logits[:-1][here], sample.input_ids[1:][here])
            gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values()))))
        for hook in hooks:
            hook.remove()
        for (layer, name), gradient in gradients.items():
            g = gradient.abs().mean(-1)
            expert = loaded.layers[layer].mlp.experts[int(name.split(".")[2])]
            slow = torch.zeros(len(sample.input_ids))
            # Behind the last layer an answer's positions alone have a gradient.
            slow[expert.tokens] = g / g.square().mean().sqrt() if bool(g.any()) else g
            ours = found[layer][name][place].spread()[row]
            torch.testing.assert_close(ours, slow, rtol=2e-3, atol=2e-5)


def test_weights_of_an_expert_are_those_of_the_tokens_that_come(loaded, monkeypatch):
    """Scaled to mean(g²) = 1 over these, whatever other tokens weigh; others fill up to N."""
    walk = drifted(loaded)
    every = dataclasses.replace(METHODS["vlmq-paper"], weighs="all")
    factors = raw_factors(walk, every)
    tokens = RoutedTokens(walk, 1)
    for few in (1, 256):
        monkeypatch.setattr(RoutedTokens, "few", few)
        sums = collected(tokens, closing=False, source={}, method=every, factors=factors)
        assert len(sums) == 12  # gate and up have their own
        for e, n in enumerate(tokens.counts):
            weight = sums[2 * e].fitted.weight
            assert weight == pytest.approx(n if n >= few else min(few, tokens.tokens), rel=1e-5)


def test_the_drift_of_few_outputs_is_summed_behind_an_experts_linear(loaded, monkeypatch):
    """W·D in place of D, of the source's weights, where the plan counts it so."""
    walk = drifted(loaded)
    exact = dataclasses.replace(METHODS["vlmq-paper"], weighs="all", drift="exact")
    factors = raw_factors(walk, exact)
    tokens = RoutedTokens(walk, 1)
    found = []
    for few in (False, True):
        monkeypatch.setattr(Method, "sums_outputs", lambda *_, few=few: few)
        found.append(collected(tokens, closing=False, source={}, method=exact, factors=factors))
    names = [name for e in range(6) for name in tokens.block.expert(e)[0]]
    for name, square, few in zip(names, *found, strict=True):
        weights = loaded.layers[0].get_submodule(name).weight.detach().double()
        assert few.fitted.drift is None and square.fitted.pull is None
        wanted = weights @ square.fitted.drift
        scale = float(wanted.abs().max())
        torch.testing.assert_close(few.fitted.pull, wanted, rtol=1e-4, atol=1e-5 * scale)
        assert torch.equal(few.fitted.hessian, square.fitted.hessian)
        if few.held is not None:
            assert few.held.drift is None


def test_experts_in_portions_are_solved_to_the_same_integers(tiny, monkeypatch):
    """The full-precision stream leaves as the source makes it, and the other as it ships."""
    found = []
    for at_once in (1, 2**31):
        monkeypatch.setattr(routed, "AT_ONCE", at_once)
        loaded = Loaded(tiny("qwen3_vl_moe"))
        batches, layer = loaded.walked(), loaded.layers[0]
        before = [(b.quantized, b.kwargs, b.added[0]) for b in batches]
        walk = LayerWalk(layer, loaded.blocks(0), batches, two_streams=True)
        with torch.no_grad():
            wanted = [layer(b.full, **b.kwargs) for b in batches]
        job = job_for(QuantConfig(method="gptaq", bits=3), loaded.checkpoint.config)
        found.append(quantize_layer(walk, "l.", job)[0])
        assert walk.advance() == 0
        for batch, full, (hidden, kwargs, added) in zip(batches, wanted, before):
            with torch.no_grad():
                made = layer(hidden, **kwargs)
            for stream, plain in ((batch.full, full), (batch.quantized, made)):
                plain[batch.vision] += added
                torch.testing.assert_close(stream, plain, rtol=1e-5, atol=1e-5)
    names = [linear.name.removeprefix("l.") for linear, _ in found[0]]
    assert names == [name for block in loaded.blocks(0) for name in block.linears]
    for (one, metrics), (other, _) in zip(*found):
        assert torch.equal(one.solution.codes, other.solution.codes)
        assert torch.equal(one.decode(), other.decode())
        assert (".experts." in one.name) == ("routed" in metrics)


def test_transformers_own_experts_compute_the_same_and_share_the_memory(tiny):
    loaded = Loaded(tiny("qwen3_vl_moe"))
    model = load_model(loaded.checkpoint, CPU)
    fused = model.model.language_model.layers[1].mlp.experts.gate_up_proj
    inputs = loaded.samples[0].model_inputs()
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
        separate(model)
        logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    up = model.model.language_model.layers[1].mlp.experts[3].up_proj.weight
    assert up.data_ptr() == fused[3, 512:].data_ptr()
    name = "model.language_model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(up, loaded.checkpoint.tensor(name).float())
    fused[3, 512:] = 0
    with torch.no_grad():
        assert not torch.equal(model(**inputs, use_cache=False).logits, logits)


def test_the_sums_of_many_experts_are_planned_within_their_bound():
    """Qwen3-VL-30B-A3B: all of its experts at once would take 34 GB of sums."""
    attention = ((4096, 2048), (512, 2048), (512, 2048), (2048, 4096))
    experts = ((768, 2048), (768, 2048), (2048, 768)) * 128
    shapes = Shapes(
        layers=48,
        hidden=2048,
        heads=32,
        linears=attention + experts,
        groups=(3, 1, *(2, 1) * 128),
        prefix=600_000_000,
        pixels=6144,
        patches=4,
        tower_layers=27,
        tower_width=1152,
        weights=31_000_000_000,
        vocabulary=151_936,
        experts=128,
        taken=8,
    )
    lengths = Lengths((Length(512, 400),) * 256)
    plan = memory_plan(shapes, QuantConfig(), lengths, host_free=64 * 10**9)
    assert plan.parts["layer"] > 4 * 600_000_000  # float32, all experts of a layer
    assert routed.portion(128, 768, 2048, METHODS["vlmq"]) == 11
    assert 15 * 10**9 < plan.host < 16 * 10**9 and plan.fits
    # A factor for each token at each of its experts, and not at all of them.
    assert plan.parts["weights"] == 48 * (4 + 8 * 5) * 256 * 512 * 4
