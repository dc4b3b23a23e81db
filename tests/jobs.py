"""Jobs and small runs, for tests that have no model of their own."""

from __future__ import annotations

import json
from pathlib import Path

from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import bundled
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.sample import Sample


def job_for(config: QuantConfig, source: dict | None = None) -> Job:
    """The job of `config` on a model with this config.json, or on the bundled reference VLM."""
    if source is None:
        source = json.loads((bundled.REFERENCE_VLM / "config.json").read_text("utf-8"))
    return Job.of(Architecture.of(source), config)


def tied_and_untied(folder: Path) -> dict[bool, Path]:
    """Whether the output matrix is tied → a random Qwen2-VL of two layers."""
    return {
        t: make_random_checkpoint(folder / str(t), "qwen2_vl", layers=2, depth=3, tied=t)
        for t in (True, False)
    }


def quantized(
    source: Path, samples: list[Sample], out: Path, config: QuantConfig, **options
) -> Artifact:
    """The artifact of a checkpoint in `out`, made on the CPU."""
    options |= {"name": "m", "calibration": {}, "device": "cpu"}
    quantize(Checkpoint(source), samples, config, out, **options)
    return Artifact(out)
