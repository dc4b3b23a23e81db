"""The rounded activations of the W4A4KV8 evaluation: the rounding, and where the model rounds."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.bench import activations
from tools.bench.scoring import load_model
from vlmq_export import bundled
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.rotation import RotatedCheckpoint
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE = bundled.REFERENCE_VLM


def loaded(checkpoint=None):
    """The reference VLM with the weights of a checkpoint, by default its own."""
    checkpoint = checkpoint or Checkpoint(SOURCE)
    names = (n for n in checkpoint.tensors if n != "lm_head.weight")  # tied to the embedding
    return load_model(SOURCE, ((n, checkpoint.tensor(n).float().numpy()) for n in names))


@pytest.fixture(scope="module")
def inputs():
    return Preprocessor(SOURCE).sample(read_rows(bundled.HELDOUT)[0]).model_inputs()


@torch.no_grad()
def hidden(model, inputs):
    return model.model(**inputs, use_cache=False).last_hidden_state


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
    # rounding the value costs half a step, and so does rounding the zero-point
    error = (got - x[0].clamp(low, high)).abs()
    assert bool((error <= step * (1 + 1e-9) + 1e-300).all())
    assert len(got.unique()) <= 2**bits
    assert torch.equal(got, activations.round_affine(x, bits, 0.95)[0])


def test_tokens_are_rounded_apart():
    x = torch.randn(6, 8)
    whole = activations.round_symmetric(x.view(2, 3, 8)).view(6, 8)
    for token, rounded in zip(x, whole):
        assert torch.equal(rounded, activations.round_symmetric(token))


def test_the_online_rotation_alone_changes_nothing(inputs, monkeypatch):
    monkeypatch.setattr(activations, "round_symmetric", lambda x: x)
    monkeypatch.setattr(activations, "round_affine", lambda x: x)
    turned = RotatedCheckpoint(SOURCE, 0, online=True)
    a, b = hidden(loaded(), inputs), hidden(activations.attach(loaded(turned), turned), inputs)
    # The rotated model gives the rotated hidden states without the weight of the last norm. That
    # weight is folded into its head.
    norm = Checkpoint(SOURCE).tensor("model.norm.weight").float()
    assert torch.allclose(turned._residual.apply(a / norm), b, atol=2e-3 * float(b.abs().max()))
    # Weights that expect the online part give something else without it.
    c = hidden(activations.attach(loaded(turned)), inputs)
    assert not torch.allclose(b, c, atol=0.1 * float(b.abs().max()))


def test_more_bits_come_closer(inputs, monkeypatch):
    exact, errors = hidden(loaded(), inputs), []
    original = activations.round_symmetric
    for bits in (4, 8):
        rounding = partial(original, bits=bits, share=1.0)
        monkeypatch.setattr(activations, "round_symmetric", rounding)
        got = hidden(activations.attach(loaded()), inputs)
        errors.append(float((got - exact).norm() / exact.norm()))
    assert 0 < errors[1] < errors[0] / 4


def test_every_linear_of_the_decoder_sees_rounded_inputs_and_the_tower_does_not(inputs):
    model = activations.attach(loaded())
    levels: dict[str, int] = {}  # linear → most values that one of its inputs has

    def watch(name: str, _module, args):
        levels[name] = max(len(row.unique()) for row in args[0].flatten(0, -2))

    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            # hooks run in the order of their registration: this one after that of `attach`
            module.register_forward_pre_hook(partial(watch, name))
    hidden(model, inputs)
    decoder = {n for n in levels if n.startswith("language_model.layers")}
    assert len(decoder) == 7 * 6 and all(levels[n] <= 16 for n in decoder)
    assert all(levels[n] > 16 for n in levels.keys() - decoder)


def test_a_cached_key_is_rounded_as_a_fresh_one():
    model = activations.attach(loaded())
    row = read_rows(bundled.HELDOUT)[0]
    prompt = Preprocessor(SOURCE).sample(row, prompt_only=True).model_inputs()
    told = {"max_new_tokens": 6, "do_sample": False}
    told |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached, fresh = (model.generate(**prompt, **told, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, fresh.sequences)
    assert np.allclose(torch.cat(cached.logits), torch.cat(fresh.logits), atol=0.2)
