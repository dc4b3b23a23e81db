"""Imports what every child process of tests/faults/harness.py needs, once in the fork server."""

import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in (
    "torch",
    "transformers",
    "gguf",
    "vlmq_export.cli",
    "vlmq_export.terminal.tables",
    "vlmq_export.pipeline",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "tests.faults.harness",
):
    importlib.import_module(name)
