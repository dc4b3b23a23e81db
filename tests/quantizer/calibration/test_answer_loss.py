"""The gradients of the answers' loss, layer by layer, against autograd over the whole model."""

import statistics

import pytest
import torch

from tests.quantizer.run.test_quantize import small  # noqa: F401 (a fixture)
from vlmq_export import bundled
from vlmq_export.quantizer.calibration import answer_loss
from vlmq_export.quantizer.calibration.answer_loss import (
    answer_factors,
    answer_gradients,
    modality_ratios,
)
from vlmq_export.quantizer.calibration.batches import decoder_inputs
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import DECODER
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
PROJECTIONS, MLP = ([*block.ins, block.out] for block in DECODER)


def slow_gradients(model, sample, name) -> list[torch.Tensor]:
    """∂L/∂Z of a module in every layer that has it, [tokens, out] each, by plain autograd."""
    seen = []

    def keep(_module, _inputs, output):
        if not output.requires_grad:
            output.requires_grad_()
        output.retain_grad()
        seen.append(output)

    layers = model.model.language_model.layers
    found = [dict(layer.named_modules()).get(name) for layer in layers]
    handles = [module.register_forward_hook(keep) for module in found if module]
    labels = sample.input_ids.masked_fill(~sample.answer, -100)[None]
    logits = model(**sample.model_inputs(), use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    for handle in handles:
        handle.remove()
    return [out.grad[0] for out in seen]


def slow_ratios(model, samples, name) -> list[float]:
    """MBQ's ratio of image and answer tokens at a module of every layer."""
    each = []
    grads = [(slow_gradients(model, s, name), s) for s in samples]
    for layer in range(len(grads[0][0])):
        shown = [(g[layer], s) for g, s in grads if bool(s.vision.any())]
        image = [float(g[s.vision].abs().mean()) for g, s in shown]
        answer = [float(g[layer][s.answer].abs().mean()) for g, s in grads]
        each.append(statistics.fmean(image) / statistics.fmean(answer))
    return [max(r, statistics.median(each)) for r in each]


def begun(checkpoint: Checkpoint, samples):
    """(layers, the model without weights, the batches at its first layer)."""
    family, streamed = checkpoint.architecture.family, StreamedModel(checkpoint, CPU)
    ids = torch.cat([s.input_ids for s in samples])
    with streamed.filled_prefix(ids) as prefix:
        batches = decoder_inputs(prefix, samples, two_streams=False, device=CPU, added=family.added)
    return checkpoint.architecture.layers, streamed, batches


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen3_vl", "gemma3", "qwen3_5"])
def test_gradients_equal_autograd_over_the_whole_model(arch, tiny, small):  # noqa: F811
    """Layer by layer from inputs that were put aside, the gradients are the same.

    So they are where the model adds features between layers (qwen3_vl), and where layers have
    other modules (qwen3_5).
    """
    folder = small if arch == "qwen2_vl" else tiny(arch, tied=True)
    checkpoint, preprocessor = Checkpoint(folder), Preprocessor(folder)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:3]]
    count, streamed, batches = begun(checkpoint, samples)
    found: dict[tuple[int, str], list[torch.Tensor]] = {}

    def keep(layer: int, name: str, _batch, gradient: torch.Tensor, _tokens) -> None:
        found.setdefault((layer, name), []).extend(gradient.unbind())

    outs = [[b.out for b in checkpoint.architecture.blocks(i)] for i in range(count)]
    answer_gradients(streamed, batches, outs, keep)
    ratios = modality_ratios(streamed, batches, outs)
    model = load_model(checkpoint, CPU)
    ordered = sorted(samples, key=lambda s: len(s.input_ids))
    for name in {name for own in outs for name in own}:
        slow = [slow_gradients(model, s, name) for s in ordered]
        where = [layer for layer, own in enumerate(outs) if name in own]
        for place, layer in enumerate(where):
            for ours, gradients in zip(found[layer, name], slow):
                expected = gradients[place]
                tolerance = 1e-5 * float(expected.abs().max())
                torch.testing.assert_close(ours, expected, rtol=2e-3, atol=tolerance)
        assert [ratios[layer][name] for layer in where] == pytest.approx(
            slow_ratios(model, ordered, name), rel=1e-3
        )


def test_factors_are_the_mean_gradients_and_every_sample_weighs_the_same(small):  # noqa: F811
    checkpoint, preprocessor = Checkpoint(small), Preprocessor(small)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:3]]
    count, streamed, batches = begun(checkpoint, samples)
    factors = answer_factors(streamed, batches, [PROJECTIONS + MLP] * count)
    assert [list(each) for each in factors] == [[*PROJECTIONS, *MLP]] * count
    model = load_model(checkpoint, CPU)
    ordered = sorted(samples, key=lambda s: len(s.input_ids))
    for name in PROJECTIONS + MLP:
        slow = [slow_gradients(model, s, name) for s in ordered]
        for layer in range(count):
            ours = [g for part in factors[layer][name] for g in part.unbind()]
            for g, gradients in zip(ours, slow, strict=True):
                expected = gradients[layer].abs().mean(-1)
                expected = expected / expected.square().mean().sqrt()
                torch.testing.assert_close(g, expected, rtol=5e-3, atol=1e-4)


def test_parts_of_the_samples_and_of_the_positions_give_the_same(small, monkeypatch):  # noqa: F811
    checkpoint, preprocessor = Checkpoint(small), Preprocessor(small)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:6]]
    count, streamed, batches = begun(checkpoint, samples)
    assert len(batches) > 2
    at_once = answer_factors(streamed, batches, [MLP] * count)
    monkeypatch.setattr(answer_loss, "KEPT", 1)
    monkeypatch.setattr(answer_loss, "AT_ONCE", 2)
    assert [len(part) for part in answer_loss._parts(batches, 1)] == [1] * len(batches)
    for whole, part in zip(at_once, answer_factors(streamed, batches, [MLP] * count)):
        for name in MLP:
            for a, b in zip(whole[name], part[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_sample_without_an_answer_weighs_nothing(small):  # noqa: F811
    checkpoint, preprocessor = Checkpoint(small), Preprocessor(small)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:2]]
    samples[0].answer.fill_(False)
    count, streamed, batches = begun(checkpoint, samples)
    sums = [
        float(g.square().mean())
        for parts in answer_factors(streamed, batches, [MLP] * count)[0].values()
        for part in parts
        for g in part.unbind()
    ]
    assert sorted(sums) == pytest.approx([0.0] * 3 + [1.0] * 3, abs=1e-4)
