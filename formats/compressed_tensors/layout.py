"""What a compressed-tensors folder holds: its tensors in order, and its quantization_config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vlmq_export._version import __version__
from vlmq_export.formats.in_transformers.files import Entry, float_entries
from vlmq_export.formats.in_transformers.widths import width_patterns
from vlmq_export.formats.model_plan import LinearSpec, TensorSpec
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.families import Family

PACKED = "pack-quantized"  # the library's name of the layout
HEAD = r"re:.*lm_head"  # vLLM and SGLang look for a quantized head by its name alone


def entries(
    linears: Iterable[LinearSpec], floats: Iterable[TensorSpec], config: QuantConfig
) -> Iterator[Entry]:
    """Every tensor in the order of the file, under its hub name, which all three programs map."""
    for linear in linears:
        grid = config.of(linear.name)
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


def schemes(config: QuantConfig, family: Family) -> list[tuple[list[str], QuantConfig]]:
    """The grids of a file, each with what it is for. A head on the grid of the rest shares it.

    Where linears have several widths, each of them is named. `Linear`, the name of a class, would
    also be found in those that vLLM gives its fused linears.
    """
    if config.widths:
        patterns = width_patterns(config.widths, family)
        named = {bits: [f"re:{one}" for one in each] for bits, each in patterns.items()}
        if config.head_bits:
            named.setdefault(config.head_bits, []).append(HEAD)
        return [(targets, config.at(bits)) for bits, targets in named.items()]
    if not config.head_bits:
        return [(["Linear"], config)]
    head = config.head
    if (head.bits, head.symmetric) == (config.bits, config.symmetric):
        return [(["Linear", HEAD], config)]
    return [(["Linear"], config), ([HEAD], head)]


def ignored(family: Family, head: bool) -> list[str]:
    """What stays float, as patterns that the names of transformers, vLLM and SGLang all match.

    head: whether the output head is quantized.
    """
    towers = [prefix.rstrip(".").split(".")[-1] for prefix in family.vision if prefix[-1] == "."]
    return [rf"re:.*{tower}\..*" for tower in towers] + ([] if head else [HEAD])


def quantization_config(config: QuantConfig, family: Family) -> dict:
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

    groups = {f"group_{i}": scheme(*one) for i, one in enumerate(schemes(config, family))}
    stated = QuantizationConfig(
        config_groups=dict(groups),
        format=PACKED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignored(family, bool(config.head_bits)),
    )
    made = {"version": library, "quantizer": f"vlmq-export:{__version__}"}
    return stated.model_dump(mode="json", exclude_none=True) | made
