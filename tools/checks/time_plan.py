"""The plan of time beside real runs, in CPU seconds of one thread.

    OMP_NUM_THREADS=1 python -m tools.checks.time_plan            # the bundled reference
    OMP_NUM_THREADS=1 python -m tools.checks.time_plan --wide     # two layers as wide as a 3B's
    OMP_NUM_THREADS=1 python -m tools.checks.time_plan --experts  # three layers of experts
    OMP_NUM_THREADS=1 python -m tools.checks.time_plan --phases   # and every phase of the plan

The machine is measured before a run and after it, and the plan is the mean of both, because other
programs change what a second is worth. The exit code is 1 where a plan is off by more than 1.5.
`--device cuda` measures and runs on a GPU, in wall time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tools.reference_vlm.random_checkpoint import make
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export import Recipe
from vlmq_export.formats.contract import FORMATS
from vlmq_export.planning.run_plan import fitted_types
from vlmq_export.planning.run_time import Reading, phases_of
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.run.machine import Clock, Machine, measured
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.loading import read_samples
from vlmq_export.sources.calibration import CalibrationRows, limit_of
from vlmq_export.sources.float_model import FloatModel
from vlmq_export.sources.locate import open_source

FACTOR = 1.5
Cases = tuple[dict[str, Any], ...]
REFERENCE: Cases = (
    {"format": ["gptq"]},
    {"format": ["gguf"]},
    *({"format": ["gptq"], "method": name} for name in ("vlmq-paper", "gptq", "exact")),
)
WIDE: Cases = (
    {"format": ["gptq"], "samples": 16},
    {"format": ["gguf"], "samples": 16},
)
EXPERTS: Cases = (
    {"format": ["gptq"], "samples": 64},
    {"format": ["gguf"], "samples": 64},
    {"format": ["gptq"], "samples": 64, "method": "gptq"},
)
# Half as wide as Qwen3-VL-30B-A3B, and with an eighth of its experts.
HALF = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 384,
    "num_attention_heads": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 2,
}


def compared(recipe: Recipe, device: torch.device, clock: Clock) -> Iterator[tuple]:
    """(part, planned seconds, seconds) of one run, with the plan's phases last."""
    source = open_source(recipe.model)
    assert isinstance(source, FloatModel)
    data = CalibrationRows(recipe)
    recipe = source.recipe_for(recipe, data)
    plan = source.foreseen(source.plan(recipe), recipe, data)
    limit = limit_of(recipe, source.checkpoint)
    reading = Reading(source.preprocessor, data.taken, limit, workers=1, clock=clock)

    def planned() -> tuple[Machine, dict[str, float]]:
        machine = measured(device, fitted_types(plan.model), clock)
        return machine, phases_of(plan, reading, machine)

    _, before = planned()
    marks = [clock()]
    loaded = read_samples(source.path, data.taken, limit, workers=1, progress=lambda _: None)
    marks.append(clock())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artifact"
        quantize(
            source.checkpoint,
            loaded.samples,
            plan.model.config,
            folder,
            name="model",
            calibration={},
            device=device.type,
            room=plan.memory.room if plan.memory else 0,
            drop_images=True,
        )
        marks.append(clock())
        for name in recipe.format:
            options = recipe.format_options("model")
            (made := Path(scratch) / name).mkdir()
            FORMATS[name].write(Artifact(folder), made, options)
        marks.append(clock())
    _, after = planned()
    mean = {phase: (before[phase] + after[phase]) / 2 for phase in before}
    read, write = mean.pop("read samples"), mean.pop("write")
    own = [b - a for a, b in pairwise(marks)]
    yield from zip(("read", "quantize", "write"), (read, sum(mean.values()), write), own)
    yield "all", read + sum(mean.values()) + write, sum(own)
    for phase, seconds in mean.items():
        yield phase, seconds, None


def main() -> int:
    """Print the plan and the run of every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wide", action="store_true", help="two layers of Qwen2.5-VL-3B's widths")
    parser.add_argument("--experts", action="store_true", help="three layers of 16 experts")
    parser.add_argument("--phases", action="store_true", help="print the plan's phases")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    off = Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        folder, model, cases = Path(scratch) / "model", None, REFERENCE
        if args.wide:
            model, cases = make(folder, layers=2), WIDE
        elif args.experts:
            shape = {"text_config": HALF, "vision_config": {"out_hidden_size": 1024}}
            model, cases = make_tiny(folder, "qwen3_vl_moe", layers=3, shape=shape), EXPERTS
        for case in cases:
            print(" ".join(f"{key}={value}" for key, value in case.items()))
            recipe = Recipe(model=model and str(model), **case)
            for part, planned, taken in compared(recipe, device, clock):
                if taken is not None:
                    ratio = planned / max(taken, 1e-9)
                    print(f"  {part:14}{planned:8.2f} planned{taken:8.2f} taken{ratio:6.2f}")
                    off["all"] += part == "all" and not 1 / FACTOR < ratio < FACTOR
                elif args.phases:
                    print(f"    {part:12}{planned:8.2f}")
            sys.stdout.flush()
    return int(off["all"] > 0)


if __name__ == "__main__":
    sys.exit(main())
