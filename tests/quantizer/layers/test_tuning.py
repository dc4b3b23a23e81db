"""Tuning of whole layers: what is kept, which bytes it gives, and what is refused."""

import dataclasses
import re

import pytest
import torch

from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import bundled
from vlmq_export.errors import CalibrationError, Interrupted, UsageError
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.answer_loss import layer_output
from vlmq_export.quantizer.calibration.batches import decoder_inputs
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.layers import tuning
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import FAMILIES
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe_file import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = QuantConfig(method="gptaq", bits=2, group_size=64, tune=6)


def samples_of(source, count=24):
    preprocessor = Preprocessor(source)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:count]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random Qwen2-VL checkpoint of two layers."""
    folder = tmp_path_factory.mktemp("random")
    return make_random_checkpoint(folder, arch="qwen2_vl", layers=2, depth=3)


@pytest.fixture(scope="module")
def samples(small):
    return samples_of(small)


def run(source, samples, out, config=CONFIG, **options):
    told = {"rows": len(samples)}
    quantize(
        Checkpoint(source),
        samples,
        config,
        out,
        name="m",
        calibration=told,
        device="cpu",
        **options,
    )
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(small, samples, tmp_path_factory):
    """(folder, bytes) of a tuned run that was never stopped."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "a"
    return folder, run(small, samples, folder)


def test_the_same_bytes_twice_and_after_a_stop(whole, small, samples, tmp_path):
    assert run(small, samples, tmp_path / "again") == whole[1]
    with pytest.raises(Interrupted):
        run(small, samples, tmp_path / "stopped", should_stop=lambda: True)
    assert run(small, samples, tmp_path / "stopped", resume=True) == whole[1]


def test_the_manifest_records_the_steps_and_what_they_gained(whole):
    artifact = Artifact(whole[0])
    assert artifact.manifest.config["tune"] == CONFIG.tune
    gains = [record.metrics["tuned"] for record in artifact.manifest.modules]
    assert all(0 <= gain < 1 for gain in gains)


def test_what_errs_more_on_held_out_samples_is_not_kept(small, samples, tmp_path, monkeypatch):
    """Steps of thousands of codes leave nothing that is better than the solved layer."""
    monkeypatch.setattr(tuning, "CODE_RATE", 1e4)
    folder = tmp_path / "a"
    run(small, samples, folder)
    assert all(r.metrics["tuned"] == 0 for r in Artifact(folder).manifest.modules)
    monkeypatch.setattr(tuning, "CHECKS", 0)  # nothing is looked at, so that nothing is tuned
    assert run(small, samples, tmp_path / "b") == {
        file.name: file.read_bytes() for file in folder.glob("*.safetensors")
    }


def test_tuning_lowers_the_error_on_held_out_samples(tmp_path, caplog):
    """On the bundled reference, whose weights are trained, after a solve that leaves something."""
    with caplog.at_level("INFO", logger="vlmq_export"), pytest.raises(Interrupted):
        config = dataclasses.replace(CONFIG, method="gptaq-exact", tune=60, group_size=128)
        source = bundled.REFERENCE_VLM
        run(source, samples_of(source, 32), tmp_path / "a", config, should_stop=lambda: True)
    found = re.search(r"held-out samples ([\d.]+) → ([\d.]+)", caplog.text)
    assert found is not None
    assert float(found[2]) < float(found[1])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_some_samples_of_a_batch_leave_a_layer_as_in_the_whole_batch(name, tiny):
    source = tiny(name)
    checkpoint = Checkpoint(source)
    model = StreamedModel(checkpoint, torch.device("cpu"))
    sample = samples_of(source, 1)[0]
    for count in (3, 4):  # with three samples M-RoPE's first axis is as long as the second
        many = [sample] * count
        with model.filled_prefix(torch.cat([s.input_ids for s in many])) as prefix:
            (batch,) = decoder_inputs(prefix, many, two_streams=False, device=model.device)
        hidden = batch.quantized + 0.1 * torch.randn(batch.quantized.shape)
        rows = torch.tensor([2, 0])
        with torch.no_grad(), model.filled_layer(0) as layer:
            whole = layer_output(layer, hidden, batch)
            kwargs = {k: tuning.of_samples(v, rows, count) for k, v in batch.kwargs.items()}
            part = layer(hidden[rows], **kwargs)
        part = part[0] if isinstance(part, tuple) else part
        torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "gptq"}, "method gptq leaves it no target"),
        ({"method": "rtn"}, "method rtn leaves it no target"),
        ({"method": "awq"}, "method awq leaves it no target"),
        ({"method": "auto"}, "method auto leaves it no target"),
        ({"act_order": "dynamic"}, "--act-order gar"),
    ],
)
def test_refusals_of_the_run(change, said, small, samples, tmp_path):
    with pytest.raises(UsageError, match=said):
        run(small, samples, tmp_path / "a", dataclasses.replace(CONFIG, **change))
    assert not (tmp_path / "a").exists()


def test_too_few_samples_and_several_processes_are_refused(small, samples, tmp_path):
    with pytest.raises(CalibrationError, match="4 are too few; give 8 or more"):
        run(small, samples[:4], tmp_path / "a")
    with pytest.raises(UsageError, match="one process"):
        run(small, samples, tmp_path / "a", ranks=Ranks(0, 2))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"method": "gptq"}, "not of gptq"),
        ({"gguf_type": "Q4_K_M", "format": ["gguf"]}, "exclude each other"),
        ({"act_order": "dynamic"}, "neighbouring columns"),
        ({"tune": -1}, "tune"),
    ],
)
def test_refusals_of_the_recipe(flags, said):
    with pytest.raises(UsageError, match=said):
        load_recipe(None, {"format": ["gptq"], "tune": 10} | flags)
    assert load_recipe(None, {"tune": 10}).quant_config().tune == 10
