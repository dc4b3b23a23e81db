"""manifest.json: what an artifact says of itself, and what no artifact of ours can say."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from vlmq_export.quantizer.config import (
    ACT_ORDERS,
    BITS,
    EMBEDDING_TYPES,
    VISION_TYPES,
    QuantConfig,
)
from vlmq_export.quantizer.grids.blocks import GRIDS, Params
from vlmq_export.quantizer.grids.linears import BlockLinear, Linear, QuantizedLinear
from vlmq_export.quantizer.grids.solutions import BlockSolution, Solution

SCHEMA = 1  # of manifest.json; readers refuse any other
OUTER = -1  # the "layer" of an embedding
VISION = -2  # that of the vision tower and the projector
MANIFEST = "manifest.json"
TIMING = "timing.json"  # kept apart, so that every other file has the same bytes in every run
ERRORS = ("relative_error", "nearest_error", "weight_error")  # metrics that the report draws
_HUB_NAME = re.compile(r"([\w.-]+(/[\w.-]+)?)?", re.ASCII)  # also that of a commit or a branch
# Part of a linear → dtype (safetensors' spelling) and shape.
Stored = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class ModuleRecord:
    """What the manifest says of one linear, embedding or output matrix."""

    name: str  # hub name
    # OUTER for an embedding, VISION for the vision tower and the projector. The output head's
    # number follows the last decoder layer's.
    layer: int
    bits: int
    group_size: int
    symmetric: bool
    out_features: int
    in_features: int
    bias: bool
    metrics: dict = field(default_factory=dict)  # loss, relative error, damping used, fallback
    type: str = ""  # a GGUF block type; empty for the affine grid
    energy: bool = False  # whether calibration left the energy of its inputs

    @classmethod
    def of(cls, linear: Linear, layer: int, metrics: dict) -> ModuleRecord:
        """The record of a linear that was solved."""
        if isinstance(linear, BlockLinear):
            grid = linear.solution.grid
            spec = grid.bits, grid.sub_block, not grid.affine, linear.type
        else:
            spec = linear.bits, linear.group_size, linear.symmetric, ""
        bits, group_size, symmetric, block_type = spec
        return cls(
            name=linear.name,
            layer=layer,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            out_features=linear.out_features,
            in_features=linear.in_features,
            bias=linear.bias is not None,
            metrics=metrics,
            type=block_type,
            energy=linear.energy is not None,
        )

    @property
    def groups(self) -> int:
        """The number of groups in a row of an affine grid."""
        return 1 if self.group_size == -1 else -(-self.in_features // self.group_size)

    def packed_bits(self) -> float:
        """Bits that codes, scales and zero-points take once packed.

        A scale has 16 bits and a zero-point as many as a code. In the artifact a code takes a byte.
        """
        if self.type:
            return self.out_features * self.in_features * GRIDS[self.type].bits_per_weight
        return self.out_features * (self.in_features * self.bits + self.groups * (16 + self.bits))

    def stored(self) -> Stored:
        """Dtype and shape of each of its tensors, by the name of the part."""
        rows = self.out_features
        parts: Stored = {"codes": ("U8", (rows, self.in_features))}
        if self.type:
            grid = GRIDS[self.type]
            blocks, subs = self.in_features // grid.block, self.in_features // grid.sub_block
            parts |= {"d": ("F16", (rows, blocks)), "sub_scales": ("I8", (rows, subs))}
            if grid.affine:
                parts |= {"dmin": ("F16", (rows, blocks)), "sub_mins": ("U8", (rows, subs))}
        else:
            parts["scales"] = "F16", (rows, self.groups)
            parts["zero_points"] = "U8", (rows, self.groups)
            parts["g_idx"] = "I32", (self.in_features,)
        if self.bias:
            parts["bias"] = "F16", (rows,)
        if self.energy:
            parts["energy"] = "F32", (self.in_features,)
        return parts

    def linear(self, read: Callable[[str], torch.Tensor]) -> Linear:
        """The linear itself. `read` gives a stored tensor by name: `…mlp.up_proj.codes`."""

        def part(key: str) -> torch.Tensor:
            return read(f"{self.name}.{key}")

        bias, energy = part("bias") if self.bias else None, part("energy") if self.energy else None
        if self.type:
            grid = GRIDS[self.type]
            params = Params(part("d"), part("sub_scales").to(torch.int16))
            if grid.affine:
                mins = part("sub_mins").to(torch.int16)
                params = Params(params.d, params.scales, part("dmin"), mins)
            return BlockLinear(self.name, BlockSolution(grid, part("codes"), params), bias, energy)
        solution = Solution(part("codes"), part("scales"), part("zero_points"), part("g_idx"))
        return QuantizedLinear(
            self.name, solution, bias, self.bits, self.group_size, self.symmetric, energy
        )


@dataclass
class Manifest:
    """manifest.json. A folder that has one is a whole artifact."""

    schema: int
    version: str  # of vlmq-export
    name: str  # of the model, for file names and cards
    model_type: str
    source: dict[str, str]  # file of the source checkpoint → SHA-256
    config: dict  # QuantConfig as a dict
    calibration: dict  # the file and its hash, rows used and dropped, tokens
    modules: list[ModuleRecord]
    phases: dict = field(default_factory=dict)  # kept for the schema; nothing fills it
    repository: str = ""  # of the source on the hub, ORG/NAME; empty where it is from none
    revision: str = ""  # the commit of that repository


def layer_file(index: int) -> str:
    """The file of one layer's integers. `index` is that of ModuleRecord.layer."""
    names = {OUTER: "outer", VISION: "vision"}
    return f"layer-{names.get(index) or f'{index:05d}'}.safetensors"


def changed_file(index: int) -> str:
    """The file of a decoder layer's norms that took a scale and so differ from the source's."""
    return f"float-changed-{index:05d}.safetensors"


def manifest_problems(m: Manifest, config: QuantConfig) -> list[str]:
    """What a manifest says that no artifact of ours can say, in words; empty if nothing.

    A manifest is a file like any other, and may be damaged or hostile.
    """
    problems: list[str] = []
    name = m.name if isinstance(m.name, str) else ""
    if not name.strip(".") or set(name) & set("/\\") or not name.isprintable():
        problems.append(f"name {m.name!r} is no file name")  # output files are named after it
    for said in (m.repository, m.revision):
        if not isinstance(said, str) or not _HUB_NAME.fullmatch(said):
            problems.append(f"repository or revision {said!r}, which the hub cannot have")
    dicts = all(isinstance(x, dict) for x in (m.source, m.calibration, m.phases))
    if not isinstance(m.model_type, str) or not dicts:
        problems.append("model_type, source, calibration or phases of another type")
    known = config.head_bits in (0, *BITS) and _is_tower(config)
    known = known and isinstance(config.vision_short, bool)
    known = known and config.embedding_bits in (0, *EMBEDDING_TYPES)
    known = known and isinstance(config.method, str)
    known = known and isinstance(config.act_order, str) and config.act_order in ACT_ORDERS
    known = known and type(config.tune) is int and config.tune >= 0
    known = known and type(config.smooth) is bool
    if not known or not _is_grid(config):
        problems.append(
            f"a recipe of {config.bits} bits in groups of {config.group_size},"
            f" order {config.act_order}"
        )
    names: set[str] = set()
    if not _are_widths(config.widths, {str(record.name) for record in m.modules}):
        problems.append("widths that are no bits of its linears")
    for record in m.modules:
        problems += _record_problems(record, names, short=config.vision_short)
        names.add(str(record.name))
    return problems if m.modules else [*problems, "no linears"]


def _record_problems(r: ModuleRecord, names: set[str], *, short: bool) -> list[str]:
    """The first problem of one record, if any. `names` are those of the records before it.

    short: whether the last group of a row of the vision tower may be shorter than the others.
    """
    sizes = (r.layer, r.out_features, r.in_features)
    if not isinstance(r.name, str) or r.name in names:
        return [f"linear {r.name!r} twice"]
    if not all(type(n) is int and VISION <= n < 2**31 for n in sizes) or min(sizes[1:]) < 1:
        return [f"{r.name} has layer and shape {sizes}"]
    if not _fits(r, short=short and r.layer == VISION):
        grid = r.type or f"{r.bits} bits in groups of {r.group_size}"
        return [f"{r.name} has {r.in_features} columns of {grid}"]
    flags = isinstance(r.bias, bool) and isinstance(r.energy, bool)
    if not flags or not isinstance(r.metrics, dict):
        return [f"{r.name} has bias {r.bias!r}, energy {r.energy!r} or metrics that are none"]
    errors = [r.metrics.get(key, 0.0) for key in ERRORS]
    if not all(isinstance(x, float) or (type(x) is int and abs(x) < 2**53) for x in errors):
        return [f"{r.name} has errors that are no numbers"]
    return []


def _fits(r: ModuleRecord, *, short: bool) -> bool:
    """Whether the columns of a matrix fall into groups of a grid that there is.

    short: whether the last group may be shorter.
    """
    if r.type:
        known = isinstance(r.type, str) and r.type in GRIDS
        return known and r.in_features % GRIDS[r.type].block == 0
    return _is_grid(r) and (short or r.group_size == -1 or r.in_features % r.group_size == 0)


def _are_widths(widths: object, names: Collection[str]) -> bool:
    """Whether this maps linears of the artifact to widths that an affine grid can have."""
    if not isinstance(widths, dict) or not widths.keys() <= {*names}:
        return False
    return all(type(bits) is int and bits in BITS for bits in widths.values())


def _is_tower(config: QuantConfig) -> bool:
    """Whether width and block type of the vision tower are values that it can have together."""
    bits, kind = config.vision_bits, config.vision_type
    if type(bits) is not int:
        return False
    return kind == VISION_TYPES.get(bits, ("",))[0] if kind else bits in (0, *BITS)


def _is_grid(g: QuantConfig | ModuleRecord) -> bool:
    """Whether width, group size and symmetry are values that an affine grid can have."""
    if [type(x) for x in (g.bits, g.group_size, g.symmetric)] != [int, int, bool]:
        return False
    return g.bits in BITS and (g.group_size == -1 or g.group_size >= 1)
