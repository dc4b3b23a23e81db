"""What a run would do: sizes, memory and refusals.

Only config.json and the headers of the safetensors files are read. No weight, image or sample is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmq_export.errors import CheckpointError
from vlmq_export.formats.contract import FORMATS, FormatOptions, FormatPlan
from vlmq_export.formats.model_plan import ModelPlan
from vlmq_export.quantizer.config import GROUP_SIZES
from vlmq_export.quantizer.run.memory_plan import MemoryPlan, Shapes, memory_plan
from vlmq_export.recipes.recipe import Recipe


@dataclass(frozen=True)
class RunPlan:
    """A model, what each format would write of it, and the memory that quantizing it takes."""

    model: ModelPlan
    formats: dict[str, FormatPlan]
    memory: MemoryPlan | None = None  # None: nothing is quantized
    too_large: list[str] = field(default_factory=list)  # refusals: more memory than was allowed
    lacking: list[str] = field(default_factory=list)  # refusals: packages that writing needs
    not_provable: dict[str, str] = field(default_factory=dict)  # format → why it cannot be proven

    @property
    def refusals(self) -> list[str]:
        """Everything that cannot be, one line each: the grid's own limits first."""
        return [
            *group_refusals(self.model),
            *self.too_large,
            *self.lacking,
            *(f"{n}: {why}" for n, plan in self.formats.items() for why in plan.refusals),
        ]


def plan_run(model: ModelPlan, recipe: Recipe, memory: MemoryPlan | None = None) -> RunPlan:
    """The plan of a run. Raises CheckpointError for settings that a format cannot do without."""
    options = recipe.format_options(model.name)
    plans = {f: _format_plan(f, model, options) for f in recipe.format}
    return RunPlan(model, plans, memory, memory_refusals(memory, recipe.max_memory))


def group_refusals(model: ModelPlan) -> list[str]:
    """One line where the group size does not divide the inputs of every linear; else nothing."""
    size = model.config.group_size
    affine = [x for x in model.linears if x.name not in model.config.types]
    bad = [x for x in affine if size != -1 and x.in_features % size]
    if not bad:
        return []
    widths = ", ".join(map(str, sorted({x.in_features for x in bad})))
    fit = [g for g in GROUP_SIZES if all(x.in_features % g == 0 for x in model.linears)]
    choices = " or ".join(map(str, [*fit[:1], -1]))
    return [
        f"--group-size {size} does not divide {widths} input columns (first {bad[0].name});"
        f" use {choices}"
    ]


def narrow_groups(model: ModelPlan, size: int | None) -> str:
    """One line where groups of this size are smaller than usual because of the model's widths."""
    usual = GROUP_SIZES[0]
    widths = sorted({x.in_features for x in model.linears if x.in_features % usual})
    if model.config.types or size is None or not (widths and 0 < size < usual):
        return ""
    return (
        f"groups of {size} columns share a scale, because {usual} does not divide"
        f" {', '.join(map(str, widths))} input columns"
    )


def memory_refusals(memory: MemoryPlan | None, limit: float | None) -> list[str]:
    """One line where the run needs more than `limit` GB on the host; else nothing.

    Without a limit nothing is refused: that less seems free is only warned of, when the run starts.
    """
    if memory is None or not limit or memory.host <= memory.host_free:
        return []
    return [
        f"--max-memory {limit:g}: one layer at a time needs {memory.host / 1e9:.1f} GB,"
        " activations on disk; raise it, or give fewer or shorter samples"
    ]


def plan_memory(
    model: ModelPlan,
    recipe: Recipe,
    host_free: int,  # bytes
    device_free: int,  # bytes; 0: there is no CUDA device
    tokens: int | None = None,  # of all samples; None: as many as the recipe allows
) -> MemoryPlan:
    """The memory that quantizing this model takes."""
    seq_len = recipe.seq_len or model.architecture.family.seq_len
    return memory_plan(
        shapes_of(model),
        model.job.method,
        tokens=tokens or recipe.samples * seq_len,
        seq_len=seq_len,
        host_free=host_free,
        device_free=device_free,
    )


def shapes_of(model: ModelPlan) -> Shapes:
    """What the memory plan needs to know of a model.

    A matrix with a row for every token of the vocabulary does not count: it is never held whole.
    """
    family, text = model.architecture.family, model.architecture.text
    layers, rows = model.architecture.layers, text["vocab_size"]
    vocabulary = (rows,)
    decoder = [x for x in model.linears if x.name.startswith(family.layers)]
    outside = [t for t in model.floats if not t.name.startswith(family.layers)]
    quantized = sum(x.out_features * x.in_features for x in model.linears)
    return Shapes(
        layers=layers,
        hidden=decoder[0].in_features,
        heads=text["num_attention_heads"],
        linears=tuple((x.out_features, x.in_features) for x in decoder[: len(decoder) // layers]),
        groups=tuple(len(group) for group in family.groups),
        prefix=sum(t.numel for t in outside if t.shape[:1] != vocabulary),
        pixels=_pixels(model.architecture.config),
        weights=quantized + sum(t.numel for t in model.floats),
        vocabulary=rows if isinstance(rows, int) else 0,
    )


def _pixels(config: dict) -> int:
    """How many numbers the vision tower is given for each image token.

    They are the pixels, in three colours, of the patches that are merged into the token, each patch
    in all its frames.
    """
    vision = config["vision_config"]
    patch, frames = vision["patch_size"], vision.get("temporal_patch_size", 1)
    side = patch[0] if isinstance(patch, list) else patch
    shuffled = config.get("scale_factor", round(1 / config.get("downsample_ratio", 1)))
    merged = vision.get("spatial_merge_size", shuffled)
    return 3 * frames * (side * merged) ** 2


def _format_plan(name: str, model: ModelPlan, options: FormatOptions) -> FormatPlan:
    """What one format would write. Raises CheckpointError for settings that it does not find."""
    not_there = ArithmeticError, AttributeError, LookupError, TypeError, ValueError
    try:
        plan = FORMATS[name].plan(model, options)
    except not_there as e:
        raise CheckpointError(
            f"config.json of {model.name} cannot be used for --format {name} ({e!r});"
            " copy it from the original model"
        ) from None
    if model.config.rotate == "online":
        plan.refusals.append(
            "--rotate online multiplies by a Hadamard matrix between two linears,"
            " which its runtimes cannot; use folded"
        )
    return plan
