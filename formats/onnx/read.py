"""A written ONNX folder → weights by hub name. Own decoding in numpy; shares no code with packing and fill."""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.quantizer.untrusted import third_party

GRAPHS = ("vision", "embedding", "text")
_FLOATS, _UINT8, _INT64 = (1, 10), 2, 7  # TensorProto.DataType: float32 or float16, ...
_EXTERNAL = 1  # TensorProto.DataLocation


def guarded(reader):
    """A function of a path or of an OnnxFolder whose surprises are FormatErrors: a damaged graph has bytes for strings,
    node inputs that are not there, types that do not exist."""

    @wraps(reader)
    def read(where, *arguments):
        with third_party(f"{getattr(where, 'path', where)}: damaged graph, export again", FormatError):
            return reader(where, *arguments)

    return read


@dataclass(frozen=True)
class Linear:
    """One MatMulNBits node as it lies in the file."""

    name: str  # hub name of the module
    bits: int
    block_size: int
    weight: np.ndarray  # uint8 [out, blocks, bytes a block]
    scales: np.ndarray  # float32 or float16 [out, blocks]
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
        sorted_ = (self.scales.astype(np.float32)[..., None] * steps.astype(np.float32)).reshape(out, -1)[
            :, : self.in_features
        ]
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

    @guarded
    def _index(self, model) -> None:
        constants = {t.name: t for t in model.graph.initializer}
        producers = {o: n for n in model.graph.node for o in n.output}
        consumers = {i: n for n in model.graph.node for i in n.input}
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
            attributes = self._attributes(node, module, *(constants[i] for i in node.input[1:4]), order)
            for name, rows in self._rows(node, module, attributes["N"], consumers, constants):
                self._linears[name] = (attributes, *(constants[i] for i in node.input[1:4]), order, rows)
            parts |= set(node.input[1:4])
        for name, tensor in constants.items():
            if name not in parts and tensor.data_type in _FLOATS:
                self.floats.setdefault(name, []).append(tensor)

    def _rows(self, node, module: str, outputs: int, consumers: dict, constants: dict) -> list[tuple[str, slice]]:
        """The linears of a node and their rows: one, or those that the Split or the attention behind it (and behind a
        bias) takes apart."""
        if "|" not in module:
            return [(module, slice(None))]
        first, *others = module.split("|")
        names = [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]
        split = consumers.get(node.output[0])
        if split is not None and split.op_type == "Add":
            split = consumers.get(split.output[0])
        lengths = constants.get(split.input[1]) if split is not None and split.op_type == "Split" else None
        sizes = [] if lengths is None else self.array(lengths).tolist()
        if split is not None and split.op_type == "GroupQueryAttention" and not any(split.input[1:3]):
            heads, pairs = ({a.name: a.i for a in split.attribute}[n] for n in ("num_heads", "kv_num_heads"))
            size = outputs // (heads + 2 * pairs)
            sizes = [heads * size, pairs * size, pairs * size]
        if len(sizes) != len(names) or sum(sizes) != outputs or min(sizes) < 1:
            raise FormatError(f"{self.path}: {module} is not split into {len(names)} linears; export again")
        ends = np.cumsum(sizes).tolist()
        return [(name, slice(end - size, end)) for name, size, end in zip(names, sizes, ends, strict=True)]

    def _attributes(self, node, module: str, weight, scales, zeros, order) -> dict[str, int]:
        """The node's integers, its constants of the shapes that they ask for (MatMulNBits' inputs)."""
        found = {a.name: a.i for a in node.attribute}
        lacking = {"K", "N", "bits", "block_size"} - set(found)
        if lacking:
            raise FormatError(f"{self.path}: {module} lacks the attribute {min(lacking)}; export again")
        inputs, outputs, bits, block = (found[k] for k in ("K", "N", "bits", "block_size"))
        if bits not in (2, 4, 8) or block not in (16, 32, 64, 128, 256) or min(inputs, outputs) < 1:
            raise FormatError(
                f"{self.path}: {module} has {bits} bits in blocks of {block}; ONNX Runtime takes 2, 4, 8 in 16 to 256"
            )
        blocks = -(-inputs // block)
        expected = [(weight, (_UINT8,), (outputs, blocks, block * bits // 8)), (scales, _FLOATS, (outputs, blocks)),
                    (zeros, (_UINT8,), (outputs, -(-blocks * bits // 8)))]  # fmt: skip
        expected += [] if order is None else [(order, (_INT64,), (inputs,))]
        for tensor, kinds, shape in expected:
            if tensor.data_type not in kinds or tuple(tensor.dims) != shape:
                raise FormatError(
                    f"{self.path}: {tensor.name} has shape {list(tensor.dims)}, its node asks for {list(shape)}"
                )
        return found

    @property
    def linears(self) -> list[str]:
        return list(self._linears)

    @property
    def accuracy_levels(self) -> set[int]:
        """Of all MatMulNBits nodes; {0} of none."""
        return {a.get("accuracy_level", 0) for a, *_ in self._linears.values()} or {0}

    @property
    def half(self) -> bool:
        """Whether activations and cache of the decoder are float16."""
        return self.models["text"].graph.input[0].type.tensor_type.elem_type == _FLOATS[1]

    def stored_as(self, name: str) -> type:
        """The type in which a float weight lies in the file."""
        return np.float16 if any(t.data_type == _FLOATS[1] for t in self.floats.get(name, [])) else np.float32

    @guarded
    def linear(self, name: str) -> Linear:
        attributes, weight, scales, zeros, order, rows = self._linears[name]
        columns = None if order is None else self.array(order)
        if columns is not None and not np.array_equal(np.sort(columns), np.arange(attributes["K"])):
            raise FormatError(f"{self.path}: {order.name} is not an order of the columns; export again")
        return Linear(
            name, attributes["bits"], attributes["block_size"],
            *(self.array(part)[rows] for part in (weight, scales, zeros)), columns, attributes["K"], attributes.get("accuracy_level", 0),
        )  # fmt: skip

    def array(self, tensor) -> np.ndarray:
        from onnx import numpy_helper

        try:
            return numpy_helper.to_array(tensor, str(self.path))
        except (ValueError, OSError) as e:
            raise FormatError(f"{self.path}: {tensor.name} cannot be read ({e}); export again") from None

    @guarded
    def weight(self, name: str) -> np.ndarray | None:
        """float by hub name, decoded if quantized; None if the file does not hold it, NaN where copies differ."""
        module = name.removesuffix(".weight")
        if module in self._linears:
            return self.linear(module).decode()
        return agreeing([self.array(t) for t in self.floats.get(name, [])])


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


def _tensors(message):
    """Every TensorProto of a protobuf message: initializers, and those of attributes, subgraphs and functions."""
    from onnx import TensorProto

    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if isinstance(part, TensorProto):
                yield part
            else:
                yield from _tensors(part)


@guarded
def _check_external(folder: Path, name: str, model) -> None:
    """Every external tensor in a plain file of this folder, and the file exactly as long as its tensors need."""
    ends: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != _EXTERNAL:
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        file = folder / location
        if location in ("", ".", "..") or Path(location).name != location or file.is_symlink():
            raise FormatError(f"{folder / name}: {tensor.name} points outside the folder ({location}); do not load it")
        offset, length = entry.get("offset", "0"), entry.get("length", "")
        if not (offset.isdecimal() and length.isdecimal()):
            raise FormatError(f"{folder / name}: {tensor.name} lies at {offset!r}, {length!r} bytes; export again")
        ends[location] = max(ends.get(location, 0), int(offset) + int(length))
    for location, end in ends.items():
        file = folder / location
        if not file.is_file():
            raise FormatError(f"{file}: missing; export again")
        if file.stat().st_nlink > 1:
            raise FormatError(f"{file}: a hard link, which the onnx package refuses to read; copy the file")
        if file.stat().st_size != end:
            raise FormatError(f"{file}: {file.stat().st_size} bytes where the graph needs {end}; export again")
