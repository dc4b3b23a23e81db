"""Which block type each tensor of a K-quant mix gets: llama.cpp's recipes for dense decoders, our overrides on top.

A mix (`Q4_K_M`) names a base type and gives some tensors more bits: value and output projections and `ffn_down`, in all
layers or in the first and last eighth and every third between. Rows that a type's blocks do not divide fall back to a
type of 32-blocks, and to F16 where not even those fit (llama.cpp b11549, src/llama-quant.cpp; a table made by
llama-quantize itself stands in the tests).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vlmq_export.errors import UsageError
from vlmq_export.formats.base import ModelPlan
from vlmq_export.formats.gguf.names import text_shapes, text_to_hub
from vlmq_export.formats.gguf.params import text_params
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.kquants import GRIDS

# mix → type of every tensor that no rule names
MIXES = {
    "Q2_K_S": "Q2_K", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1",
    "Q8_0": "Q8_0", "TQ2_0": "TQ2_0", "Q2_0": "Q2_0",
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# general.file_type of a file made by a mix
FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "TQ2_0": 37, "Q2_0": 41,
}  # fmt: skip
FALLBACK = {"Q2_0": "Q4_0", "TQ2_0": "Q4_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
            "Q6_K": "Q8_0"}  # fmt: skip

_BUDGET = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # what --target-bpw chooses from


@dataclass(frozen=True)
class Tensor:
    """What the choice depends on."""

    name: str  # GGUF: blk.3.ffn_down.weight
    columns: int


@dataclass(frozen=True)
class Shape:
    """Of the decoder."""

    layers: int
    heads: int
    kv_heads: int
    tied: bool


def module_types(model: ModelPlan, mix: str, given: Iterable[str] = ()) -> dict[str, str]:
    """Hub module → type for every matrix of the language model. Raises UsageError for overrides that make no sense."""
    p = text_params(model.source_config)
    hub = text_to_hub(model.source_config)
    shape = Shape(p.layers, p.heads, p.kv_heads, p.tied)
    matrices = [Tensor(name, s[1]) for name, s in text_shapes(p).items() if len(s) == 2]
    types = tensor_types(mix, matrices, shape, parse_overrides(given))
    return {hub[name].removesuffix(".weight"): kind for name, kind in types.items()}


def module_choices(model: ModelPlan, given: Iterable[str] = ()) -> dict[str, dict[str, int]]:
    """Hub module → type → bits of the whole matrix: the types that a budget may choose from, or the overriding one alone."""
    p, hub, overrides = text_params(model.source_config), text_to_hub(model.source_config), parse_overrides(given)
    choices = {}
    for name, shape in text_shapes(p).items():
        if len(shape) != 2:
            continue
        manual = next((kind for pattern, kind in overrides if pattern.search(name)), None)
        candidates = [manual] if manual else _BUDGET if shape[1] % 256 == 0 else ("Q4_0", "Q5_0", "Q5_1", "Q8_0")
        kinds = [fallback(kind, shape[1]) for kind in candidates]
        choices[hub[name].removesuffix(".weight")] = {k: 8 * shape[0] * TYPES[k].row_bytes(shape[1]) for k in kinds}
    return choices


def mix_named(name: str) -> str:
    """The mix in llama.cpp's spelling, in any case. Raises UsageError listing the names."""
    known = ALIASES.get(name.upper(), name.upper())
    if known not in MIXES:
        raise UsageError(f"--gguf-type {name} is not known; choose one of {', '.join([*MIXES, *ALIASES])}")
    return known


def parse_overrides(given: Iterable[str]) -> list[tuple[re.Pattern, str]]:
    """`regex=TYPE` options in order. Raises UsageError for one that is no such thing."""
    overrides = []
    for text in given:
        pattern, _, kind = text.rpartition("=")
        if not pattern or kind.upper() not in GRIDS:
            raise UsageError(f"--tensor-type {text}: give regex=TYPE with one of {', '.join(GRIDS)}")
        try:
            overrides.append((re.compile(pattern), kind.upper()))
        except re.error as e:
            raise UsageError(f"--tensor-type {text}: not a regular expression ({e})") from None
    return overrides


def tensor_types(
    mix: str, tensors: Iterable[Tensor], shape: Shape, overrides: Iterable[tuple[re.Pattern, str]] = ()
) -> dict[str, str]:
    """GGUF name → type for matrices of the text model. The first override whose regex is found in the name wins."""
    overrides = list(overrides)
    chosen = {}
    for t in tensors:
        manual = next((kind for pattern, kind in overrides if pattern.search(t.name)), None)
        chosen[t.name] = fallback(manual or _by_rule(mix, t, shape), t.columns)
    return chosen


def fallback(kind: str, columns: int) -> str:
    """The type itself where its blocks divide the row, else the one that llama.cpp takes instead."""
    for candidate in (kind, FALLBACK.get(kind, kind)):
        if columns % TYPES[candidate].block == 0:
            return candidate
    return "F16"


def _more_bits(layer: int, layers: int) -> bool:
    """The layers that the _M mixes favour: the first and the last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _by_rule(mix: str, t: Tensor, shape: Shape) -> str:
    base = MIXES[mix]
    if t.name == "output.weight" or (t.name == "token_embd.weight" and shape.tied):
        return "Q8_0" if base == "Q8_0" or t.columns % TYPES[base].block else "Q6_K"
    if t.name == "token_embd.weight" and base in ("TQ2_0", "Q2_0"):
        return "Q4_K"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", t.name)
    if match is None:
        return base
    layer, part = int(match[1]), match[2]
    rule = _RULES.get(part)
    return rule(mix, base, layer, shape) if rule else base


def _attn_v(mix: str, base: str, layer: int, shape: Shape) -> str:
    wide = shape.heads // shape.kv_heads >= 4
    if mix == "Q2_K":
        return "Q4_K" if wide else "Q3_K"
    if mix == "Q2_K_S":
        return "Q4_K" if wide else base
    if mix == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < 4):
        return "Q5_K"
    return "Q6_K" if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, shape.layers) else base


def _attn_output(mix: str, base: str, _layer: int, _shape: Shape) -> str:
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, base)


def _ffn_down(mix: str, base: str, layer: int, shape: Shape) -> str:
    early = layer < shape.layers // 8
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q2_K_S":
        return "Q4_K" if early else base
    if mix == "Q3_K_M":
        return "Q5_K" if layer < shape.layers // 16 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and early):
        return "Q5_K"
    return "Q6_K" if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, shape.layers) else base


_RULES = {"attn_v": _attn_v, "attn_output": _attn_output, "ffn_down": _ffn_down}
