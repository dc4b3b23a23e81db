"""Reads the quantization_config of a GPTQ checkpoint that another program made.

Two layouts are known: GPTQ's own, and the format `pack-quantized` of compressed-tensors, in which
llm-compressor exports its GPTQ results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.config import BITS
from vlmq_export.quantizer.storage.untrusted import contained, read_json

# Layout → the tensors that take the place of `X.weight`. The first of them holds the codes.
PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "pack-quantized": (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
    ),
}
# Makes the error of a reason, and of what to do about it.
Refuse = Callable[..., CheckpointError]


@dataclass(frozen=True)
class Scheme:
    """One grid for every linear, and how it lies in the files."""

    layout: str  # a key of PARTS
    bits: int
    group_size: int  # −1: one scale per output channel
    symmetric: bool
    zero_offset: int  # added to a stored zero-point; 1 in GPTQ v1
    meta: dict  # what the maker states of itself and of its method

    @property
    def maker(self) -> str:
        """The program that made the checkpoint, or the layout if none is named."""
        made = self.meta.get("quantizer", self.layout)
        return ", ".join(made) if isinstance(made, list) else str(made)


def quantization_of(folder: Path) -> dict | None:
    """The quantization_config of a model folder, or None for a float checkpoint."""
    for file, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        try:
            value = read_json(contained(folder, file)) if (folder / file).is_file() else {}
        except (CheckpointError, ValueError):
            continue  # the reader of the model says what is wrong with the file
        value = value.get(key) if key else value
        if isinstance(value, dict) and value:
            return value
    return None


def scheme_of(q: dict, where: Path) -> Scheme:
    """The scheme that a quantization_config describes.

    Raises CheckpointError, with the reason, for what cannot become an artifact without loss.
    """

    def refuse(why: str, do: str = "give the original float checkpoint") -> CheckpointError:
        return CheckpointError(f"{where}: {why}; {do}")

    kind = str(q.get("quant_method", "gptq"))
    if kind == "compressed-tensors":
        return _pack_quantized(q, refuse)
    if kind != "gptq":
        raise refuse(f"already quantized by {kind}, and only GPTQ's integers can be taken over")
    return _gptq(q, refuse)


def _gptq(q: dict, refuse: Refuse) -> Scheme:
    """The scheme of AutoGPTQ's or GPTQModel's quantization_config."""
    version = str(q.get("checkpoint_format", q.get("format", "gptq")))
    if version == "marlin" or q.get("is_marlin_format"):
        raise refuse(
            "its weights are shuffled for the Marlin kernel",
            "give the checkpoint before that conversion",
        )
    if version not in ("gptq", "gptq_v2"):
        raise refuse(f"checkpoint_format {version} is not gptq or gptq_v2")
    if q.get("pack_dtype", "int32") != "int32":
        raise refuse(f"packed in {q['pack_dtype']}, GPTQ readers take int32")
    rules = q.get("dynamic") or {}
    # A rule that starts with "-:" leaves modules in float. Any other gives them a grid.
    own = [r for r in rules if not str(r).startswith("-:")] if isinstance(rules, dict) else [rules]
    if own:
        raise refuse(
            f"dynamic rule {own[0]} gives modules a grid of their own, an artifact has one grid"
        )
    if q.get("lm_head"):
        raise refuse("its lm_head is quantized, an artifact keeps it in float")
    # AutoGPTQ states these outside of `meta`.
    stated = {k: q[k] for k in ("damp_percent", "static_groups") if k in q}
    return _checked(
        refuse,
        layout="gptq",
        bits=q.get("bits"),
        group_size=q.get("group_size", -1),
        symmetric=bool(q.get("sym", True)),
        zero_offset=1 if version == "gptq" else 0,
        meta=stated | (q["meta"] if isinstance(q.get("meta"), dict) else {}),
    )


def _pack_quantized(q: dict, refuse: Refuse) -> Scheme:
    """The scheme of a quantization_config of compressed-tensors."""
    if q.get("format") != "pack-quantized":
        raise refuse(f"compressed-tensors format {q.get('format')} does not hold GPTQ's integers")
    groups = q.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    group = groups[0] if len(groups) == 1 else None
    w = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(w, dict):
        raise refuse(f"{len(groups)} config_groups, an artifact has one grid")
    for other in ("input_activations", "output_activations"):
        if group.get(other):
            raise refuse(f"it quantizes {other.replace('_', ' ')} too")
    for other in ("kv_cache_scheme", "transform_config"):
        if q.get(other):
            raise refuse(f"its {other} changes what the model computes")
    if w.get("type", "int") != "int" or w.get("strategy") not in ("group", "channel"):
        raise refuse(
            f"weights of type {w.get('type')} by {w.get('strategy')},"
            " GPTQ has integers by group or channel"
        )
    static = w.get("actorder") in ("weight", "static")
    return _checked(
        refuse,
        layout="pack-quantized",
        bits=w.get("num_bits"),
        group_size=w.get("group_size") if w["strategy"] == "group" else -1,
        symmetric=bool(w.get("symmetric", True)),
        zero_offset=0,
        meta={"quantizer": "compressed-tensors", "static_groups": static},
    )


def _checked(refuse: Refuse, *, bits: Any, group_size: Any, **fields: Any) -> Scheme:
    """The scheme, if its bits and its group size are such numbers."""
    if type(bits) is not int or bits not in BITS:
        raise refuse(f"bits {bits}, and only {', '.join(map(str, BITS))} are known here")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise refuse(f"group_size {group_size} is not a number of columns nor -1")
    return Scheme(bits=bits, group_size=group_size, **fields)
