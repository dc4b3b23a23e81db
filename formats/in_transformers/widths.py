"""How a folder says which linears have which grid: regular expressions over their names.

Programs name a linear as the hub does, as transformers does, or in their own way, and those that
fuse q, k and v, or gate and up, look for the fused name. One expression names them all:

    .*model\\.layers\\.(0|3|5)\\.self_attn\\.(q_proj|k_proj|v_proj|qkv_proj)$

The layers of a vision tower do not match, as they follow another name than `model`. Its own
expressions begin with the name of the tower, and let some names be between:

    .*visual\\.(.*\\.)?blocks\\.(0|1|2)\\.mlp\\.(gate_proj|gate_up_proj)$
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from vlmq_export.quantizer.model.families import Family, groups_of

# Last names of linears with one input → the linear that programs fuse them to.
_FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
    ("gate_proj", "up_proj"): "gate_up_proj",
}


def width_patterns(widths: Mapping[str, int], family: Family) -> dict[int, list[str]]:
    """Bits → the expressions that together name the linears of this width, from the fewest bits on.

    widths: hub module → bits.
    """
    layers: dict[int, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    count = len({name.removeprefix(family.layers).partition(".")[0] for name in widths})
    kinds = dict.fromkeys(group for chain in family.chains for group in groups_of(chain))
    for layer in range(count):
        for group in (g for g in kinds if f"{family.layers}{layer}.{g[0]}" in widths):
            alike: dict[int, list[str]] = defaultdict(list)
            for name in group:
                alike[widths[f"{family.layers}{layer}.{name}"]].append(name)
            for bits, names in alike.items():
                layers[bits][tuple(names)].append(str(layer))
    return {
        bits: [_pattern(names, found) for names, found in groups.items()]
        for bits, groups in sorted(layers.items())
    }


def _pattern(names: tuple[str, ...], layers: list[str]) -> str:
    """The expression of linears with one input, by their names in a layer, in some layers."""
    return rf".*model\.layers\.({'|'.join(layers)})\.{_alternatives(names)}$"


def _alternatives(names: tuple[str, ...]) -> str:
    """The end of an expression for linears of one module, with the name that they are fused to."""
    parent = names[0].rpartition(".")[0].replace(".", r"\.")
    ends = tuple(name.rpartition(".")[2] for name in names)
    if fused := _FUSED.get(ends):
        ends = (*ends, fused)
    return rf"{parent}\.({'|'.join(ends)})"


def kept_patterns(family: Family) -> list[str]:
    """The expressions that together name the linears of the decoder layers that stay floats."""
    return [
        rf"re:.*layers\.(.*\.)?{_alternatives(block.kept)}$"
        for block in family.every_block
        if block.kept
    ]


def tower_patterns(modules: Iterable[str], family: Family) -> list[str]:
    """The expressions that together name these modules of a vision tower and its projector.

    modules: hub names.
    """
    fused = {name: one for names, one in _FUSED.items() for name in names}
    numbers: dict[str, list[str]] = {}  # expression with a place for numbers → these
    for module in modules:
        (prefix,) = (p for p in family.vision if module.startswith(p))
        root = prefix.rstrip(".").rpartition(".")[2]
        parts = family.module_name(module).partition(f"{root}.")[2].split(".")
        number = next((part for part in parts if part.isdigit()), "")
        if number:
            parts[parts.index(number)] = "{}"
        if also := fused.get(parts[-1]):
            parts[-1] = f"({parts[-1]}|{also})"
        tail = r"\.".join(parts)
        numbers.setdefault(rf"re:.*{root}\.(.*\.)?{tail}$", []).append(number)
    return [form.replace("{}", f"({'|'.join(found)})") for form, found in numbers.items()]
