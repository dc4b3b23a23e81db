"""The programs that load compressed-tensors folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.in_transformers.runtimes import (
    ALL_FAMILIES,
    DENSE,
    MARLIN_GROUPS,
    READ_FAMILIES,
    UNREAD,
    Runtime,
    one_of,
)
from vlmq_export.formats.model_plan import ModelPlan

_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_MARLIN_BITS = (4, 8)  # without zero-points, which a tower has not


@dataclass(frozen=True)
class Reader(Runtime):
    """One program, and the compressed-tensors folders that it loads."""

    # The families whose quantized tower it loads, and why not that of others, in words.
    towers: tuple[str, ...] = ALL_FAMILIES
    other_towers: str = ""

    def _refuses(self, model: ModelPlan, options: FormatOptions) -> Iterator[str]:
        yield from super()._refuses(model, options)
        config, family = model.config, model.architecture.model_type
        if config.head_bits and not self.ran:
            yield "a quantized head, which was not read (leave out --head-bits)"
        if not model.tower or family in self.unread:
            return
        if family not in self.towers:
            why = self.other_towers.format(family=family)
            yield f"a quantized vision tower: {why} (--vision-bits off)"
        elif not self.ran and config.vision_bits not in _MARLIN_BITS:
            allowed = one_of(_MARLIN_BITS)
            yield f"a vision tower of {config.vision_bits} bits (--vision-bits {allowed}, or off)"

    def _flags(self) -> Iterator[str]:
        yield from super()._flags()
        if self.ran:
            return
        yield "no `--head-bits`"
        if self.towers:
            yield f"`--vision-bits {one_of(_MARLIN_BITS)}` of {', '.join(self.towers)} alone"
        else:
            yield "no `--vision-bits`"


RUNTIMES = (
    Reader(
        "transformers + compressed-tensors",
        "run by runtime_tests/test_compressed_tensors.py and test_compressed_towers.py"
        " (transformers 5.24, compressed-tensors 0.20.1)",
        ran=True,
        families=DENSE,
        other_families="transformers 5.24 does not load its experts from integers",
    ),
    # Marlin takes 4 bits, and 8 without zero-points; Humming, which vLLM requires, takes the rest.
    Reader(
        "vLLM 0.33.0",
        "quantization/compressed_tensors/, its schemes/compressed_tensors_wNa16.py,"
        " kernels/linear/mixed_precision/ and the weight mappers in model_executor/models",
        ran=False,
        group_sizes=MARLIN_GROUPS,
        families=READ_FAMILIES,
        unread=("idefics3", "smolvlm", *UNREAD),
        towers=_QWEN,
        other_towers="its class for {family} has linears there that take floats alone",
    ),
    Reader(
        "SGLang 0.5.23",
        "srt/layers/quantization/compressed_tensors/, its schemes/compressed_tensors_wNa16.py,"
        " marlin_utils.py, and srt/models",
        ran=False,
        bits=(4, 8),
        zero_points=(4,),
        group_sizes=MARLIN_GROUPS,
        families=_QWEN,
        unread=UNREAD,
        other_families="SGLang has no class for it",
        towers=(),
        other_towers="its own code calls that untested; it skips Qwen3-VL's integers without a"
        " word, and has other names for the rest",
    ),
)


def vllm_loads(model: ModelPlan) -> bool:
    """Whether vLLM loads the folder of a model, by its code."""
    (vllm,) = (r for r in RUNTIMES if r.name.startswith("vLLM"))
    return not vllm.refuses(model, FormatOptions())


def with_towers(model_type: str) -> str:
    """The servers that load a quantized tower of a family by their code; empty if none does."""
    return " and ".join(r.name for r in RUNTIMES if not r.ran and model_type in r.towers)
