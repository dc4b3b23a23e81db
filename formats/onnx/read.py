"""A written ONNX folder → weights by hub name. Own decoding in numpy; shares no code with packing and fill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError

GRAPHS = ("vision", "embedding", "text")


@dataclass(frozen=True)
class Linear:
    """One MatMulNBits node as it lies in the file."""

    name: str  # hub name of the module
    bits: int
    block_size: int
    weight: np.ndarray  # uint8 [out, blocks, bytes a block]
    scales: np.ndarray  # float32 [out, blocks]
    zero_points: np.ndarray  # uint8 [out, bytes a row]
    order: np.ndarray | None  # int64 [in]: the Gather before the node
    in_features: int
    accuracy_level: int

    def decode(self) -> np.ndarray:
        """float32 [out, in] in the original column order."""
        out, blocks, _ = self.weight.shape
        codes = _unpack(self.weight, self.bits)[..., : self.block_size]  # [out, blocks, block]
        zeros = _unpack(self.zero_points, self.bits)[:, :blocks]  # [out, blocks]
        steps = codes.astype(np.int32) - zeros.astype(np.int32)[..., None]
        sorted_ = (self.scales[..., None] * steps.astype(np.float32)).reshape(out, -1)[:, : self.in_features]
        if self.order is None:
            return sorted_
        weights = np.empty_like(sorted_)
        weights[:, self.order] = sorted_
        return weights


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., bytes] → uint8 [..., bytes·8/bits], least significant first."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)


class OnnxFolder:
    """The three graphs and their constants, read lazily and checked first.

    Raises FormatError for a file that is missing, damaged, of the wrong length, or outside the folder: ONNX Runtime itself
    accepts data files that are too long.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.models = {name: _load(self.path / f"{name}.onnx") for name in GRAPHS}
        self.floats: dict[str, list] = {}  # hub name → its TensorProtos, one a graph that holds it
        self._linears: dict[str, tuple] = {}
        for name, model in self.models.items():
            _check_external(self.path, f"{name}.onnx", model)
            self._index(model)

    def _index(self, model) -> None:
        constants = {t.name: t for t in model.graph.initializer}
        producers = {o: n for n in model.graph.node for o in n.output}
        parts: set[str] = set()
        for node in model.graph.node:
            if node.op_type != "MatMulNBits":
                continue
            module = node.input[1].removesuffix(".qweight")
            if any(len(node.input) < 4 or i not in constants for i in node.input[1:4]) or (
                len(node.input) > 4 and node.input[4]
            ):
                raise FormatError(
                    f"{self.path}: {module} lacks zero_points or has a g_idx, which ONNX Runtime computes wrong"
                )
            gather = producers.get(node.input[0])
            order = None
            if gather is not None and gather.op_type == "Gather" and gather.input[1] == f"{module}.order":
                order = constants[gather.input[1]]
                parts.add(gather.input[1])
            self._linears[module] = (node, *(constants[i] for i in node.input[1:4]), order)
            parts |= set(node.input[1:4])
        for name, tensor in constants.items():
            if name not in parts and tensor.data_type == 1:  # float32
                self.floats.setdefault(name, []).append(tensor)

    @property
    def linears(self) -> list[str]:
        return list(self._linears)

    def linear(self, name: str) -> Linear:
        node, weight, scales, zeros, order = self._linears[name]
        attributes = {a.name: a.i for a in node.attribute}
        return Linear(
            name, attributes["bits"], attributes["block_size"], self._array(weight), self._array(scales), self._array(zeros),
            None if order is None else self._array(order), attributes["K"], attributes.get("accuracy_level", 0),
        )  # fmt: skip

    def _array(self, tensor) -> np.ndarray:
        from onnx import numpy_helper

        try:
            return numpy_helper.to_array(tensor, str(self.path))
        except (ValueError, OSError) as e:
            raise FormatError(f"{self.path}: {tensor.name} cannot be read ({e}); export again") from None

    def weight(self, name: str) -> np.ndarray | None:
        """float32 by hub name, decoded if quantized; None if the file does not hold it, NaN where copies differ."""
        module = name.removesuffix(".weight")
        if module in self._linears:
            return self.linear(module).decode()
        return agreeing([self._array(t) for t in self.floats.get(name, [])])


def agreeing(copies: list[np.ndarray]) -> np.ndarray | None:
    """What every copy says, NaN where they differ; None of none. A tied head is a copy of the embedding."""
    if not copies:
        return None
    first, *others = copies
    for other in others:
        first = np.where(first == other, first, np.nan) if first.shape == other.shape else np.full_like(first, np.nan)
    return first


def _load(path: Path):
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FormatError(f"{path}: missing; export again")
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as e:
        raise FormatError(f"{path}: not an ONNX file ({e}); export again") from None


def _check_external(folder: Path, name: str, model) -> None:
    """Every external tensor in a plain file of this folder, and the file exactly as long as its tensors need."""
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != 1:
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        file = folder / location
        if location in ("", ".", "..") or Path(location).name != location or file.is_symlink():
            raise FormatError(f"{folder / name}: {tensor.name} points outside the folder ({location}); do not load it")
        ends[location] = max(ends.get(location, 0), int(entry.get("offset", 0)) + int(entry.get("length", 0)))
    for location, end in ends.items():
        file = folder / location
        if not file.is_file():
            raise FormatError(f"{file}: missing; export again")
        if file.stat().st_nlink > 1:
            raise FormatError(f"{file}: a hard link, which ONNX Runtime may refuse; copy the file")
        if file.stat().st_size != end:
            raise FormatError(f"{file}: {file.stat().st_size} bytes where the graph needs {end}; export again")
