"""What a GPTQ folder holds: its tensors in order, and its quantization_config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from vlmq_export._version import __version__
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.in_transformers.files import Entry, float_entries
from vlmq_export.formats.in_transformers.widths import width_patterns
from vlmq_export.formats.model_plan import LinearSpec, TensorSpec
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.families import Family, groups_of

VERSIONS = {"v1": "gptq", "v2": "gptq_v2"}  # option --gptq-version → `checkpoint_format`
# GPTQModel loads an asymmetric v1 file only if `meta.quantizer` lists GPTQModel itself, in a
# version from 0.9 on. We therefore list it as a tag of the format.
FORMAT_TAG = "gptqmodel:7.7.0"
# Those of our families that are in GPTQModel's MODEL_MAP.
GPTQMODEL_LOADS = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "internvl",
    "smolvlm",
    "gemma3",
    "mistral3",
)
# Where optimum, through which transformers loads these files, looks for decoder layers by itself
# (BLOCK_PATTERNS in optimum/gptq/constants.py). Elsewhere the file must say where they are.
OPTIMUM_FINDS = ("model.layers", "model.language_model.layers")


def entries(
    linears: Iterable[LinearSpec],
    floats: Iterable[TensorSpec],
    config: QuantConfig,
    rename: Callable[[str], str],  # hub tensor name → name in the file
) -> Iterator[Entry]:
    """Every tensor in the order of the file.

    Linears come first, whose sizes keep each tensor aligned. Float tensors follow by item size,
    the widest first.
    """
    for linear in linears:
        n, k, bits = linear.out_features, linear.in_features, config.of(linear.name).bits
        groups = config.groups(k)
        shapes = {
            "qweight": ((k * bits // 32, n), "I32"),
            "qzeros": ((groups, n * bits // 32), "I32"),
            "scales": ((groups, n), "F16"),
            "g_idx": ((k,), "I32"),
        }
        if linear.bias:
            shapes["bias"] = ((n,), "F16")
        for part, (shape, dtype) in shapes.items():
            yield Entry(rename(f"{linear.name}.{part}"), shape, dtype, linear.name, part)
    yield from float_entries(floats, rename)


def renamer(architecture: Architecture, options: FormatOptions) -> Callable[[str], str]:
    """The function that makes of a hub tensor name the name in the file."""
    return architecture.family.module_name if options.gptq_names == "module" else str


def quantization_config(
    config: QuantConfig, version: str, permuted: bool, architecture: Architecture
) -> dict:
    """The object that config.json and quantize_config.json hold.

    permuted: the g_idx of some linear is not monotone. Readers know this as `desc_act`.
    """
    family = architecture.family
    layers = family.module_name(family.layers).rstrip(".")
    named = {} if layers in OPTIMUM_FINDS else {"block_name_to_quantize": layers}
    usual = usual_grid(config)
    rules = {"dynamic": _dynamic(config, usual, family)} if config.widths else {}
    if any(block.kept for block in family.every_block):  # linears of the layers that stay floats
        steps = dict.fromkeys(group for chain in family.chains for group in groups_of(chain))
        rules |= {"modules_in_block_to_quantize": [[*group] for group in steps]}
    return {
        "quant_method": "gptq",
        "bits": usual.bits,
        "group_size": usual.group_size,
        "sym": usual.symmetric,
        "desc_act": permuted,
        "checkpoint_format": VERSIONS[version],
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"vlmq-export:{__version__}", FORMAT_TAG],
            "method": config.method,
            "damp_percent": config.damp,
            "static_groups": config.act_order == "static",
            "act_group_aware": config.act_order == "gar",
        },
        **rules,
        **named,
    }


def usual_grid(config: QuantConfig) -> QuantConfig:
    """The grid that the file states for all linears; with widths, that of the most linears."""
    if not config.widths:
        return config
    ((bits, _),) = Counter(sorted(config.widths.values())).most_common(1)
    return config.at(bits)


def _dynamic(config: QuantConfig, usual: QuantConfig, family: Family) -> dict[str, dict]:
    """GPTQModel's rules for the linears of other widths: expression → what is different."""
    rules = {}
    for bits, patterns in width_patterns(config.widths, family).items():
        own = config.at(bits)
        sym = {} if own.symmetric == usual.symmetric else {"sym": own.symmetric}
        if bits != usual.bits:
            rules |= {f"+:{pattern}": {"bits": bits, **sym} for pattern in patterns}
    return rules
