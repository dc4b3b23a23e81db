"""Rounded activations of the W4A4KV8 evaluation: the rounding itself, and where in the model it sits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.bench import activations
from tools.bench.scoring import load_model
from vlmq_export import bundled
from vlmq_export.quantizer.calibration import Preprocessor, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.rotation import RotatedCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE = bundled.REFERENCE_VLM


def loaded(checkpoint=None):
    checkpoint = checkpoint or Checkpoint(SOURCE)
    return load_model(
        SOURCE, ((n, checkpoint.tensor(n).float().numpy()) for n in checkpoint.tensors if n != "lm_head.weight")
    )


@pytest.fixture(scope="module")
def inputs():
    return Preprocessor(SOURCE).sample(read_rows(bundled.HELDOUT)[0]).model_inputs()


@torch.no_grad()
def logits(model, inputs, **more):
    return model.model(**inputs, use_cache=False, **more).last_hidden_state


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12), st.integers(2, 8))
def test_symmetric_rounding_number_by_number(row, bits):
    x = torch.tensor([row], dtype=torch.float64)
    got = activations.round_symmetric(x, bits, 0.9)[0].tolist()
    top = 2 ** (bits - 1) - 1
    scale = 0.9 * max(map(abs, row)) / top
    for value, rounded in zip(row, got):
        want = 0.0 if scale < 1e-300 else min(max(round(value / scale), -top - 1), top) * scale
        assert rounded == pytest.approx(want, rel=1e-12, abs=1e-300)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12), st.integers(2, 8))
def test_affine_rounding_is_within_half_a_step_of_its_range(row, bits):
    x = torch.tensor([row], dtype=torch.float64)
    got = activations.round_affine(x, bits, 0.95)[0]
    low, high = 0.95 * min(*row, 0.0, 0.0), 0.95 * max(*row, 0.0, 0.0)
    step = (high - low) / (2**bits - 1)
    assert bool(
        ((got - x[0].clamp(low, high)).abs() <= step * (1 + 1e-9) + 1e-300).all()
    )  # half for it, half for the zero
    assert len(got.unique()) <= 2**bits and torch.equal(got, activations.round_affine(x, bits, 0.95)[0])


def test_tokens_are_rounded_apart():
    x = torch.randn(2, 3, 8)
    whole = activations.round_symmetric(x)
    assert all(torch.equal(whole[i, j], activations.round_symmetric(x[i, j])) for i in range(2) for j in range(3))


def test_the_online_rotation_alone_changes_nothing(inputs, monkeypatch):
    monkeypatch.setattr(activations, "round_symmetric", lambda x: x)
    monkeypatch.setattr(activations, "round_affine", lambda x: x)
    turned = RotatedCheckpoint(SOURCE, 0, online=True)
    a, b = logits(loaded(), inputs), logits(activations.attach(loaded(turned), turned), inputs)
    norm = Checkpoint(SOURCE).tensor("model.norm.weight").float()  # folded into the head: the hidden states are rotated
    assert torch.allclose(turned._residual.apply(a / norm), b, atol=2e-3 * float(b.abs().max()))
    c = logits(activations.attach(loaded(turned)), inputs)  # weights that expect the online part, and no online part
    assert not torch.allclose(b, c, atol=0.1 * float(b.abs().max()))


def test_more_bits_come_closer(inputs, monkeypatch):
    exact, errors = logits(loaded(), inputs), []
    for bits in (4, 8):
        original = activations.round_symmetric
        monkeypatch.setattr(activations, "round_symmetric", lambda x, b=bits, f=original: f(x, b, 1.0))
        errors.append(float((logits(activations.attach(loaded()), inputs) - exact).norm() / exact.norm()))
        monkeypatch.undo()
    assert 0 < errors[1] < errors[0] / 4


def test_every_linear_of_the_decoder_sees_rounded_inputs_and_the_tower_does_not(inputs):
    model = activations.attach(loaded())
    levels: dict[str, int] = {}

    def watch(name):
        return lambda _m, args: levels.__setitem__(name, max(len(row.unique()) for row in args[0].flatten(0, -2)))

    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))  # after attach's own
    logits(model, inputs)
    decoder = {n for n in levels if n.startswith("language_model.layers")}
    assert len(decoder) == 7 * 6 and all(levels[n] <= 16 for n in decoder)
    assert all(levels[n] > 16 for n in levels.keys() - decoder)


def test_a_cached_key_is_rounded_as_a_fresh_one():
    model = activations.attach(loaded())
    prompt = Preprocessor(SOURCE).sample(read_rows(bundled.HELDOUT)[0], prompt_only=True).model_inputs()
    told = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached, fresh = (model.generate(**prompt, **told, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, fresh.sequences)
    assert np.allclose(torch.cat(cached.logits), torch.cat(fresh.logits), atol=0.2)
