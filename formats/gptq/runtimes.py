"""The programs that load GPTQ folders: what each asks of a file, and how we know.

A program that the tests run is claimed as run. Of the others we say what their own code does, in
the version that was read, and that it was not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.layout import GPTQMODEL_LOADS
from vlmq_export.formats.model_plan import ModelPlan

# 5 to 7 bits exist only in GPTQModel's own planar layout, which nothing else reads.
BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # those that GPTQModel loads
MARLIN_GROUPS = (-1, 32, 64, 128)  # MARLIN_SUPPORTED_GROUP_SIZES of vLLM and SGLang
READ_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
ALL_FAMILIES = (*READ_FAMILIES, "idefics3", "smolvlm")


@dataclass(frozen=True)
class Runtime:
    """One program, and the files that it loads."""

    name: str  # with the version that the rest is about
    source: str  # what says so: a test of ours, or a file of the program
    ran: bool  # whether the tests load files with it
    bits: tuple[int, ...] = BITS
    group_sizes: tuple[int, ...] = GROUP_SIZES
    zero_points: bool = True  # whether it loads grids with zero-points
    permuted: bool = True  # whether it loads groups whose columns are permuted (`desc_act`)
    names: tuple[str, ...] = ("hub", "module")  # of the tensors, as --gptq-names has them
    families: tuple[str, ...] = ALL_FAMILIES
    other_families: str = ""  # what it does with the others, in words

    def refuses(self, model: ModelPlan, options: FormatOptions) -> list[str]:
        """What of a file it does not take, with the option that changes it. Empty: it loads it."""
        return list(self._refuses(model, options))

    def _refuses(self, model: ModelPlan, options: FormatOptions) -> Iterator[str]:
        config, architecture = model.config, model.architecture
        if architecture.model_type not in self.families:
            yield f"{architecture.model_type}: {self.other_families}"
        if config.bits not in self.bits:
            yield f"{config.bits} bits (--bits {one_of(self.bits)})"
        if not config.symmetric and not self.zero_points:
            yield "zero-points (--sym)"
        if config.group_size not in self.group_sizes:
            yield f"groups of {config.group_size} (--group-size {one_of(self.group_sizes)})"
        if config.act_order == "dynamic" and config.group_size != -1 and not self.permuted:
            yield "permuted groups (--act-order gar or static)"
        # A family without prefixes has only one kind of names.
        if options.gptq_names not in self.names and architecture.family.prefixes:
            yield f"{options.gptq_names} tensor names (--gptq-names {one_of(self.names)})"

    @property
    def flags(self) -> str:
        """The options whose files it loads, as a cell of a table."""
        asked = []
        if self.bits != BITS:
            asked.append(f"`--bits {one_of(self.bits)}`")
        if not self.zero_points:
            asked.append("`--sym`")
        if self.group_sizes != GROUP_SIZES:
            asked.append(f"`--group-size {one_of(self.group_sizes)}`")
        if not self.permuted:
            asked.append("`--act-order gar`, `static` or `off`")
        if self.names != ("hub", "module"):
            asked.append(f"`--gptq-names {one_of(self.names)}`")
        return ", ".join(asked) or "any that are written"

    @property
    def row(self) -> str:
        """Its row in the table of docs/gptq.md."""
        families = "all" if self.families == ALL_FAMILIES else ", ".join(self.families)
        how = "yes" if self.ran else "no, read"
        return f"| {self.name} | {self.flags} | {families} | {how} | {self.source} |"


_GPTQMODEL = "transformers 5.24, gptqmodel 7.7, optimum 2.3"
RUNTIMES = (
    Runtime(
        "transformers + gptqmodel",
        f"run by runtime_tests/test_gptq.py ({_GPTQMODEL})",
        ran=True,
    ),
    Runtime(
        "GPTQModel.load",
        f"run by runtime_tests/test_gptq.py ({_GPTQMODEL})",
        ran=True,
        names=("module",),
        families=GPTQMODEL_LOADS,
        other_families="GPTQModel 7.7 has no class for it",
    ),
    Runtime(
        "vLLM 0.33.0",
        "model_executor/layers/quantization/auto_gptq.py, utils/gptq_utils.py and"
        " utils/marlin_utils.py, and the weight mappers in model_executor/models",
        ran=False,
        bits=(4, 8),
        group_sizes=MARLIN_GROUPS,
        zero_points=False,
        permuted=False,
        families=READ_FAMILIES,
        other_families="vLLM's code for it was not read",
    ),
    Runtime(
        "SGLang 0.5.23",
        "srt/layers/quantization/gptq/gptq.py, its schemes and marlin_utils.py, and srt/models",
        ran=False,
        bits=(4, 8),
        group_sizes=MARLIN_GROUPS,
        zero_points=False,
        families=("qwen3_vl",),
        other_families="SGLang has no class for it, or wants its vision tower quantized too",
    ),
)


def notes(model: ModelPlan, options: FormatOptions) -> Iterator[str]:
    """A line for each program: whether it loads this file, and what would make it."""
    loads = [r for r in RUNTIMES if not r.refuses(model, options)]
    if ran := [r.name for r in loads if r.ran]:
        yield f"loads in {' and '.join(ran)}, which the tests run"
    for runtime in RUNTIMES:
        how = "" if runtime.ran else " (by its code; it was not run)"
        if refused := runtime.refuses(model, options):
            yield f"does not load in {runtime.name}{how}: {'; '.join(refused)}"
        elif not runtime.ran:
            yield f"loads in {runtime.name}{how}"


def one_of(values: tuple[int, ...] | tuple[str, ...]) -> str:
    """The values in words: `4 or 8`, `32, 64, 128 or -1`."""
    # −1 stands last, as nobody looks for it among the sizes.
    told = [str(v) for v in sorted(values, key=lambda v: v == -1)]
    return " or ".join(", ".join(told).rsplit(", ", 1))
