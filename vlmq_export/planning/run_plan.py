"""What a run would do: sizes, memory, time and refusals.

Only config.json, the headers of the safetensors files, texts and the headers of images are read. No
weight and no pixel is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vlmq_export.errors import CheckpointError
from vlmq_export.formats.contract import FORMATS, FormatOptions, FormatPlan
from vlmq_export.formats.model_plan import LinearSpec, ModelPlan
from vlmq_export.quantizer.config import EMBEDDING_GROUP, EMBEDDING_TYPES, GROUP_SIZES
from vlmq_export.quantizer.grids.choice import vision_block
from vlmq_export.quantizer.run.memory_plan import MemoryPlan, Shapes, memory_plan
from vlmq_export.quantizer.run.refusals import experts_refusal
from vlmq_export.quantizer.run.time_plan import TimePlan
from vlmq_export.quantizer.run.work import Linears
from vlmq_export.quantizer.samples.sample import Lengths
from vlmq_export.recipes.recipe import Recipe


@dataclass(frozen=True)
class RunPlan:
    """A model, what each format would write of it, and the memory that quantizing it takes."""

    model: ModelPlan
    formats: dict[str, FormatPlan]
    lengths: Lengths | None = None  # of the calibration samples; None: nothing is quantized
    memory: MemoryPlan | None = None  # likewise
    time: TimePlan | None = None  # None: nothing is quantized, or it was not asked for
    unusable: list[str] = field(default_factory=list)  # refusals: rows that are no samples
    too_large: list[str] = field(default_factory=list)  # refusals: more memory than was allowed
    lacking: list[str] = field(default_factory=list)  # refusals: packages that writing needs
    not_provable: dict[str, str] = field(default_factory=dict)  # format → why it cannot be proven

    @property
    def refusals(self) -> list[str]:
        """Everything that cannot be, one line each: the grid's own limits first."""
        unproven = experts_refusal(self.model.job)
        return [
            *([unproven] if unproven else []),
            *group_refusals(self.model),
            *self.unusable,
            *self.too_large,
            *self.lacking,
            *(f"{n}: {why}" for n, plan in self.formats.items() for why in plan.refusals),
        ]


def plan_run(model: ModelPlan, recipe: Recipe) -> RunPlan:
    """What would be written. Raises CheckpointError for settings that a format needs."""
    options = recipe.format_options(model.name)
    formats = {f: format_plan(f, model, options) for f in recipe.format}
    for planned in formats.values():
        if recipe.target_bytes is not None and planned.size_bytes > recipe.target_bytes:
            planned.refusals.append(
                f"{recipe.by_cost}: what is chosen already takes"
                f" {planned.size_bytes / 1e9:.4g} GB; quantize the float model again"
            )
    return RunPlan(model, formats)


def group_refusals(model: ModelPlan) -> list[str]:
    """A line where groups do not fill the inputs of a linear, or the rows of the embedding."""
    config, size = model.config, model.config.group_size
    affine = [x for x in model.linears if x.name not in config.types]
    bad = [x for x in affine if x.in_features % config.of(x.name).group_columns(x.in_features)]
    if not bad:
        return []
    widths = ", ".join(map(str, sorted({x.in_features for x in bad})))
    if {x.name for x in bad} == {model.architecture.family.embedding}:
        return [
            f"--embedding-bits {config.embedding_bits}: rows of {widths} columns do not fill groups"
            f" of {EMBEDDING_GROUP}; leave it off"
        ]
    choices = " or ".join(str(g) for g in (largest_group(model), -1) if g is not None)
    return [
        f"--group-size {size} does not divide {widths} input columns (first {bad[0].name});"
        f" use {choices}"
    ]


def largest_group(model: ModelPlan) -> int | None:
    """The largest usual group size that divides the inputs of every linear, or None."""
    widths = {x.in_features for x in model.linears}
    return next((g for g in GROUP_SIZES if not any(width % g for width in widths)), None)


def narrow_groups(model: ModelPlan) -> str:
    """One line where groups are smaller than usual because of the model's widths; else nothing."""
    usual, size = GROUP_SIZES[0], model.config.group_size
    if model.config.types or size == usual or size != largest_group(model):
        return ""
    widths = sorted({x.in_features for x in model.linears if x.in_features % usual})
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
    lengths: Lengths,  # of the samples
    host_free: int,  # bytes
    device_free: int,  # bytes; 0: there is no CUDA device
) -> MemoryPlan:
    """The memory that quantizing this model takes."""
    free = {"host_free": host_free, "device_free": device_free}
    return memory_plan(shapes_of(model), model.config, lengths, **free)


def shapes_of(model: ModelPlan) -> Shapes:
    """What the memory plan needs to know of a model.

    A matrix with a row for every token of the vocabulary does not count: it is never held whole.
    Where layers differ, the linears are those of the layer that has the most weights.
    """
    family, text = model.architecture.family, model.architecture.text
    vision, rows = model.architecture.vision, text["vocab_size"]
    vocabulary = (rows,)
    groups = max(_groups(model), key=lambda own: sum(x.numel for group in own for x in group))
    outside = [t for t in model.floats if not t.name.startswith(family.layers)]
    tower = sum(x.numel for x in model.tower)
    quantized = sum(x.numel for x in model.linears) + tower
    return Shapes(
        layers=model.architecture.layers,
        hidden=groups[0][0].in_features,
        heads=text["num_attention_heads"],
        linears=tuple((x.out_features, x.in_features) for group in groups for x in group),
        groups=tuple(len(group) for group in groups),
        prefix=tower + sum(t.numel for t in outside if t.shape[:1] != vocabulary),
        pixels=_pixels(model.architecture.config),
        patches=_patches(model.architecture.config),
        tower_layers=vision.get("depth") or vision["num_hidden_layers"],
        tower_width=vision.get("embed_dim") or vision["hidden_size"],
        weights=quantized + sum(t.numel for t in model.floats),
        vocabulary=rows if isinstance(rows, int) else 0,
        tower=tuple((x.out_features, x.in_features) for x in model.tower),
        experts=model.architecture.experts,
        taken=model.architecture.taken,
        recurrent_heads=text.get("linear_num_value_heads", 0),
        recurrent_width=text.get("linear_value_head_dim", 0),
    )


def _groups(model: ModelPlan) -> Iterator[list[list[LinearSpec]]]:
    """The linears of each decoder layer, by the input that they share."""
    job, linears = model.job, {x.name: x for x in model.linears}
    for index in range(job.layers):
        names = job.groups(index)
        yield [[linears[job.prefix(index) + name] for name in group] for group in names]


def matrix_sizes(model: ModelPlan) -> dict[str, tuple[int, int]]:
    """Hub module → (out, in) of every matrix, quantized or not."""
    sizes = {x.name: (x.out_features, x.in_features) for x in model.linears}
    return sizes | {x.name.removesuffix(".weight"): (x.shape[0], x.shape[-1]) for x in model.floats}


def linears_of(model: ModelPlan) -> list[list[Linears]]:
    """The linears of each decoder layer, by the input that they share, for the plan of time.

    An output matrix that is solved comes last, as a layer of its own.
    """
    types, job, sizes = model.config.types, model.job, matrix_sizes(model)

    def linears(names: Sequence[str], kind: str = "") -> Linears:
        rows, columns = zip(*(sizes[name] for name in names))
        own = tuple(types.get(name, "") for name in names)
        return Linears(columns[0], rows, own, kind == "recurrent", kind == "experts")

    layers = [
        [
            linears([job.prefix(index) + name for name in names], block.kind)
            for block in job.architecture.blocks(index)
            for names in block.steps
        ]
        for index in range(job.layers)
    ]
    return layers + ([[linears([job.head])]] if job.head else [])


def fitted_types(model: ModelPlan) -> frozenset[str]:
    """The block types whose scales the run searches."""
    tower = {vision_block(model.config, x.in_features) for x in model.tower} - {""}
    return frozenset([*model.config.types.values(), *outside_of(model), *tower])


def outside_of(model: ModelPlan) -> Counter[str]:
    """Block type → weights outside the decoder layers that are rounded to it, uncalibrated."""
    config, embedding = model.config, model.architecture.family.embedding
    sizes = {x.name: x.out_features * x.in_features for x in model.linears}
    solved, found = {*sizes, model.job.head}, Counter[str]()
    for tensor in model.floats:
        name = tensor.name.removesuffix(".weight")
        if name not in solved and (kind := config.types.get(name)):
            found[kind] += tensor.numel
    if config.embedding_bits:
        found[EMBEDDING_TYPES[config.embedding_bits]] += sizes[embedding]
    return found


def _patches(config: dict) -> int:
    """How many patches of an image are merged into one of its tokens."""
    vision = config["vision_config"]
    if pooled := config.get("mm_tokens_per_image"):
        return (vision["image_size"] // vision["patch_size"]) ** 2 // pooled
    shuffled = config.get("scale_factor", round(1 / config.get("downsample_ratio", 1)))
    return vision.get("spatial_merge_size", config.get("spatial_merge_size", shuffled)) ** 2


def _pixels(config: dict) -> int:
    """How many numbers the vision tower is given for each image token.

    They are the pixels, in three colours, of the patches that are merged into the token, each patch
    in all its frames.
    """
    vision = config["vision_config"]
    patch, frames = vision["patch_size"], vision.get("temporal_patch_size", 1)
    side = patch[0] if isinstance(patch, list) else patch
    return 3 * frames * side**2 * _patches(config)


def format_plan(name: str, model: ModelPlan, options: FormatOptions) -> FormatPlan:
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
