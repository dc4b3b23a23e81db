"""Decodes the weights of an artifact for the proof.

Nothing here is shared with the writers in `formats/`, nor with the decoder in `quantizer/`. An
error in one of them is therefore not repeated in what their files are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from vlmq_export.quantizer.model.architecture import family_of
from vlmq_export.quantizer.model.families import Family
from vlmq_export.quantizer.model.rotation import changes

# The stored parts of a linear on an affine grid, and of one on a GGUF block type.
_AFFINE = ("codes", "scales", "zero_points", "g_idx")
_BLOCKS = ("codes", "d", "sub_scales", "dmin", "sub_mins")
# GGUF type without a minimum → the code that decodes to zero.
_CENTRES = {"Q3_K": 4, "Q4_0": 8, "Q5_0": 16, "Q6_K": 32, "Q8_0": 128, "TQ2_0": 1, "Q2_0": 1}

# GGUF type with unevenly spaced levels → what its codes stand for.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ3_S = (*range(-15, 0, 2), *range(1, 16, 2))
_IQ3_XXS = (-15.5, *range(-13, 0, 2), *range(1, 14, 2), 15.5)
_IQ2 = (-5.375, -3.125, -1.0, 1.0, 3.125, 5.375)
_LEVELS = {
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    "IQ3_S": _IQ3_S,
    "IQ3_XXS": _IQ3_XXS,
    "IQ2_S": _IQ2,
    "IQ2_XS": _IQ2,
    "IQ2_XXS": _IQ2,
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored."""

    file: Path
    name: str  # in the file; a source may have the names of another version of transformers


class Weights:
    """The weights that a shipped model must decode to, by hub name.

    Quantized weights are decoded from the artifact's integers. Float tensors that the artifact did
    not change are read from the source checkpoint if one is given, else from the artifact's copies.
    """

    def __init__(self, artifact: Path, source: Path | None = None):
        config = json.loads((artifact / "source" / "config.json").read_text("utf-8"))
        family = family_of(config)
        floats, layers = (
            sorted(artifact.glob(f"{kind}-*.safetensors")) for kind in ("float", "layer")
        )
        self._places = {
            name: _Place(file, name) for file in [*floats, *layers] for name in _names(file)
        }
        manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
        self._types = {m["name"]: m.get("type", "") for m in manifest["modules"]}
        self.linears = [k.removesuffix(".codes") for k in self._places if k.endswith(".codes")]
        packed = {f"{n}.{part}" for n in self.linears for part in (*_AFFINE, *_BLOCKS, "energy")}
        self.parts = packed & self._places.keys()  # stored parts of linears: `<module>.codes`, ...
        self.floats = [k for k in self._places if k not in packed]
        if source is not None:
            rotated = manifest["config"].get("rotate", "off") != "off"
            self._places |= self._in_source(source, family, rotated)

    def _in_source(self, source: Path, family: Family, rotated: bool) -> dict[str, _Place]:
        """Places in a source checkpoint of the floats that have the same value in the artifact.

        The artifact has other values for the biases of quantized linears, which are rounded to
        float16, for norms that took a scale, and for whatever a rotation changes.
        """
        rounded = {f"{n}.bias" for n in self.linears}
        same = {
            name
            for name in self.floats
            if name not in rounded
            and not self._places[name].file.name.startswith("float-changed-")
            and not (rotated and changes(name, family))
        }
        stored = [
            (family.hub_name(name), _Place(file, name))
            for file in sorted(source.glob("*.safetensors"))
            for name in _names(file)
        ]
        return {hub: place for hub, place in stored if hub in same}

    def names(self) -> list[str]:
        """Every parameter of the model once, by hub name."""
        return [*self.floats, *(f"{n}.weight" for n in self.linears)]

    def tensor(self, key: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """A float tensor by its hub name, or a part of a linear: `<module>.codes`.

        `rows` gives some rows alone.
        """
        place = self._places[key]
        with safe_open(place.file, framework="pt") as f:
            if rows is None:
                return f.get_tensor(place.name)
            held = f.get_slice(place.name)
            if isinstance(rows, range):  # one piece of the file
                return held[rows.start : rows.stop]
            return torch.cat([held[row : row + 1] for row in rows])

    def array(self, name: str, rows: Sequence[int] | None = None) -> np.ndarray:
        """A weight by its hub name, or some of its rows, float32, decoded if it is quantized.

        On an affine grid that is scale · (code − zero_point), where only the product is rounded.
        """
        module = name.removesuffix(".weight")
        if f"{module}.codes" not in self._places:
            return self.tensor(name, rows).to(torch.float32).numpy()
        if f"{module}.d" in self._places:
            return self._from_blocks(module, rows)
        part = {
            k: self.tensor(f"{module}.{k}", None if k == "g_idx" else rows).numpy() for k in _AFFINE
        }
        group = part["g_idx"]
        zeros, scales = part["zero_points"].astype(np.int16), part["scales"].astype(np.float32)
        steps = part["codes"].astype(np.int16) - zeros[:, group]
        return steps.astype(np.float32) * scales[:, group]

    def _from_blocks(self, module: str, rows: Sequence[int] | None) -> np.ndarray:
        """A weight on a GGUF block type, float32 [out, in].

        (d · sub_scale) · (code − centre), (d · sub_scale) · level[code], or
        (d · sub_scale) · code − dmin · sub_min for a type with minima. The products are exact, so
        that there is one rounding.
        """
        held = [k for k in _BLOCKS if f"{module}.{k}" in self._places]
        part = {k: self.tensor(f"{module}.{k}", rows).numpy() for k in held}
        codes = part["codes"]
        subs = part["sub_scales"].shape[1]  # sub-blocks in a row
        columns, per_block = codes.shape[1] // subs, subs // part["d"].shape[1]

        def spread(unit: str, multiple: str) -> np.ndarray:
            """unit · multiple of each sub-block, repeated for its columns: float32 [out, in]."""
            units = np.repeat(part[unit].astype(np.float32), per_block, 1)
            return np.repeat(units * part[multiple].astype(np.float32), columns, 1)

        if "dmin" in part:
            return spread("d", "sub_scales") * codes.astype(np.float32) - spread("dmin", "sub_mins")
        kind = self._types[module]
        if kind in _LEVELS:
            return spread("d", "sub_scales") * np.array(_LEVELS[kind], np.float32)[codes]
        steps = codes.astype(np.int16) - _CENTRES[kind]
        return spread("d", "sub_scales") * steps.astype(np.float32)

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """(hub name, float32 array) of every weight, one at a time."""
        return ((name, self.array(name)) for name in self.names())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight by its hub name, from a header."""
        key = name if name in self._places else f"{name.removesuffix('.weight')}.codes"
        place = self._places[key]
        with safe_open(place.file, framework="pt") as f:
            return tuple(f.get_slice(place.name).get_shape())

    @cached_property
    def count(self) -> int:
        """The number of weights of the model."""
        return sum(int(np.prod(self.shape(name))) for name in self.names())


def _names(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    with safe_open(file, framework="pt") as f:
        return list(f.keys())
