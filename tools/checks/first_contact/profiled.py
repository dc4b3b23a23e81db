"""The kernels of the slowest phase, one call of it under torch's profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tools.bench import pipeline
from tools.checks.first_contact.layers import shape_of
from tools.checks.first_contact.report import Report, Setting, told

METHOD = "vlmq"  # the default
SHOWN = 8  # kernels in lines of their own
SAMPLES = 64  # as many tokens make no phase of the solver shorter
TABLE = "profile.txt"


def profiled(report: Report, at: Setting) -> None:
    """Profile one call of the phase that took longest in the default method's last layer."""
    phase = slowest(at)
    shape, samples, length = shape_of(at)
    # In the first layer both streams are one, and nothing is weighed.
    which = 1 if phase == "importance" else 0
    with _one_call(at, phase, which) as found:
        pipeline.run(shape, METHOD, which + 1, min(samples, SAMPLES), length, at.device, "device")
    if not found:
        report.tell(f"{phase} was not called", ok=False)
        return
    events = found[0].key_averages()
    key = "self_device_time_total" if at.device.type == "cuda" else "self_cpu_time_total"
    (at.out / TABLE).write_text(events.table(sort_by=key, row_limit=40, max_name_column_width=90))
    total = sum(getattr(e, key) for e in events) or 1
    launches = sum(e.count for e in events if e.key.startswith(("cudaLaunch", "cuLaunch")))
    line = f"one call of {phase}: {total / 1e6:.2f} s in kernels, {launches} launches; {TABLE}"
    report.tell(line, phase=phase, kernels=total / 1e6, launches=launches)
    for e in sorted(events, key=lambda e: -getattr(e, key))[:SHOWN]:
        share = getattr(e, key) / total
        report.tell(f"{share:6.1%}  {e.count:7} ×  {e.key[:90]}", share=share, calls=e.count)


def slowest(at: Setting) -> str:
    """The phase of the default method that took longest, or the column loop if none was timed."""
    watched = {phase for _, _, phase in pipeline.WATCHED}
    found = [facts["seconds"] for facts in told(at.out, METHOD) if "seconds" in facts]
    last = {name: each for name, each in (found or [{}])[-1].items() if name in watched}
    return max(last, key=last.__getitem__) if last else "column loop"


@contextmanager
def _one_call(at: Setting, phase: str, which: int) -> Iterator[list[profile]]:
    """Profile the call number `which` of a phase's function inside the block."""
    owner, name = next((owner, name) for owner, name, p in pipeline.WATCHED if p == phase)
    inner, found, calls = getattr(owner, name), [], []
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if at.device.type == "cuda" else []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != which + 1:
            return inner(*args, **kwargs)
        with profile(activities=kinds) as seen:
            result = inner(*args, **kwargs)
        found.append(seen)
        return result

    setattr(owner, name, watched)
    try:
        yield found
    finally:
        setattr(owner, name, inner)
