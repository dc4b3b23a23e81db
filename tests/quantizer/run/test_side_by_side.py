"""Two models that are streamed side by side are as far apart as the whole models are."""

import pytest
import torch

from vlmq_export import bundled
from vlmq_export.formats.proof.decoded import DecodedCheckpoint
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.run import side_by_side
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.run.side_by_side import answer_distances, steps
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row, read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "gemma3"),
    *("mistral3", "ministral3", "qwen3_vl_moe", "qwen3_5"),
)

# GGUF's block types for one linear and for the embedding, which is read by rows.
BLOCKS = {"model.embed_tokens": "Q4_0", "model.layers.0.mlp.up_proj": "Q4_1"}


def samples_of(folder, count=5):
    """Rows of several lengths, one of them without an image and one without an answer."""
    preprocessor = Preprocessor(folder)
    rows = read_rows(bundled.HELDOUT)[:count]
    text = Row("text", tuple({**m, "content": [{"type": "text", "text": "Two and two"}]}
                             for m in rows[0].messages), ())  # fmt: skip
    asked = Row("asked", rows[1].messages[:-1], rows[1].images)
    return [preprocessor.sample(row) for row in (*rows, text, asked)]


def artifact_of(folder, source, **recipe):
    config = QuantConfig("rtn", 4, -1, **recipe)
    quantize(Checkpoint(source), [], config, folder, name="m", calibration={}, device="cpu")
    weights = Weights(folder)
    return DecodedCheckpoint(weights, folder / "source"), weights


@torch.no_grad()
def whole_log_p(model, sample) -> torch.Tensor:
    """float64 log-probabilities [answer tokens, vocabulary], by one pass of a whole model."""
    logits = model(**sample.model_inputs(), use_cache=False).logits[0].double()
    return logits[:-1][sample.answer[1:]].log_softmax(-1)


@pytest.mark.parametrize(
    ("arch", "recipe"),
    [
        *((arch, {}) for arch in FAMILIES),
        ("qwen2_5_vl", {"head_bits": 4}),
        ("qwen2_5_vl", {"rotate": "folded"}),
        ("qwen2_5_vl", {"types": BLOCKS}),
    ],
)
def test_streamed_equals_whole(arch, recipe, tiny, tmp_path, monkeypatch):
    """In slabs that do not divide the vocabulary, for every family, head and rotation."""
    from tools.bench.scoring import load_model as whole_model

    monkeypatch.setattr(side_by_side, "SLAB", 37)
    monkeypatch.setattr(side_by_side, "TOKENS", 5)
    source = tiny(arch)
    decoded, weights = artifact_of(tmp_path / "artifact", source, **recipe)
    full, samples = Checkpoint(source), samples_of(source)
    told = []
    found = answer_distances(
        StreamedModel(full, CPU),
        StreamedModel(decoded, CPU),
        samples,
        step=lambda: told.append(1),
    )
    assert len(told) == steps(full.architecture.layers)
    whole = load_model(full, CPU), whole_model(decoded.path, weights.items())
    for sample, distance in zip(samples, found):
        p, q = (whole_log_p(model, sample) for model in whole)
        kl = (p.exp() * (p - q)).sum(-1)
        assert len(kl) == int(sample.answer.sum()) == len(distance.kl)
        assert torch.allclose(distance.kl, kl, rtol=1e-3, atol=1e-7), sample.id
        assert torch.equal(distance.same, p.argmax(-1) == q.argmax(-1)), sample.id
    assert len(found[-1].kl) == 0 and len(found[-2].kl) > 0  # no answer; no image
    assert max(float(d.kl.max()) for d in found[:-1]) > 1e-6


def test_a_model_is_no_distance_from_itself_and_one_changed_weight_is_seen(tiny):
    checkpoint, samples = Checkpoint(tiny("qwen2_5_vl")), samples_of(tiny("qwen2_5_vl"))
    same = answer_distances(*(StreamedModel(checkpoint, CPU) for _ in range(2)), samples)
    assert all(float(d.kl.abs().sum()) == 0 and bool(d.same.all()) for d in same)

    class Damaged(Checkpoint):
        def tensor(self, name, rows=None):
            value = super().tensor(name, rows)
            if name.endswith("layers.1.mlp.down_proj.weight"):
                value[0] += 1
            return value

    damaged = Damaged(checkpoint.path)
    models = StreamedModel(checkpoint, CPU), StreamedModel(damaged, CPU)
    moved = answer_distances(*models, samples)
    assert all(float(d.kl.max()) > 1e-6 for d in moved if len(d.kl))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_where_activations_rest_changes_no_bit(place, tiny, tmp_path):
    source = tiny("qwen3_vl")
    decoded, _ = artifact_of(tmp_path / "artifact", source)
    models = StreamedModel(Checkpoint(source), CPU), StreamedModel(decoded, CPU)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    samples = samples_of(source)
    kept = answer_distances(*models, samples)
    away = answer_distances(*models, samples, Shelf(CPU, place, scratch))
    assert all(torch.equal(a.kl, b.kl) for a, b in zip(kept, away))
    assert not list(scratch.iterdir())


def test_samples_without_any_answer_have_distances_of_no_tokens(tiny):
    checkpoint = Checkpoint(tiny("qwen2_5_vl"))
    found = answer_distances(
        *(StreamedModel(checkpoint, CPU) for _ in range(2)), samples_of(checkpoint.path)[-1:]
    )
    assert [len(d.kl) for d in found] == [0]
