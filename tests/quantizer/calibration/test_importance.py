"""Importance factors of a real decoder layer, against autograd over the whole attention block."""

import pytest
import torch
import transformers

from tests.oracle import block_gradients, layer_gradients
from vlmq_export.quantizer.calibration.importance import (
    clipped,
    normalized,
    output_gradients,
    token_factors,
)
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.calibration.sub_blocks import passed
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.model.families import ATTENTION, MLP
from vlmq_export.quantizer.solver.column_loop import solve
from vlmq_export.quantizer.solver.hessian import column_term, prepare

PROJECTIONS = [*ATTENTION.ins, ATTENTION.out]


def gradients_of(layer, hidden, full, kwargs):
    """P of each projection, for X = hidden and X̃ = full."""
    with torch.no_grad():
        target = passed(layer, ATTENTION, full, kwargs)
    return output_gradients(layer, ATTENTION, hidden, target, kwargs)[0]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def decoder(request):
    """(layer, X, X̃, keyword arguments of its forward pass) for 3 samples of 9 tokens.

    The layer is random and has grouped-query attention.
    """
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as m25
    from transformers.models.qwen2_vl import modeling_qwen2_vl as m2

    torch.manual_seed(0)
    name, module = ("Qwen2VL", m2) if request.param == "qwen2_vl" else ("Qwen2_5_VL", m25)
    config = getattr(transformers, f"{name}TextConfig")(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_window_layers=1,
        vocab_size=8,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    )
    config._attn_implementation = "sdpa"
    layer = getattr(module, f"{name}DecoderLayer")(config, 0).eval().requires_grad_(False)
    rotary = getattr(module, f"{name}RotaryEmbedding")(config)
    positions = torch.arange(9).view(1, 1, 9).expand(3, 3, 9)
    hidden = torch.randn(3, 9, 32)
    kwargs = {
        "attention_mask": None,
        "position_ids": None,
        "position_embeddings": rotary(hidden, positions),
    }
    return layer, hidden, hidden + 0.1 * torch.randn(3, 9, 32), kwargs


def test_equals_autograd_over_the_whole_block(decoder):
    layer, hidden, full, kwargs = decoder
    ours = gradients_of(layer, hidden, full, kwargs)
    brute = block_gradients(layer, ATTENTION, hidden, full, kwargs)
    assert list(ours) == PROJECTIONS
    for name in PROJECTIONS:
        assert ours[name].shape == brute[name].shape
        assert float(ours[name].abs().max()) > 0
        torch.testing.assert_close(ours[name], brute[name], rtol=1e-4, atol=1e-6)


def test_of_the_mlp_equals_autograd_over_the_whole_layer(decoder):
    layer, hidden, full, kwargs = decoder
    with torch.no_grad():
        between, target = (passed(layer, ATTENTION, x, kwargs) for x in (hidden, full))
        target = passed(layer, MLP, target, kwargs)
    ours, after = output_gradients(layer, MLP, between, target, kwargs)
    torch.testing.assert_close(after, layer(hidden, **kwargs))
    brute = layer_gradients(layer, hidden, full, kwargs)
    assert list(ours) == [*MLP.ins, MLP.out]
    for name in ours:
        assert ours[name].shape == brute[name].shape
        assert float(ours[name].abs().max()) > 0
        torch.testing.assert_close(ours[name], brute[name], rtol=1e-4, atol=1e-6)
    assert not any(m._forward_hooks for m in layer.modules())


def test_block_is_the_layer_without_its_mlp(decoder):
    layer, hidden, _, kwargs = decoder
    seen = []
    handle = layer.post_attention_layernorm.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    with torch.no_grad():
        layer(hidden, **kwargs)
    handle.remove()
    torch.testing.assert_close(passed(layer, ATTENTION, hidden, kwargs), seen[0])


def test_samples_do_not_weigh_on_each_other(decoder):
    """The loss is a sum over samples: in a batch of three each sample has its own gradients."""
    layer, hidden, full, kwargs = decoder
    together = gradients_of(layer, hidden, full, kwargs)
    cos, sin = kwargs["position_embeddings"]
    for i in range(3):
        own = kwargs | {"position_embeddings": (cos[i : i + 1], sin[i : i + 1])}
        alone = gradients_of(layer, hidden[i : i + 1], full[i : i + 1], own)
        for name in PROJECTIONS:
            torch.testing.assert_close(together[name][i : i + 1], alone[name], rtol=1e-4, atol=1e-6)


def test_a_broken_sample_stays_alone(decoder):
    layer, hidden, full, kwargs = decoder
    broken = hidden.clone()
    broken[1, 2, 3] = float("nan")
    clean = gradients_of(layer, hidden, full, kwargs)
    ours = gradients_of(layer, broken, full, kwargs)
    for name in PROJECTIONS:
        torch.testing.assert_close(ours[name][[0, 2]], clean[name][[0, 2]])


def test_equal_streams_have_no_gradient_and_fall_back_to_ones(decoder):
    layer, hidden, _, kwargs = decoder
    gradients = gradients_of(layer, hidden, hidden, kwargs)
    for name in PROJECTIONS:
        assert float(gradients[name].abs().max()) == 0
        (g,) = normalized([token_factors(gradients[name], "l1")])
        assert torch.equal(g, torch.ones(3, 9))


def test_the_layer_is_left_as_it_was(decoder):
    layer, hidden, full, kwargs = decoder
    before = layer(hidden, **kwargs)
    gradients_of(layer, hidden, full, kwargs)
    assert not any(m._forward_hooks for m in layer.modules())
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())
    assert torch.equal(layer(hidden, **kwargs), before)


def test_norms():
    gradient = torch.tensor([[3.0, -4.0], [0.0, 0.0], [-1.0, 1.0]])
    assert token_factors(gradient, "l1").tolist() == [3.5, 0.0, 1.0]
    torch.testing.assert_close(token_factors(gradient, "l2"), torch.tensor([5.0, 0.0, 2.0**0.5]))


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_normalized_to_mean_square_one(scale):
    parts = [torch.rand(n, generator=torch.Generator().manual_seed(n)) * scale for n in (5, 1, 30)]
    out = torch.cat(normalized(parts))
    assert float(out.double().square().mean()) == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(out / out.max(), torch.cat(parts) / torch.cat(parts).max())


def test_clipped_where_the_square_is_far_above_its_mean():
    g = torch.cat(normalized([torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 20]))
    cut = torch.cat(clipped(g.split([300, 700]), 4.0))
    low = g.square() <= 4
    assert 10 < int((~low).sum()) < 500
    assert float(cut.double().square().mean()) == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(cut[low] / cut[low][0], g[low] / g[low][0])
    torch.testing.assert_close(cut[~low] / cut[low][0], torch.full_like(cut[~low], 2.0) / g[low][0])


def test_normalized_without_tokens_and_without_gradient():
    assert normalized([]) == []
    assert torch.equal(normalized([torch.zeros(3), torch.zeros(2)])[1], torch.ones(2))
    # Only factors that are exactly 0 count as no gradient, not factors that are small.
    (tiny,) = normalized([torch.tensor([0.0, 1e-30])])
    assert tiny[0] == 0
    assert tiny[1] > 1


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**9, 3.7])
def test_scale_of_the_factors_moves_no_integer(scale):
    """The scale of the factors is normalized away.

    A power of two gives the same bits, any other scale the same codes except where ties fall
    another way.
    """
    g = torch.Generator().manual_seed(2)
    x, full = torch.randn(200, 32, generator=g), torch.randn(200, 32, generator=g)
    weights, factors = torch.randn(16, 32, generator=g), torch.rand(200, generator=g)

    def codes(raw):
        sums = Statistics.empty(32, drift=True)
        sums.add(x, full, normalized([raw])[0])
        sums = sums.to_float32()
        hessian = prepare(sums.hessian, sums.diagonal, group=16, act_order="dynamic", damp=0.01)
        columns = column_term(hessian, sums.drift, 0.25)
        return solve(
            weights,
            hessian,
            Affine(3),
            group=16,
            act_order="dynamic",
            block=16,
            column_term=columns,
        ).codes

    same = (codes(factors) == codes(factors * scale)).float().mean()
    assert float(same) == 1.0 if scale != 3.7 else float(same) >= 0.999
