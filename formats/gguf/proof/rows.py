"""The export that is being proven, and rows of its parity table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vlmq_export.formats.gguf.files.mmproj import CLASS_ROW
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.runtime.prompts import as_rows, mtmd_rows
from vlmq_export.formats.gguf.tables.layout import Layout, Place
from vlmq_export.formats.proof.checks import Check, CheckSettings, Steps, relative_error
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.sample import Sample

# Bytes of a model from which on several threads pay. llama.cpp's threads spin at every barrier.
SMALL = 2**28

# The steps of the proof, and their shares of the time.
PARTS = {"weights": 10, "shipped files": 40, "products": 10, "reference": 10, "float32 twin": 30}

gated = partial(Check.at_most, "gguf")


def failed(level: str, name: str, why: str) -> Check:
    """A check that broke down, or whose file was refused."""
    return Check("gguf", level, name, "failed", detail=why)


@dataclass(frozen=True)
class Exported:
    """The two files of an export, and the reference that they are held against."""

    text: Path
    mmproj: Path
    layout: Layout
    types: dict[str, str]  # GGUF name → type, of both files
    mmproj_dtype: str  # of the mmproj's linears that were not solved: f32, f16 or q8_0
    reference: Reference
    settings: CheckSettings

    @classmethod
    def open(cls, folder: Path, reference: Reference, settings: CheckSettings) -> Exported:
        """Raises FormatError for a folder whose files cannot be read."""
        text, mmproj = find_files(folder)
        tower = GGUFFile(mmproj)
        vision = {name: t.type for name, t in tower.tensors.items()}
        types = {name: t.type for name, t in GGUFFile(text).tensors.items()} | vision
        class_row = str(tower.metadata.get(CLASS_ROW, "last"))
        layout = Layout.of(reference.architecture, class_row, reference.folder)
        export = cls(text, mmproj, layout, types, "f32", reference, settings)
        plain = {types.get(n) for n, place in layout.vision.items() if not export.solved(place)}
        dtype = next((t.lower() for t in ("Q8_0", "F16") if t in plain), "f32")
        return replace(export, mmproj_dtype=dtype)

    @property
    def steps(self) -> Steps:
        """Tells what is running."""
        return Steps(self.settings.tell, PARTS)

    @property
    def threads(self) -> int:
        """How many threads llama.cpp is given."""
        size = sum(file.stat().st_size for file in self.text.parent.glob("*.gguf"))
        return self.settings.threads if size >= SMALL else 1

    @property
    def pictured(self) -> list[Sample]:
        """The held-out prompts that have images."""
        return [sample for sample in self.reference.prompts if sample.images]

    @property
    def tower_rounding(self) -> str:
        """The type that says how exact the tower's products are. Solved ones round as q8_0 does."""
        return "q8_0" if self.solved_tower else self.mmproj_dtype

    @property
    def solved_tower(self) -> bool:
        """Whether linears of the tower were quantized before they were written."""
        return any(self.solved(place) for place in self.layout.vision.values())

    def solved(self, place: Place) -> bool:
        """Whether a tensor of the mmproj holds the integers of the artifact."""
        linears = self.reference.weights.linears
        return place.linear and place.hub.removesuffix(".weight") in linears

    def tower(self) -> Iterator[tuple[str, np.ndarray]]:
        """(GGUF name, float32 array) of every tensor that a reader must find in the mmproj."""
        rounding = _ROUNDED.get(self.mmproj_dtype, _as_is)
        for name, place in self.layout.vision.items():
            source = torch.from_numpy(self.reference.weights.array(place.hub))
            array = np.ascontiguousarray(place.of(source).numpy())
            as_source = not place.linear or self.solved(place)
            yield name, array if as_source else rounding(array)


def _as_is(array: np.ndarray) -> np.ndarray:
    return array


def _half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float32)


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """The values of Q8_0, whose blocks of 32 have a step of max / 127, stored in float16.

    Rows that do not fill blocks are float16.
    """
    if array.shape[1] % 32:
        return _half(array)
    blocks = array.reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    # Half away from zero, as C's roundf.
    codes = np.trunc(blocks * inverse + np.copysign(np.float32(0.5), blocks))
    return (codes * step.astype(np.float16).astype(np.float32)).reshape(array.shape)


_ROUNDED = {"f16": _half, "q8_0": _eight_bits}


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error, which is infinite where not even the shapes agree."""
    return relative_error(got, want) if got.shape == want.shape else float("inf")


def image_error(export: Exported, sample: Sample, got: np.ndarray) -> float:
    """How far mtmd's rows of a sample's images are from the reference's.

    got: float32 [rows, width].

    Features and what stands behind the lines of an image are compared apart, and the larger error
    counts, so that neither hides the other.
    """
    want = mtmd_rows(export.reference, export.layout, sample)
    if got.shape != want.shape:
        return float("inf")
    features = sample.vision.numpy()[as_rows(export.reference, export.layout, sample)]
    parts = [part for part in (features, ~features) if part.any()]
    return max(error(got[part], want[part]) for part in parts)


def worst_of(errors: Mapping[str, float]) -> tuple[str, float]:
    """The worst of some errors, with its name. NaN is worst of all, and nothing compared is NaN."""
    if not errors:
        return "nothing was compared", float("nan")
    name = max(errors, key=lambda n: (np.isnan(errors[n]), errors[n]))
    return name, errors[name]
