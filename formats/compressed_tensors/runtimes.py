"""The programs that load compressed-tensors folders."""

from __future__ import annotations

from collections.abc import Iterator

from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.in_transformers.runtimes import MARLIN_GROUPS, READ_FAMILIES, Runtime
from vlmq_export.formats.model_plan import ModelPlan


class Reader(Runtime):
    """One program, and the compressed-tensors folders that it loads."""

    def _refuses(self, model: ModelPlan, options: FormatOptions) -> Iterator[str]:
        yield from super()._refuses(model, options)
        if model.config.head_bits and not self.ran:
            yield "a quantized head, which was not read (leave out --head-bits)"

    def _flags(self) -> Iterator[str]:
        yield from super()._flags()
        if not self.ran:
            yield "no `--head-bits`"


RUNTIMES = (
    Reader(
        "transformers + compressed-tensors",
        "run by runtime_tests/test_compressed_tensors.py (transformers 5.24, compressed-tensors"
        " 0.20.1)",
        ran=True,
    ),
    # Marlin takes 4 bits, and 8 without zero-points; Humming, which vLLM requires, takes the rest.
    Reader(
        "vLLM 0.33.0",
        "quantization/compressed_tensors/, its schemes/compressed_tensors_wNa16.py,"
        " kernels/linear/mixed_precision/ and the weight mappers in model_executor/models",
        ran=False,
        group_sizes=MARLIN_GROUPS,
        families=READ_FAMILIES,
        other_families="vLLM's code for it was not read",
    ),
    Reader(
        "SGLang 0.5.23",
        "srt/layers/quantization/compressed_tensors/, its schemes/compressed_tensors_wNa16.py,"
        " marlin_utils.py, and srt/models",
        ran=False,
        bits=(4, 8),
        zero_points=(4,),
        group_sizes=MARLIN_GROUPS,
        families=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        other_families="SGLang has no class for it",
    ),
)


def vllm_loads(model: ModelPlan) -> bool:
    """Whether vLLM loads the folder of a model, by its code."""
    (vllm,) = (r for r in RUNTIMES if r.name.startswith("vLLM"))
    return not vllm.refuses(model, FormatOptions())
