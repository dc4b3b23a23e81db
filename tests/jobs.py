"""The job of a recipe, for tests that have no model of their own."""

from __future__ import annotations

import json

from vlmq_export import bundled
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.architecture import Architecture


def job_for(config: QuantConfig, source: dict | None = None) -> Job:
    """The job of `config` on a model with this config.json, or on the bundled reference VLM."""
    if source is None:
        source = json.loads((bundled.REFERENCE_VLM / "config.json").read_text("utf-8"))
    return Job.of(Architecture.of(source), config)
