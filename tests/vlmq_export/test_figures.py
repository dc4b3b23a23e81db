"""What the quantizer records about token weights, and the figures of the report."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vlmq_export import bundled
from vlmq_export.quantizer.artifact.manifest import ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.calibration.token_weights import image_shape, importance_facts, levels
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.report import figures

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Told:
    """The fields of a sample that image_shape reads."""

    vision: torch.Tensor
    input_ids: torch.Tensor
    image_grid_thw: torch.Tensor | None = None
    packed: bool = False


def batch(image, valid=None) -> Batch:
    """A batch with this mask of image tokens, [samples][tokens]. `valid`: one bool a sample."""
    image = torch.tensor(image, dtype=torch.bool)
    hidden = torch.zeros(*image.shape, 2)
    valid = torch.ones(len(image), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Batch(hidden, hidden, {}, valid, image=image)


def test_facts_count_image_and_text_tokens_of_valid_samples_only():
    batches = [batch([[0, 1, 1, 0], [1, 1, 1, 0]], [False, True]), batch([[0, 0, 1]])]
    # Factors below .316 are of low importance, because their squares are below a tenth.
    factors = {"q": [torch.tensor([0.1, 2.0, 1.0, 0.2]), torch.tensor([1.0, 0.3, 0.31])]}
    facts = importance_facts(factors, batches)["q"]
    assert facts["low_vision"] == 0.5
    assert facts["low_text"] == round(2 / 3, 4)
    assert facts["vision_tokens"] == round(4 / 7, 4)
    image, text = 0.01 + 4 + 1 + 0.31**2, 0.04 + 1 + 0.09
    assert facts["vision_weight"] == round(image / (image + text), 4)
    # The image pictured is that of the first valid sample of the batch with the longest samples.
    assert bytes.fromhex(facts["image"]) == levels(torch.tensor([0.1, 2.0, 1.0]))


def test_levels_are_octaves_below_the_largest():
    assert list(levels(torch.tensor([4.0, 2.0, 1.0, 4 / 256, 0.0]))) == [255, 223, 191, 0, 0]


def test_no_facts_without_weights_or_masks():
    hidden = torch.zeros(1, 3, 2)
    assert importance_facts({}, [batch([[0, 1, 1]])]) == {}
    bare = Batch(hidden, hidden, {}, torch.ones(1, dtype=torch.bool))
    assert importance_facts({"q": [torch.ones(3)]}, [bare]) == {}


def test_the_image_pictured_is_that_of_the_longest_sample_with_one():
    text = Told(torch.zeros(30, dtype=torch.bool), torch.zeros(30))
    # LLaVA-OneVision's image: 3 · 3 tokens and a newline.
    tile = Told(torch.tensor([0] + [1] * 10 + [0]).bool(), torch.zeros(12))
    grid = Told(torch.tensor([0] + [1] * 6 + [0]).bool(), torch.zeros(8), torch.tensor([[1, 4, 6]]))
    assert image_shape([text, grid, tile, grid]) == {"pictured": [3, 3]}
    assert image_shape([text, grid]) == {"pictured": [2, 3]}
    assert image_shape([text]) == {}
    # Mistral 3: two rows of three, a token behind each, and a second image with rows of two.
    rows = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0]).bool()
    lines = Told(rows, torch.zeros(12), packed=True)
    assert image_shape([text, lines]) == {"pictured": [2, 3]}
    facts = importance_facts({"q": [torch.arange(1.0, 13)]}, [batch([rows.tolist()])])["q"]
    shown = torch.tensor([2.0, 3, 4, 6, 7, 8])
    assert bytes.fromhex(facts["image"]) == levels(shown)


def record(layer, name, **metrics) -> ModuleRecord:
    name = f"model.layers.{layer}.self_attn.{name}"
    return ModuleRecord(name, layer, 2, 128, False, 4, 256, False, metrics)


def test_a_chart_places_its_points():
    svg = figures.chart({"a": [(0, 0.0), (2, 1.0)], "b": [(1, 0.5)]}, 0, 1)
    bottom = figures.HEIGHT - figures.BOTTOM
    first, last = re.search(r'class="line0" points="(\S+) (\S+)"', svg).groups()
    assert first.split(",")[0] == f"{figures.LEFT}.0"
    assert float(first.split(",")[1]) == bottom
    assert [float(x) for x in last.split(",")] == [figures.WIDTH - 8, figures.TOP]
    middle = re.search(r'class="line1" points="(\S+)"', svg).group(1)
    assert float(middle.split(",")[1]) == (figures.TOP + bottom) / 2


def test_errors_share_one_logarithmic_scale():
    records = [
        record(i, n, relative_error=e * 10**-i, nearest_error=5 * e * 10**-i)
        for i in range(2)
        for n, e in (("q_proj", 0.2), ("o_proj", 0.02))
    ]
    charts = figures.error_charts(records)
    assert [c["title"] for c in charts] == ["q_proj", "o_proj"]
    ticks = [re.findall(r'end">([\d.e-]+)</text>', c["svg"]) for c in charts]
    assert ticks[0] == ticks[1] == ["0.001", "0.01", "0.1", "1"]


def test_maps_have_a_row_a_layer_and_the_first_layer_none():
    flat, image = levels(torch.ones(6)).hex(), levels(torch.arange(1.0, 7.0)).hex()
    records = [record(0, "q_proj", importance={"image": flat})]
    for layer in range(1, 9):
        records += [record(layer, n, importance={"image": image}) for n in ("q_proj", "k_proj")]
    rows = figures.importance_maps(records, [2, 3])
    assert [row["layer"] for row in rows] == [1, 3, 6, 8]
    assert all(list(row["pictures"]) == ["q_proj", "k_proj"] for row in rows)
    assert figures.importance_maps(records, [3, 3]) == [] == figures.importance_maps(records, None)


@pytest.mark.parametrize("bad", [float("nan"), "<script>", None, True, [1], -1.0])
def test_a_manifest_that_holds_no_numbers_draws_nothing(bad):
    told = dict.fromkeys(("low_vision", "low_text", "vision_tokens", "vision_weight", "image"), bad)
    records = [
        record(1, "q_proj", relative_error=bad, nearest_error=bad, importance=told),
        record(2, "k_proj", importance=bad),
    ]
    assert figures.error_charts(records) == [] == figures.low_importance_charts(records)
    assert figures.low_importance_ratio(records) is None
    assert figures.importance_maps(records, [bad, 1]) == []


def quantized(method, count, folder):
    """(manifest, samples) of the bundled reference VLM, at 2 bits with `count` samples."""
    source = bundled.REFERENCE_VLM
    samples = [Preprocessor(source).sample(row) for row in read_rows(bundled.CALIBRATION)[:count]]
    config, options = QuantConfig(method, 2, 128), {"name": "m", "calibration": {}, "device": "cpu"}
    quantize(Checkpoint(source), samples, config, folder, **options)
    return Artifact(folder).manifest, samples


def test_a_run_records_what_its_report_draws(tmp_path):
    manifest, samples = quantized("vlmq-paper", 12, tmp_path / "a")
    shape = manifest.calibration["pictured"]
    assert np.prod(shape) == int(max(samples, key=lambda s: len(s.input_ids)).vision.sum())
    assert len(figures.importance_maps(manifest.modules, shape)) == figures.LAYERS_PICTURED
    assert len(figures.error_charts(manifest.modules)) == 7
    assert len(figures.low_importance_charts(manifest.modules)) == 4
    ratio = figures.low_importance_ratio(manifest.modules)
    vision = sum(int(s.vision.sum()) for s in samples) / sum(len(s.input_ids) for s in samples)
    assert ratio["vision_tokens"] == pytest.approx(vision, abs=1e-3)
    assert 0 < ratio["low_vision"] < 1
    better = [m.metrics["relative_error"] < m.metrics["nearest_error"] for m in manifest.modules]
    assert sum(better) > 0.9 * len(better)
    mlp = [m for m in manifest.modules if ".mlp." in m.name]
    assert all("image" not in m.metrics.get("importance", {}) for m in mlp)


def test_the_ablation_weighs_queries_keys_and_values_alone(tmp_path):
    manifest, _ = quantized("vlmq-qkv", 6, tmp_path / "a")
    for m in manifest.modules:
        even = m.metrics["effective_tokens"] == pytest.approx(m.metrics["tokens"], rel=1e-3)
        weighed = m.layer > 0 and m.name.endswith(("q_proj", "k_proj", "v_proj"))
        assert even == (not weighed), m.name
