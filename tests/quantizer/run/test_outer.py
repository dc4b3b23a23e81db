"""A quantized embedding: fitted on the run's device, and kept piece by piece for a resumed run."""

import pytest
import torch

from tests.jobs import job_for
from tests.quantizer.run.test_quantize import files
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run import outer
from vlmq_export.quantizer.run.quantize import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
EMBEDDING = "model.embed_tokens"


@pytest.fixture
def source(tmp_path):
    return make_random_checkpoint(tmp_path / "model", "qwen2_vl", layers=1, depth=1)


def config_for(source, block_type="Q4_0"):
    names = Checkpoint(source).architecture.linears
    types = dict.fromkeys([*names, EMBEDDING], block_type)
    return QuantConfig(method="rtn", gguf_type=block_type, types=types)


def run(source, folder, **options):
    options |= {"name": "m", "calibration": {}, "device": "cpu"}
    quantize(Checkpoint(source), [], config_for(source), folder, **options)


def test_what_was_fitted_is_not_fitted_again(source, tmp_path, monkeypatch):
    """A run is killed in the third piece, and then after the embedding is whole."""
    monkeypatch.setattr(outer, "ROWS", 100)
    run(source, tmp_path / "whole")
    rows = Checkpoint(source).info(f"{EMBEDDING}.weight").shape[0]
    fit, fitted, left = outer.nearest_in_blocks, [], [2]

    def killed(weights, grid):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        fitted.append(len(weights))
        return fit(weights, grid)

    monkeypatch.setattr(outer, "nearest_in_blocks", killed)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "a")
    left[0] = 1000
    run(source, tmp_path / "a", resume=True)
    assert sum(fitted) == rows
    assert files(tmp_path / "a") == files(tmp_path / "whole")
    assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / "layer-00000.safetensors").unlink()
    run(source, tmp_path / "a", resume=True)
    assert sum(fitted) == rows
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def test_it_is_fitted_on_the_device(source, tmp_path, monkeypatch):
    """No device but the CPU is here, so that a stand-in tells where it was given its rows."""
    fit, seen = outer.nearest_in_blocks, set()

    def elsewhere(weights, grid):
        seen.add(weights.device.type)
        return fit(torch.zeros(weights.shape), grid)

    monkeypatch.setattr(outer, "nearest_in_blocks", elsewhere)
    checkpoint = Checkpoint(source)
    job = job_for(config_for(source), checkpoint.config)
    (embedding,) = outer.solve_outer(checkpoint, job, tmp_path, torch.device("meta"))
    assert seen == {"meta"}
    assert embedding.solution.codes.device.type == "cpu"
