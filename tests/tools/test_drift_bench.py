"""The bench of hidden states: its errors, checked against transformers, and its figure."""

import pytest
import torch

from tools.bench import drift
from tools.bench.scoring import load_model, source_weights
from vlmq_export.bundled import HELDOUT, REFERENCE_VLM
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def samples():
    preprocessor = Preprocessor(REFERENCE_VLM)
    return [preprocessor.sample(row) for row in read_rows(HELDOUT)[:5]]


def test_drift_begins_at_the_layer_that_changed_and_is_that_of_transformers_hidden_states(samples):
    full = load_model(REFERENCE_VLM, source_weights(REFERENCE_VLM))
    other = load_model(REFERENCE_VLM, source_weights(REFERENCE_VLM))
    with torch.no_grad():
        other.model.language_model.layers[2].mlp.up_proj.weight.mul_(1.5)
    found = drift.drift(*(drift.layer_outputs(model, samples) for model in (full, other)))
    assert set(found) == {"image", "text"}
    assert len(found["text"]) == len(full.model.language_model.layers)
    assert found["image"][:2] == found["text"][:2] == [0, 0]
    for kind in drift.TOKENS:
        off = whole = 0.0
        for sample in samples:
            x, y = (output_of_layer_2(model, sample) for model in (full, other))
            tokens = sample.vision if kind == "image" else ~sample.vision
            off += float((y - x)[tokens].square().sum())
            whole += float(x[tokens].square().sum())
        assert found[kind][2] == pytest.approx((off / whole) ** 0.5, rel=1e-4)
        assert found[kind][2] > 1e-3


@torch.no_grad()
def output_of_layer_2(model, sample) -> torch.Tensor:
    """Entry 3 of transformers' hidden states: entry 0 is the input of the first layer."""
    out = model(**sample.model_inputs(), output_hidden_states=True)
    return out.hidden_states[3][0].double()


def test_the_figure_names_every_method_and_is_the_same_twice(tmp_path):
    found = [
        drift.Drift(name, method, "W2", 8, [0.01, 0.02], [0.03, 0.05 * i])
        for name in ("first", "second")
        for i, method in enumerate(("gptq", "auto"), 1)
    ]
    for file in (tmp_path / "a.svg", tmp_path / "b.svg"):
        drift.draw(found, file)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for word in ("gptq", "auto", "first, W2: image tokens", "second, W2: text tokens"):
        assert f">{word}</text>" in text
