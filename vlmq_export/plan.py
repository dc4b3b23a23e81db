"""What a run would do, from config.json and safetensors headers alone: no weight, image or sample is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vlmq_export import formats
from vlmq_export.errors import CheckpointError
from vlmq_export.formats.base import FormatOptions, FormatPlan, LinearSpec, ModelPlan, TensorSpec
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.families import family_of, layer_count, text_config, untied
from vlmq_export.quantizer.memory import MemoryPlan, Shapes, memory_plan
from vlmq_export.quantizer.methods import method_named
from vlmq_export.recipe import Recipe


@dataclass(frozen=True)
class RunPlan:
    model: ModelPlan
    formats: dict[str, FormatPlan]
    memory: MemoryPlan | None = None  # None: nothing is quantized
    too_large: list[str] = field(default_factory=list)  # for the memory that was allowed

    @property
    def refusals(self) -> list[str]:
        """Everything that cannot be, one line each: the grid's own limits first, then each format's."""
        return [
            *group_refusals(self.model),
            *self.too_large,
            *(f"{n}: {why}" for n, plan in self.formats.items() for why in plan.refusals),
        ]


def model_plan(checkpoint: Checkpoint, config: QuantConfig, name: str) -> ModelPlan:
    """Raises CheckpointError for a model that is not supported or lacks a tensor."""
    family = family_of(checkpoint.config)
    linears = []
    for linear in family.linear_names(layer_count(checkpoint.config)):
        shape = checkpoint.info(f"{linear}.weight").shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{linear}.weight has shape {list(shape)}, which is no linear's; copy the file again")
        linears.append(LinearSpec(linear, shape[0], shape[1], f"{linear}.bias" in checkpoint.tensors))
    source = checkpoint.config
    if config.head_bits:
        own = f"{family.head}.weight"
        tied = next((n for n in checkpoint.tensors if n.endswith("embed_tokens.weight")), own)
        shape = checkpoint.info(own if own in checkpoint.tensors else tied).shape
        linears.append(LinearSpec(family.head, shape[0], shape[1], False))
        source = untied(source)
    taken = {f"{linear.name}.{part}" for linear in linears for part in ("weight", "bias")}
    floats = [TensorSpec(t.name, t.shape, t.dtype) for t in checkpoint.tensors.values() if t.name not in taken]
    return ModelPlan(name, checkpoint.model_type, source, linears, floats, config)


def with_types(model: ModelPlan, types: dict[str, str], mix: str = "") -> ModelPlan:
    """The same run on block types: hub module → type, and the mix that they came from."""
    return replace(model, config=replace(model.config, gguf_type=mix, types=types))


def artifact_plan(artifact: Artifact) -> ModelPlan:
    """The same description of a model that is quantized already."""
    m = artifact.manifest
    family_of(artifact.source_config)  # raises for what the manifest cannot be about
    linears = [LinearSpec(r.name, r.out_features, r.in_features, r.bias) for r in m.modules]
    floats = [TensorSpec(*info) for info in artifact.float_info()]
    return ModelPlan(m.name, m.model_type, artifact.source_config, linears, floats, artifact.config)


def group_refusals(model: ModelPlan) -> list[str]:
    size = model.config.group_size
    bad = [x for x in model.linears if size != -1 and x.in_features % size and x.name not in model.config.types]
    if not bad:
        return []
    widths = sorted({x.in_features for x in bad})
    fit = [g for g in (128, 64, 32) if all(x.in_features % g == 0 for x in model.linears)]
    return [
        f"--group-size {size} does not divide {', '.join(map(str, widths))} input columns (first {bad[0].name}); "
        f"use {' or '.join(map(str, [*fit[:1], -1]))}"
    ]


def shapes_of(model: ModelPlan) -> Shapes:
    """What the memory plan needs to know. A matrix with a row for every token of the vocabulary is never held."""
    family, text = family_of(model.source_config), text_config(model.source_config)
    layers, heads, rows = layer_count(model.source_config), text.get("num_attention_heads"), (text.get("vocab_size"),)
    decoder = [x for x in model.linears if x.name.startswith(family.layers)]
    kept = [t for t in model.floats if not t.name.startswith(family.layers) and t.shape[:1] != rows]
    return Shapes(
        layers=layers, hidden=decoder[0].in_features, heads=heads if isinstance(heads, int) else 1,
        linears=tuple((x.out_features, x.in_features) for x in decoder[: len(decoder) // layers]),
        groups=tuple(len(group) for group in family.groups), prefix=sum(t.numel for t in kept),
        pixels=_pixels(model.source_config),
        weights=sum(x.out_features * x.in_features for x in model.linears) + sum(t.numel for t in model.floats),
    )  # fmt: skip


def _pixels(config: dict) -> int:
    """Numbers that the vision tower is given for a token: the patches that are merged into it, each in all its frames."""
    vision = config.get("vision_config", {})
    patch, frames = vision.get("patch_size", 14), vision.get("temporal_patch_size", 1)
    side = patch[0] if isinstance(patch, list) else patch
    merged = vision.get("spatial_merge_size", round(1 / config.get("downsample_ratio", 1)))
    return 3 * frames * (side * merged) ** 2


def plan_memory(
    model: ModelPlan, recipe: Recipe, host_free: int, device_free: int, tokens: int | None = None
) -> MemoryPlan:
    """Without `tokens`, as many as the recipe allows."""
    seq_len = recipe.seq_len or family_of(model.source_config).seq_len
    return memory_plan(
        shapes_of(model), method_named(recipe.method.value), tokens=tokens or recipe.samples * seq_len, seq_len=seq_len,
        host_free=host_free, device_free=device_free,
    )  # fmt: skip


def memory_refusals(memory: MemoryPlan | None, limit: float | None) -> list[str]:
    """A limit that was given is kept or refused; that less seems free is only warned of."""
    if memory is None or not limit or memory.host <= memory.host_free:
        return []
    return [
        f"--max-memory {limit:g}: one layer at a time needs {memory.host / 1e9:.1f} GB, activations on disk; "
        "raise it, or give fewer or shorter samples"
    ]


def plan_run(model: ModelPlan, recipe: Recipe, memory: MemoryPlan | None = None) -> RunPlan:
    options = recipe.format_options(model.name)
    plans = {f.value: _format_plan(f.value, model, options) for f in recipe.format}
    return RunPlan(model, plans, memory, memory_refusals(memory, recipe.max_memory))


def _format_plan(name: str, model: ModelPlan, options: FormatOptions) -> FormatPlan:
    try:
        plan = formats.get(name).plan(model, options)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:  # settings that are not there
        raise CheckpointError(
            f"config.json of {model.name} cannot be used for --format {name} ({e!r}); copy it from the original model"
        ) from None
    if model.config.rotate == "online":
        plan.refusals.append(
            "--rotate online multiplies by a Hadamard matrix between two linears, which its runtimes cannot; use folded"
        )
    return plan
