"""What a compressed-tensors folder holds: its tensors in order, and its quantization_config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vlmq_export._version import __version__
from vlmq_export.formats.in_transformers.files import Entry, float_entries
from vlmq_export.formats.in_transformers.widths import (
    kept_patterns,
    tower_patterns,
    width_patterns,
)
from vlmq_export.formats.model_plan import LinearSpec, ModelPlan, TensorSpec
from vlmq_export.quantizer.config import QuantConfig

PACKED = "pack-quantized"  # the library's name of the layout
HEAD = r"re:.*lm_head"  # vLLM and SGLang look for a quantized head by its name alone
LAYERS = r"re:.*model\.layers\..*_proj$"  # the linears of the decoder, fused ones too


def graded(model: ModelPlan) -> list[tuple[LinearSpec, QuantConfig]]:
    """The quantized linears in the order of the file, each with the recipe of its grid."""
    config = model.config
    decoder = [(linear, config.of(linear.name)) for linear in model.linears]
    return decoder + [(linear, config.vision) for linear in model.tower]


def entries(
    linears: Iterable[tuple[LinearSpec, QuantConfig]], floats: Iterable[TensorSpec]
) -> Iterator[Entry]:
    """Every tensor in the order of the file, under its hub name, which all three programs map."""
    for linear, grid in linears:
        n, k = linear.out_features, linear.in_features
        groups = grid.groups(k)
        shapes = {
            "weight_packed": ((n, words(k, grid.bits)), "I32"),
            "weight_scale": ((n, groups), "F16"),
            "weight_shape": ((2,), "I64"),
        }
        if not grid.symmetric:
            shapes["weight_zero_point"] = ((words(n, grid.bits), groups), "I32")
        if linear.bias:
            shapes["bias"] = ((n,), "F16")
        for part, (shape, dtype) in shapes.items():
            yield Entry(f"{linear.name}.{part}", shape, dtype, linear.name, part)
    yield from float_entries(floats)


def words(values: int, bits: int) -> int:
    """The number of 32-bit words that so many values fill."""
    return -(-values * bits // 32)


def schemes(model: ModelPlan) -> list[tuple[list[str], QuantConfig]]:
    """The grids of a file, each with what it is for. Parts that have the same grid share it.

    Where there are several, each part is named. `Linear`, the name of a class, would stand for all
    linears of a file where the library decodes by names alone, and is also found in the names that
    vLLM gives its fused linears.
    """
    config, family = model.config, model.architecture.family
    parts, widths = [([LAYERS], config)], config.widths
    if not all(linear.name.endswith("_proj") for linear in model.linears):
        widths = {n: config.of(n).bits for n in model.architecture.linears}
    if widths:
        found = width_patterns(widths, family)
        parts = [([f"re:{one}" for one in each], config.at(bits)) for bits, each in found.items()]
    if config.head_bits:
        parts.append(([HEAD], config.head))
    if model.tower:
        parts.append((tower_patterns((x.name for x in model.tower), family), config.vision))
    grids: dict[tuple[int, int, bool], tuple[list[str], QuantConfig]] = {}
    for targets, grid in parts:
        key = (grid.bits, grid.group_size, grid.symmetric)
        grids.setdefault(key, ([], grid))[0].extend(targets)
    if len(grids) == 1 and not config.widths:
        named = len(parts[0][0])  # the expressions of the decoder, for which the class stands
        return [(["Linear", *targets[named:]], grid) for targets, grid in grids.values()]
    return list(grids.values())


def ignored(model: ModelPlan) -> list[str]:
    """What stays float, as patterns that the names of transformers, vLLM and SGLang all match.

    Of a quantized tower, these are the modules that have weights and no integers.
    """
    family = model.architecture.family
    head = [*kept_patterns(family), *([] if model.config.head_bits else [HEAD])]
    if not model.tower:
        roots = [prefix.rstrip(".").split(".")[-1] for prefix in family.vision if prefix[-1] == "."]
        return [rf"re:.*{root}\..*" for root in roots] + head
    matrices = [t.name for t in model.floats if family.is_vision(t.name) and len(t.shape) > 1]
    modules = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    return tower_patterns(modules, family) + head


def quantization_config(model: ModelPlan) -> dict:
    """The object that config.json holds, by the library's own classes."""
    from compressed_tensors import __version__ as library
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    def scheme(targets: list[str], grid: QuantConfig) -> QuantizationScheme:
        size = None if grid.group_size == -1 else grid.group_size
        strategy = "channel" if size is None else "group"
        settings = {"num_bits": grid.bits, "symmetric": grid.symmetric, "group_size": size}
        weights = QuantizationArgs.model_validate(settings | {"strategy": strategy})
        return QuantizationScheme.model_validate(
            {"targets": targets, "weights": weights, "format": PACKED}
        )

    groups = {f"group_{i}": scheme(*one) for i, one in enumerate(schemes(model))}
    stated = QuantizationConfig(
        config_groups=dict(groups),
        format=PACKED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignored(model),
    )
    made = {"version": library, "quantizer": f"vlmq-export:{__version__}"}
    return stated.model_dump(mode="json", exclude_none=True) | made
