"""Which block type each tensor of a mix gets: llama.cpp's recipes for dense decoders.

A mix (`Q4_K_M`) names a base type. Its rules give some tensors more bits: value and output
projections and `ffn_down`, in all layers, or in the first and last eighth of them and every third
between. Options of the user override the rules. Where the blocks of a type do not divide a row, a
type of 32-blocks takes its place, and F16 where not even those fit.

Source: src/llama-quant.cpp of llama.cpp b11549. The tests hold this module against a table that
llama-quantize itself made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vlmq_export.errors import UsageError
from vlmq_export.formats.gguf.tables.layout import Layout, Place
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.formats.model_plan import ModelPlan
from vlmq_export.quantizer.grids.blocks import GRIDS

# Mix → its base type: that of every tensor that no rule names.
MIXES = {
    "Q2_K_S": "Q2_K",
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q8_0": "Q8_0",
    "TQ2_0": "TQ2_0",
    "Q2_0": "Q2_0",
    "IQ2_XXS": "IQ2_XXS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS",
    "IQ3_XS": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
}
# Other name of a mix → the mix.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# Mix → general.file_type of a file that it made.
FILE_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "Q2_K_S": 21,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "TQ2_0": 37,
    "Q2_0": 41,
}
_LATTICES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
# Type → the type that takes its place in rows that its blocks do not divide.
FALLBACK = {
    "Q2_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys((*_LATTICES, "IQ4_XS"), "IQ4_NL"),
}

# The types that --target-bpw chooses from, in rows of whole super-blocks and in others. Lattices
# are among them only below so many bits per weight: above, they are hardly ever chosen, and take
# long to solve. An embedding is never on one: a whole vocabulary of points takes too long.
_BUDGET = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_BUDGET_LATTICES = ("IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S")
_LATTICES_BELOW = 4.0
_NARROW_BUDGET = ("Q4_0", "Q5_0", "Q5_1", "Q8_0")


@dataclass(frozen=True)
class Tensor:
    """What the choice for a tensor depends on."""

    name: str  # GGUF name: blk.3.ffn_down.weight
    columns: int  # of a row, or of a head where llama.cpp has heads in another order


@dataclass(frozen=True)
class Shape:
    """What the choice depends on in the decoder."""

    layers: int
    heads: int
    kv_heads: int
    tied: bool  # whether the output matrix is the embedding


Overrides = list[tuple[re.Pattern[str], str]]  # the first whose regex is found in a name wins


def module_types(model: ModelPlan, mix: str, given: Iterable[str] = ()) -> dict[str, str]:
    """Hub name of a module → type, for every matrix of the language model.

    given: options of the form `regex=TYPE`. Raises UsageError for one that makes no sense.
    """
    layout = Layout.of(model.architecture)
    p = layout.text_params
    shape = Shape(p.layers, p.heads, p.kv_heads, p.tied)
    matrices = [Tensor(n, x.run) for n, x in layout.text.items() if _takes_blocks(n, x)]
    types = tensor_types(mix, matrices, shape, parse_overrides(given))
    return {
        hub.removesuffix(".weight"): kind
        for name, kind in types.items()
        for hub in layout.text[name].hubs
    }


def module_choices(
    model: ModelPlan, target_bpw: float, given: Iterable[str] = ()
) -> dict[str, dict[str, int]]:
    """Hub name of a module → type → bits of the whole matrix, for every matrix.

    The types are those that a budget of `target_bpw` bits per weight may choose from, or the one
    that an option names.

    given: options of the form `regex=TYPE`. Raises UsageError for one that makes no sense.
    """
    overrides = parse_overrides(given)
    choices = {}
    for name, place in Layout.of(model.architecture).text.items():
        if not _takes_blocks(name, place):
            continue
        rows, columns = place.shape
        candidates = _BUDGET if place.run % 256 == 0 else _NARROW_BUDGET
        if candidates is _BUDGET and target_bpw < _LATTICES_BELOW and name != "token_embd.weight":
            candidates = (*_BUDGET_LATTICES, *_BUDGET)
        if manual := _overridden(name, overrides):
            candidates = (manual,)
        kinds = [fallback(kind, place.run) for kind in candidates]
        bits = {kind: 8 * rows * TYPES[kind].row_bytes(columns) for kind in kinds}
        choices[place.hub.removesuffix(".weight")] = bits
    return choices


def _takes_blocks(name: str, place: Place) -> bool:
    """Whether a tensor of the language model gets a block type."""
    return place.linear or name == "token_embd.weight"


def mix_named(name: str) -> str:
    """The mix in llama.cpp's spelling, from its name or alias in any case.

    Raises UsageError that lists the names for one that is not known.
    """
    known = ALIASES.get(name.upper(), name.upper())
    if known not in MIXES:
        raise UsageError(
            f"--gguf-type {name} is not known; choose one of {', '.join([*MIXES, *ALIASES])}"
        )
    return known


def parse_overrides(given: Iterable[str]) -> Overrides:
    """Options of the form `regex=TYPE`, in order. Raises UsageError for one of another form."""
    overrides = []
    for text in given:
        pattern, _, kind = text.rpartition("=")
        if not pattern or kind.upper() not in GRIDS:
            raise UsageError(
                f"--tensor-type {text}: give regex=TYPE with one of {', '.join(GRIDS)}"
            )
        try:
            overrides.append((re.compile(pattern), kind.upper()))
        except re.error as e:
            raise UsageError(f"--tensor-type {text}: not a regular expression ({e})") from None
    return overrides


def tensor_types(
    mix: str,
    tensors: Iterable[Tensor],  # the matrices of the language model
    shape: Shape,
    overrides: Iterable[tuple[re.Pattern[str], str]] = (),
) -> dict[str, str]:
    """GGUF name → type."""
    overrides = list(overrides)
    chosen = {}
    for t in tensors:
        kind = _overridden(t.name, overrides) or _by_rule(mix, t, shape)
        chosen[t.name] = fallback(kind, t.columns)
    return chosen


def _overridden(name: str, overrides: Overrides) -> str | None:
    """The type that the options give a tensor, or None."""
    return next((kind for pattern, kind in overrides if pattern.search(name)), None)


def fallback(kind: str, columns: int) -> str:
    """The type itself where its blocks divide the row, else the one that llama.cpp takes."""
    for candidate in (kind, FALLBACK.get(kind, kind)):
        if columns % TYPES[candidate].block == 0:
            return candidate
    return "F16"


def _by_rule(mix: str, t: Tensor, shape: Shape) -> str:
    """The type that llama.cpp's rules give a tensor."""
    base = MIXES[mix]
    if t.name == "output.weight" or (t.name == "token_embd.weight" and shape.tied):
        if base == "Q8_0" or t.columns % TYPES[base].block:
            return "Q8_0"
        return "Q5_K" if mix in (*_IQ2, "IQ3_XXS") else "Q6_K"
    if t.name == "token_embd.weight":
        return _EMBEDDINGS.get(mix, base)
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", t.name)
    if match is None:
        return base
    rule = _RULES.get(match[2].removesuffix("_exps"))
    return rule(mix, base, int(match[1]), shape) if rule else base


# Mixes whose base has two bits on a lattice → the type of what gets more.
_IQ2 = {"IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
# Mix → the type of an embedding that is not the output matrix, where it is not the base.
_EMBEDDINGS = _IQ2 | {"IQ3_XXS": "IQ3_S", "TQ2_0": "Q4_K", "Q2_0": "Q4_K"}


def _more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is in the first or last eighth, or every third between: the _M mixes."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _attn_v(mix: str, base: str, layer: int, shape: Shape) -> str:
    wide = shape.heads // shape.kv_heads >= 4
    if mix in _IQ2:
        return "Q4_K" if wide else _IQ2[mix]
    if mix == "Q2_K":
        return "Q4_K" if wide else "Q3_K"
    if mix in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"):
        return "Q4_K" if wide else base
    if mix in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if wide else base
    if mix == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mix == "IQ3_M":
        return "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < 4):
        return "Q5_K"
    return "Q6_K" if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, shape.layers) else base


def _attn_output(mix: str, base: str, _layer: int, _shape: Shape) -> str:
    return {
        "Q2_K": "Q3_K",
        "Q3_K_M": "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ2_S": "IQ3_S",
        "IQ2_M": "IQ3_S",
        "IQ3_XXS": "IQ3_S",
        "IQ3_M": "Q4_K",
    }.get(mix, base)


def _attn_q_or_k(mix: str, base: str, _layer: int, _shape: Shape) -> str:
    return {"IQ3_XXS": "IQ2_S", "IQ3_XS": "IQ3_XXS"}.get(mix, base)


def _ffn_in(mix: str, base: str, layer: int, shape: Shape) -> str:
    middle = shape.layers // 8 <= layer < 7 * shape.layers // 8
    return "IQ3_XXS" if mix == "IQ3_XS" and middle else base


def _ffn_down(mix: str, base: str, layer: int, shape: Shape) -> str:
    early = layer < shape.layers // 8
    if mix in _IQ2:
        return _IQ2[mix] if early else base
    if mix == "Q2_K":
        return "Q3_K"
    if mix in ("Q2_K_S", "IQ3_M"):
        return "Q4_K" if early else base
    if mix == "Q3_K_M":
        return "Q5_K" if layer < shape.layers // 16 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and early):
        return "Q5_K"
    return "Q6_K" if mix in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, shape.layers) else base


# Part of a layer → its rule, a function of the mix, its base type, the layer and the shape.
_RULES = {
    "attn_q": _attn_q_or_k,
    "attn_k": _attn_q_or_k,
    "attn_v": _attn_v,
    "attn_qkv": _attn_v,
    "attn_output": _attn_output,
    "ffn_gate": _ffn_in,
    "ffn_up": _ffn_in,
    "ffn_down": _ffn_down,
}
