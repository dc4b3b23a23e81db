"""Layers of a 7B's shape: seconds by phase, peak memory, and what the whole model would take."""

from __future__ import annotations

import math

from tools.bench import pipeline
from tools.checks.first_contact.report import Report, Setting, told
from vlmq_export.quantizer.calibration.offload import Place

SMALL = pipeline.Shape(hidden=128, mlp=256, heads=4, kv_heads=2, layers=4)


def shape_of(at: Setting) -> tuple[pipeline.Shape, int, int]:
    """The shape, and the number of samples and of tokens in each."""
    return (SMALL, 4, 16) if at.small else (pipeline.SHAPES["7b"], 512, 512)


def layers(method: str, count: int, place: Place, report: Report, at: Setting) -> None:
    """Run the first `count` layers, and tell each as soon as it is done."""
    shape, samples, length = shape_of(at)
    pipeline.run(SMALL, method, 2, 4, 16, at.device, "device")  # kernels are compiled here
    totals = []
    for found in pipeline.run_each(shape, method, count, samples, length, at.device, place):
        totals.append(found["total"])
        parts = sorted(found["seconds"].items(), key=lambda part: -part[1])
        phases = ", ".join(f"{name} {each:.2f}" for name, each in parts)
        peak = found["peak"] / 1e9
        line = f"{method}, layer {len(totals) - 1}: {totals[-1]:.2f} s, {peak:.1f} GB; {phases}"
        report.tell(line, ok=math.isfinite(found["loss"]), method=method, place=place, **found)
    rest = totals[1:] or totals
    whole = totals[0] + (shape.layers - 1) * sum(rest) / len(rest)
    line = f"{method}, activations on the {place}: {shape.layers} layers would take {whole:.0f} s"
    report.tell(line, method=method, place=place, extrapolated=whole)
    if place == "host":
        kept = [facts["extrapolated"] for facts in told(at.out, method) if "extrapolated" in facts]
        for other in kept:
            line = f"{whole / other:.2f} times as long as with activations on the device"
            report.tell(line, ratio=whole / other)
