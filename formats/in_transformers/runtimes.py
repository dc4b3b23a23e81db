"""The programs that load a folder: what each asks of it, and how we know.

A program that the tests run is claimed as run. Of the others we say what their own code does, in
the version that was read, and that it was not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.model_plan import ModelPlan
from vlmq_export.quantizer.config import BITS

MARLIN_GROUPS = (-1, 32, 64, 128)  # MARLIN_SUPPORTED_GROUP_SIZES of vLLM and SGLang
READ_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
SPARSE = ("qwen3_vl_moe",)  # with experts, which transformers has fused in one parameter
UNREAD = ("gemma3", "mistral3", "qwen3_5", *SPARSE)  # of which no server's code was read
ALL_FAMILIES = (*READ_FAMILIES, "idefics3", "smolvlm", *UNREAD)
DENSE = tuple(name for name in ALL_FAMILIES if name not in SPARSE)


@dataclass(frozen=True)
class Runtime:
    """One program, and the files that it loads."""

    name: str  # with the version that the rest is about
    source: str  # what says so: a test of ours, or a file of the program
    ran: bool  # whether the tests load files with it
    bits: tuple[int, ...] = BITS
    zero_points: tuple[int, ...] = BITS  # the bits at which it loads grids with zero-points
    group_sizes: tuple[int, ...] = ()  # empty: whatever is written
    mixed: bool = True  # whether it loads linears of several widths
    permuted: bool = True  # whether it loads groups whose columns are permuted (`desc_act`)
    families: tuple[str, ...] = ALL_FAMILIES
    unread: tuple[str, ...] = ()  # those of which its code was not read
    other_families: str = ""  # what it does with the others, in words

    def refuses(self, model: ModelPlan, options: FormatOptions) -> list[str]:
        """What of a file it does not take, with the option that changes it. Empty: it loads it."""
        return list(self._refuses(model, options))

    def _refuses(self, model: ModelPlan, options: FormatOptions) -> Iterator[str]:
        config, architecture = model.config, model.architecture
        if architecture.model_type in self.unread:
            yield f"{architecture.model_type}: its code was not read"
        elif architecture.model_type not in self.families:
            yield f"{architecture.model_type}: {self.other_families}"
        grids = [config.at(bits) for bits in sorted({*config.widths.values()})] or [config]
        if config.widths and not self.mixed:
            yield "mixed widths (--bits in place of --target-bpw)"
        if odd := [str(grid.bits) for grid in grids if grid.bits not in self.bits]:
            yield f"{' and '.join(odd)} bits (--bits {one_of(self.bits)})"
        elif any(not grid.symmetric and grid.bits not in self.zero_points for grid in grids):
            yield "zero-points (--sym)"
        if self.group_sizes and config.group_size not in self.group_sizes:
            yield f"groups of {config.group_size} (--group-size {one_of(self.group_sizes)})"
        if config.act_order == "dynamic" and config.group_size != -1 and not self.permuted:
            yield "permuted groups (--act-order gar or static)"

    def _flags(self) -> Iterator[str]:
        """The options that its files ask for."""
        if self.bits != BITS:
            yield f"`--bits {one_of(self.bits)}`"
        if not self.mixed:
            yield "no mixed widths"
        if not self.zero_points:
            yield "`--sym`"
        elif set(self.bits) - set(self.zero_points):
            yield f"`--sym` or `--bits {one_of(self.zero_points)}`"
        if self.group_sizes:
            yield f"`--group-size {one_of(self.group_sizes)}`"
        if not self.permuted:
            yield "`--act-order gar`, `static` or `off`"

    @property
    def flags(self) -> str:
        """The options whose files it loads, as a cell of a table."""
        return ", ".join(self._flags()) or "any that are written"

    @property
    def row(self) -> str:
        """Its row in the table of the format's page in docs/."""
        every = {ALL_FAMILIES: "all", DENSE: f"all but {', '.join(SPARSE)}"}
        families = every.get(self.families, ", ".join(self.families))
        how = "yes" if self.ran else "no, read"
        return f"| {self.name} | {self.flags} | {families} | {how} | {self.source} |"


def notes(programs: Sequence[Runtime], model: ModelPlan, options: FormatOptions) -> Iterator[str]:
    """A line for each program: whether it loads this file, and what would make it."""
    loads = [r for r in programs if not r.refuses(model, options)]
    if ran := [r.name for r in loads if r.ran]:
        yield f"loads in {' and '.join(ran)}, which the tests run"
    for runtime in programs:
        how = "" if runtime.ran else " (by its code; it was not run)"
        refused = runtime.refuses(model, options)
        if len(refused) == 1 and model.architecture.model_type in runtime.unread:
            yield f"not known to load in {runtime.name}: {refused[0]}"
        elif refused:
            yield f"does not load in {runtime.name}{how}: {'; '.join(refused)}"
        elif not runtime.ran:
            yield f"loads in {runtime.name}{how}"


def one_of(values: tuple[int, ...] | tuple[str, ...]) -> str:
    """The values in words: `4 or 8`, `32, 64, 128 or -1`."""
    # −1 stands last, as nobody looks for it among the sizes.
    told = [str(v) for v in sorted(values, key=lambda v: v == -1)]
    return " or ".join(", ".join(told).rsplit(", ", 1))
