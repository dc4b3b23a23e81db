"""`tools/checks/gpu.py`, as much of it as fits into ninety seconds."""

from __future__ import annotations

from tools.checks import gpu
from tools.checks.first_contact.report import Report, Setting

SAMPLES = 64


def check(report: Report, at: Setting) -> None:
    """Kernel, solver, layers from equal streams, and a whole run: each verdict as it comes."""
    if at.small:
        extent = gpu.Extent(methods=("vlmq-paper",), layers=1, runs=("gptq",))
        samples = gpu.read_samples(4)
    else:
        extent = gpu.Extent(methods=("vlmq-paper", "vlmq", "gptaq"), layers=3, runs=("gptq",))
        samples = gpu.read_samples(SAMPLES)
    for ok, line in gpu.checks(samples, at.device, extent):
        report.tell(line, ok=ok)
