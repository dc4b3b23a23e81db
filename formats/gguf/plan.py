"""What a GGUF export would be, from config and headers alone: types, sizes, refusals, and what costs more than it seems."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from math import prod

from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions, FormatPlan, ModelPlan
from vlmq_export.formats.gguf.homes import grid_home, planned_home, why_homeless
from vlmq_export.formats.gguf.mix import MIXES
from vlmq_export.formats.gguf.mmproj import stored_type
from vlmq_export.formats.gguf.names import head, unused, vision_places, vision_to_hub
from vlmq_export.formats.gguf.params import text_params, vision_params
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.methods import method_named

_DTYPE_BYTES = {"F32": 4, "F64": 4, "F16": 2, "BF16": 2}  # in the file; wider floats are stored as F32

_TOKEN_BYTES = 36  # of a token's text, type and merge in the metadata, on Qwen2's vocabulary


def plan(model: ModelPlan, options: FormatOptions) -> FormatPlan:
    """Refusals come first; with one, the figures are those of the layers that could be written."""
    config = model.config
    homes = {x.name: config.types.get(x.name) or planned_home(config.of(x.name), x.in_features) for x in model.linears}
    refusals = [why_homeless(x.name, config.of(x.name), x.in_features) for x in model.linears if homes[x.name] is None]
    refusals += [
        f"{name}: no block type of {config.gguf_type or 'llama.cpp'} divides its rows; leave --gguf-type and --target-bpw out"
        for name, kind in config.types.items() if kind == "F16"
    ]  # fmt: skip
    refusals += _unknown(config)
    if config.act_order == "dynamic" and config.group_size != -1:
        refusals.append(
            "--act-order dynamic permutes the groups, and GGUF has no g_idx; use gar, static or off, or --group-size -1"
        )
    method = method_named(config.method)
    if options.gguf_imatrix and (not method.calibrated or method.scaling):
        refusals.append(
            f"--emit-imatrix: --method {config.method} leaves no energies of the model's own inputs; use another"
        )
    for read in (text_params, vision_params):
        try:
            read(model.source_config)
        except FormatError as e:
            refusals.append(str(e))
    bits = weights = 0
    for linear in model.linears:
        if (home := homes[linear.name]) and home in TYPES:
            weights += linear.out_features * linear.in_features
            bits += 8 * linear.out_features * TYPES[home].row_bytes(linear.in_features)
    biases = sum(4 * x.out_features for x in model.linears if x.bias)
    size = bits // 8 + biases + _float_bytes(model, options) + _TOKEN_BYTES * _vocabulary(model)
    return FormatPlan(
        bits / weights if weights else 0.0, size, list(dict.fromkeys(refusals)), plan_notes(model, homes | config.types)
    )


def _unknown(config: QuantConfig) -> list[str]:
    """Types that the installed gguf-py has no name for: it can neither write nor read a file that contains one."""
    if not config.types or find_spec("gguf") is None:
        return []
    import gguf

    return [
        f"{kind}: gguf-py {version('gguf')} does not know this type, and cannot read a file that contains it; use TQ2_0 or Q2_K"
        for kind in sorted(set(config.types.values())) if not hasattr(gguf.GGMLQuantizationType, kind)
    ]  # fmt: skip


def _float_bytes(model: ModelPlan, options: FormatOptions) -> int:
    config = model.source_config
    try:
        tower, hub = vision_places(vision_params(config)), vision_to_hub(config)
        aside = set(hub.values()) | unused(config) | ({head(config)} if _tied(config) else set())
    except FormatError:  # refused anyway
        tower, aside = {}, set()
    total = 0
    for place in tower.values():
        kind = TYPES[stored_type(place, options.mmproj_dtype)]
        total += prod(place.shape[:-1]) * kind.row_bytes(place.shape[-1])
    for t in model.floats:
        if kind := model.config.types.get(t.name.removesuffix(".weight")):
            total += t.shape[0] * TYPES[kind].row_bytes(t.shape[1])
        elif t.name not in aside:
            total += t.numel * (4 if len(t.shape) == 1 else _DTYPE_BYTES.get(t.dtype, 4))
    return total


def _vocabulary(model: ModelPlan) -> int:
    return next((t.shape[0] for t in model.floats if t.name.endswith("embed_tokens.weight")), 0)


def _tied(config: dict) -> bool:
    try:
        return text_params(config).tied
    except FormatError:
        return False


def plan_notes(model: ModelPlan, homes: dict[str, str | None]) -> list[str]:
    """What log and card should say. `homes`: linear → block type, planned or chosen from the integers."""
    config, notes = model.config, []
    counts = Counter(h for h in homes.values() if h)
    if counts:
        spread = ", ".join(
            f"{n} linears {h} ({TYPES[h].bits_per_weight:g} bits per weight)" for h, n in counts.most_common()
        )
        notes.append(f"GGUF block types: {spread}")
    narrow = [x for x in model.linears if homes[x.name] and TYPES[homes[x.name]].bits_per_weight > config.bits + 1]
    if config.bits < 4 and narrow and not config.types:
        notes.append(_dear(config, {x.in_features for x in narrow}))
    if config.bits == 2 and not config.symmetric and "Q2_K" in counts and "TQ2_0" not in counts:
        notes.append(
            "2-bit linears whose zero-points are all 1 or 2 need only TQ2_0's 2.0625 bits per weight and are stored so"
        )
    if "Q5_0" in counts and config.bits == 4:
        notes.append(
            f"{counts['Q5_0']} linears have scales whose product with the zero-point is not exact in float16 and take Q5_0's 5.5 bits"
        )
    if config.types:
        return [*notes, *_fallbacks(config)]
    matrix = "embed_tokens.weight" if _tied(model.source_config) else "lm_head.weight"
    for t in model.floats:
        if t.name.endswith(matrix) and t.dtype in ("BF16", "F16"):
            rounding = {"BF16": "bfloat16, 1.6e-3", "F16": "float16, 2e-4"}[t.dtype]
            notes.append(
                f"the output matrix stays {t.dtype}: llama.cpp rounds its input to {rounding} relative per product"
            )
    return notes


def _fallbacks(config: QuantConfig) -> list[str]:
    """The linears that a K-quant does not fit, as llama-quantize would warn."""
    if not config.gguf_type:
        return []
    legacy = [
        n for n, kind in config.types.items() if TYPES[kind].block == 32 and TYPES[MIXES[config.gguf_type]].block == 256
    ]
    if not legacy:
        return []
    return [
        f"{len(legacy)} matrices have rows that no block of 256 divides and take a type of 32-blocks, first {legacy[0]}"
    ]


def _dear(config: QuantConfig, columns: set[int]) -> str:
    """The cheaper choice for 2 and 3 bits in a container of four."""
    said = f"{config.bits}-bit grids of --group-size {config.group_size} have no narrower exact GGUF type than 4.5 bits per weight"
    if any(k % 256 for k in columns):
        return f"{said} in rows of {', '.join(str(k) for k in sorted(columns) if k % 256)} columns, whatever the group size"
    if config.bits == 2 and config.symmetric and config.group_size % 64 == 0:
        said += " (Q2_0 would take 2.25, but gguf-py 0.19 cannot read a file that contains it)"
    symmetric = config.symmetric or config.bits == 3
    cheaper = grid_home(config.bits, symmetric, 256, portable=True, ternary=config.symmetric)
    flags = "--sym --group-size -1" if symmetric else "--group-size -1"
    return f"{said}; {flags} (or groups of 256) costs {TYPES[cheaper].bits_per_weight:g} in {cheaper}"
