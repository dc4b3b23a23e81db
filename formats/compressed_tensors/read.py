"""Reads a compressed-tensors folder. Nothing here is shared with the writer and the library."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.in_transformers.read import QuantizedFolder, named_linears, unpack

_BITS = (2, 3, 4, 5, 6, 7, 8)
_HEAD = "lm_head"
# What a target may be, beside the expressions of `named_linears` and of a tower.
_CLASS, _HEAD_TARGET, _NAMES = "Linear", r"re:.*lm_head", "re:"
_LAYERS = r"re:.*model\.layers\..*_proj$"
_PART = r"(?:\w+|\(\w+(?:\|\w+)*\))"  # of a name, or one of several
_TOWER = re.compile(
    rf"re:\.\*(?P<root>\w+)\\\.(?:\.\*|\(\.\*\\\.\)\?(?P<parts>{_PART}(?:\\\.{_PART})*)\$)"
)


@dataclass(frozen=True)
class Grid:
    """The grid of some linears, as config.json states it."""

    bits: int
    symmetric: bool
    group_size: int  # −1: one scale an output channel


@dataclass(frozen=True)
class TowerPart:
    """Modules of a vision tower that an expression stands for. It is never run."""

    root: str  # name of the tower
    parts: tuple[frozenset[str], ...]  # what the last parts of a name may be; empty: all below root

    @classmethod
    def of(cls, pattern: str) -> TowerPart | None:
        """None for an expression of another form."""
        if not (found := _TOWER.fullmatch(pattern)):
            return None
        said = found["parts"].split("\\.") if found["parts"] else []
        return cls(found["root"], tuple(frozenset(one.strip("()").split("|")) for one in said))

    def holds(self, module: str) -> bool:
        """Whether it stands for a module, by its name in the file."""
        names = module.split(".")
        above, ends = names, list[str]()
        if self.parts:
            above, ends = names[: -len(self.parts)], names[-len(self.parts) :]
        return self.root in above and all(name in some for name, some in zip(ends, self.parts))


class CompressedFolder(QuantizedFolder):
    """A written folder in the layout `pack-quantized`."""

    title, format, method = "compressed-tensors", "compressed-tensors", "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

    def _read_grid(self) -> None:
        q = self.quantization
        groups = q.get("config_groups")
        stated = list(groups.values()) if isinstance(groups, dict) else []
        if q.get("format") != "pack-quantized" or not 1 <= len(stated) <= len(_BITS) + 1:
            raise FormatError(
                f"{self.path}: format {q.get('format')} with {len(stated)} config_groups is not"
                " readable here"
            )
        self.groups = [(self._grid(group), self._targets(group)) for group in stated]
        ignored = q.get("ignore")
        stays = [TowerPart.of(str(one)) for one in ignored] if isinstance(ignored, list) else []
        self._floats = [part for part in stays if part]

    @property
    def grids(self) -> set[Grid]:
        """The different grids of the file."""
        return {grid for grid, _ in self.groups}

    def _targets(self, group: dict) -> set[str | TowerPart]:
        """What a config group is for: a class, `lm_head`, all layers, linears in the layers by
        their names, and parts of a tower.

        Raises FormatError for a target that this program does not write.
        """
        targets, found = group.get("targets"), set[str | TowerPart]()
        for target in targets if isinstance(targets, list) else [None]:
            said = str(target)
            names = named_linears(said.removeprefix(_NAMES)) if said.startswith(_NAMES) else None
            if said in (_CLASS, _HEAD_TARGET, _LAYERS):
                found.add(said)
            elif names is not None:
                found |= names
            elif part := TowerPart.of(said):
                found.add(part)
            else:
                raise FormatError(f"{self.path}: the target {said[:80]!r} is not readable here")
        return found

    def _grid(self, group: Any) -> Grid:
        """The grid of a config group. Raises FormatError for one that is no grid of integers."""
        w = group.get("weights") if isinstance(group, dict) else None
        w = w if isinstance(w, dict) else {}
        bits, symmetric = w.get("num_bits"), w.get("symmetric")
        strategy, size = w.get("strategy"), w.get("group_size")
        size = -1 if strategy == "channel" else size
        if (
            strategy not in ("group", "channel")
            or type(bits) is not int
            or bits not in _BITS
            or type(symmetric) is not bool
            or type(size) is not int
            or (size < 1 and strategy == "group")
        ):
            raise FormatError(
                f"{self.path}: weights of {bits} bits by {w.get('strategy')} in groups of"
                f" {w.get('group_size')} are not readable here"
            )
        return Grid(bits, symmetric, size)

    def grid_of(self, module: str) -> Grid:
        """The grid of a linear by its name in the file. A name goes before the class."""
        if any(part.holds(module) for part in self._floats):
            raise FormatError(f"{self.path}: config.json ignores {module}, which has integers")
        own = set[str | TowerPart]()
        if module.rpartition(".")[2] == _HEAD:
            own = {_HEAD_TARGET}
        elif self.hub_name(module).startswith(self.family.layers):
            own = {_LAYERS, self.in_layers(module)}
        for grid, targets in self.groups:
            if own & targets or any(t.holds(module) for t in targets if isinstance(t, TowerPart)):
                return grid
        if found := [grid for grid, targets in self.groups if _CLASS in targets]:
            return found[0]
        raise FormatError(f"{self.path}: no config group is for {module}; export again")

    def decode(self, module: str) -> np.ndarray:
        """The weights of a quantized module, by its name in the file: float32 [N, K].

        weight[n, k] = scale[n, g] · (code[n, k] − zero[n, g]) with g = k // group_size. Only the
        product is rounded.
        """
        packed = self._part(module, "weight_packed", "I32")
        scales = self._part(module, "weight_scale", "F16")
        shape = self._part(module, "weight_shape", "I64")
        grid = self.grid_of(module)
        bits = grid.bits
        n, k = (int(size) for size in shape) if shape.shape == (2,) else (0, 0)
        columns = k if grid.group_size == -1 else grid.group_size
        if (
            k < 1
            or k % columns
            or packed.shape != (n, -(-k * bits // 32))
            or scales.shape != (n, k // columns)
        ):
            raise self._misfit(module)
        codes = unpack(packed.T, bits).T[:, :k]  # [N, K]
        if grid.symmetric:
            zeros = np.full((n, 1), 2 ** (bits - 1), np.int16)
        else:
            zeros = self._zeros(module, bits, scales.shape).repeat(columns, axis=1)
        steps = codes.astype(np.int16) - zeros
        return steps.astype(np.float32) * scales.astype(np.float32).repeat(columns, axis=1)

    def _zeros(self, module: str, bits: int, shape: tuple[int, ...]) -> np.ndarray:
        """The zero-points of a linear, int16 [N, G]."""
        n, groups = shape
        words = self._part(module, "weight_zero_point", "I32")
        if words.shape != (-(-n * bits // 32), groups):
            raise self._misfit(module)
        return unpack(words, bits)[:n].astype(np.int16)

    def _part(self, module: str, part: str, dtype: str) -> np.ndarray:
        """A part of a linear that is stored as `dtype`, in safetensors' spelling."""
        value = self.raw(f"{module}.{part}")
        if self.tensors[f"{module}.{part}"].dtype != dtype:
            raise self._misfit(module)
        return value.numpy()

    def _misfit(self, module: str) -> FormatError:
        return FormatError(
            f"{self.path}: the tensors of {module} do not fit together; export again"
        )


def read(path: str | Path) -> dict[str, np.ndarray | None]:
    """Every weight, decoded, by hub name. The whole model has to fit in memory."""
    folder = CompressedFolder(path)
    return {name: folder.array(name) for name in folder.weight_names()}
