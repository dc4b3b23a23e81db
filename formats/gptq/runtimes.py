"""The programs that load GPTQ folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.layout import GPTQMODEL_LOADS
from vlmq_export.formats.in_transformers.runtimes import (
    DENSE,
    MARLIN_GROUPS,
    READ_FAMILIES,
    UNREAD,
    Runtime,
    one_of,
)
from vlmq_export.formats.model_plan import ModelPlan

# 5 to 7 bits exist only in GPTQModel's own planar layout, which nothing else reads.
BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # those that GPTQModel loads
_NAMES = ("hub", "module")


@dataclass(frozen=True)
class Reader(Runtime):
    """One program, and the GPTQ folders that it loads."""

    names: tuple[str, ...] = _NAMES  # of the tensors, as --gptq-names has them

    def _refuses(self, model: ModelPlan, options: FormatOptions) -> Iterator[str]:
        yield from super()._refuses(model, options)
        # A family without prefixes has only one kind of names.
        if options.gptq_names not in self.names and model.architecture.family.prefixes:
            yield f"{options.gptq_names} tensor names (--gptq-names {one_of(self.names)})"

    def _flags(self) -> Iterator[str]:
        yield from super()._flags()
        if self.names != _NAMES:
            yield f"`--gptq-names {one_of(self.names)}`"


_GPTQMODEL = "transformers 5.24, gptqmodel 7.7, optimum 2.3"
RUNTIMES: tuple[Reader, ...] = (
    Reader(
        "transformers + gptqmodel",
        f"run by runtime_tests/test_gptq.py ({_GPTQMODEL})",
        ran=True,
        mixed=False,
        families=DENSE,
        other_families="transformers 5.24 has the experts of a layer in one parameter, and leaves"
        " that as it was made",
    ),
    Reader(
        "GPTQModel.load",
        f"run by runtime_tests/test_gptq.py ({_GPTQMODEL})",
        ran=True,
        names=("module",),
        families=GPTQMODEL_LOADS,
        other_families="GPTQModel 7.7 has no class for it",
    ),
    Reader(
        "vLLM 0.33.0",
        "model_executor/layers/quantization/auto_gptq.py, utils/gptq_utils.py and"
        " utils/marlin_utils.py, and the weight mappers in model_executor/models",
        ran=False,
        bits=(4, 8),
        group_sizes=MARLIN_GROUPS,
        zero_points=(),
        permuted=False,
        families=READ_FAMILIES,
        unread=("idefics3", "smolvlm", *UNREAD),
    ),
    Reader(
        "SGLang 0.5.23",
        "srt/layers/quantization/gptq/gptq.py, its schemes and marlin_utils.py, and srt/models",
        ran=False,
        bits=(4, 8),
        group_sizes=MARLIN_GROUPS,
        zero_points=(),
        families=("qwen3_vl",),
        unread=UNREAD,
        other_families="SGLang has no class for it, or wants its vision tower quantized too",
    ),
)
