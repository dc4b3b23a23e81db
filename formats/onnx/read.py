"""Reads the weights of a written ONNX folder. Nothing here is shared with packing or fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.quantizer.storage.untrusted import third_party

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import ModelProto, NodeProto, TensorProto

GRAPHS = ("vision", "embedding", "text")
# Values of TensorProto.DataType.
_FLOAT32, _UINT8, _INT64, _FLOAT16, _BFLOAT16 = 1, 2, 7, 10, 16
_SCALES = (_FLOAT32, _FLOAT16)
_FLOATS = (*_SCALES, _BFLOAT16)
_EXTERNAL = 1  # a value of TensorProto.DataLocation

Where = TypeVar("Where")
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def guarded(
    reader: Callable[Concatenate[Where, Rest], Result],
) -> Callable[Concatenate[Where, Rest], Result]:
    """Makes every error of a reader a FormatError.

    The reader is a function of a path, or a method of OnnxFolder. In a damaged graph strings are
    bytes, inputs of nodes are missing, and types do not exist.
    """

    @wraps(reader)
    def read(where: Where, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        place = getattr(where, "path", where)
        with third_party(f"{place}: damaged graph, export again", FormatError):
            return reader(where, *args, **kwargs)

    return read


@dataclass(frozen=True)
class Linear:
    """One MatMulNBits node, or one GatherBlockQuantized, as it lies in the file."""

    name: str  # hub name of the module
    bits: int
    block_size: int
    weight: np.ndarray  # uint8 [out, blocks, bytes of a block]
    scales: np.ndarray  # float32 or float16 [out, blocks], in the type that the node reads
    zero_points: np.ndarray  # uint8 [out, bytes of a row]
    order: np.ndarray | None  # int64 [in]: the columns that a Gather before the node takes
    in_features: int
    accuracy_level: int
    looked_up: bool = False  # whether the node takes rows of it, and does not multiply

    def decode(self) -> np.ndarray:
        """The weights, float32 [out, in], columns in their original order."""
        out, blocks, _ = self.weight.shape
        codes = _unpack(self.weight, self.bits)[..., : self.block_size]  # [out, blocks, block]
        zeros = _unpack(self.zero_points, self.bits)[:, :blocks]  # [out, blocks]
        steps = codes.astype(np.int32) - zeros.astype(np.int32)[..., None]
        weights = self.scales.astype(np.float32)[..., None] * steps.astype(np.float32)
        return self.original_order(weights.reshape(out, -1)[:, : self.in_features])

    def original_order(self, gathered: np.ndarray) -> np.ndarray:
        """Columns [out, in] in the order of the node → in the original order."""
        if self.order is None:
            return gathered
        weights = np.empty_like(gathered)
        weights[:, self.order] = gathered
        return weights


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., bytes] → uint8 [..., bytes·8/bits], least significant bits first."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)


@dataclass(frozen=True)
class _Node:
    """A node with its constants, before any of their data is read.

    A GatherBlockQuantized has the attributes that a MatMulNBits on the same constants would have.
    """

    attributes: dict[str, int]
    weight: TensorProto
    scales: TensorProto
    zeros: TensorProto
    cast: bool  # whether a Cast to float32 stands between the scales and the node
    order: TensorProto | None = None  # of the Gather before the node
    looked_up: bool = False  # whether it is a GatherBlockQuantized

    @property
    def constants(self) -> list[TensorProto]:
        parts = [self.weight, self.scales, self.zeros]
        return parts if self.order is None else [*parts, self.order]


class OnnxFolder:
    """The three graphs and their constants. All are checked first; data are read when asked for.

    Raises FormatError for a file that is missing, damaged, of the wrong length, or outside the
    folder. ONNX Runtime itself accepts data files that are too long.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.models = {name: load_graph(self.path / f"{name}.onnx") for name in GRAPHS}
        # Hub name → the float constants of that name, one for each graph that holds it.
        self.floats: dict[str, list[TensorProto]] = {}
        # Hub name of a module → its node, and the rows of the node that are its own.
        self._linears: dict[str, tuple[_Node, slice]] = {}
        # Names in the graph that computes in float32 beside a decoder of either type.
        self._vision = {t.name for t in self.models["vision"].graph.initializer}
        for name, model in self.models.items():
            check_external(self.path, f"{name}.onnx", model)
            self._index(model)

    @guarded
    def _index(self, model: ModelProto) -> None:
        """Find the linears and the float constants of one graph."""
        constants = {t.name: t for t in model.graph.initializer}
        producers = {o: n for n in model.graph.node for o in n.output}
        consumers = {i: n for n in model.graph.node for i in n.input}
        parts: set[str] = set()
        for node in model.graph.node:
            if node.op_type == "GatherBlockQuantized":
                module = node.input[0].removesuffix(".qweight")
                found = self._table(node, module, producers, constants)
                self._linears[module] = found, slice(None)
            elif node.op_type == "MatMulNBits":
                module = node.input[1].removesuffix(".qweight")
                found = self._node(node, module, producers, constants)
                outputs = found.attributes["N"]
                for name, rows in self._rows(node, module, outputs, consumers, constants):
                    self._linears[name] = found, rows
            else:
                continue
            parts |= {t.name for t in found.constants}
        for name, tensor in constants.items():
            if name not in parts and tensor.data_type in _FLOATS:
                self.floats.setdefault(name, []).append(tensor)

    def _node(
        self,
        node: NodeProto,
        module: str,
        producers: Mapping[str, NodeProto],  # value → the node that gives it
        constants: Mapping[str, TensorProto],
    ) -> _Node:
        """A MatMulNBits node, if it has the inputs and attributes that we write."""
        inputs = stored_inputs(node, producers)
        incomplete = len(inputs) < 4 or any(i not in constants for i in inputs[1:4])
        if incomplete or (len(inputs) > 4 and inputs[4]):
            raise FormatError(
                f"{self.path}: {module} lacks zero_points or has a g_idx,"
                " which ONNX Runtime computes wrong"
            )
        gather = producers.get(node.input[0])
        order = None
        if gather is not None and gather.op_type == "Gather":
            order = constants[gather.input[1]] if gather.input[1] == f"{module}.order" else None
        weight, scales, zeros = (constants[i] for i in inputs[1:4])
        attributes = {a.name: a.i for a in node.attribute}
        cast = scales.name != node.input[2]
        found = _Node(attributes, weight, scales, zeros, cast, order)
        self._check_shapes(module, found)
        return found

    def _table(
        self,
        node: NodeProto,
        module: str,
        producers: Mapping[str, NodeProto],
        constants: Mapping[str, TensorProto],
    ) -> _Node:
        """A GatherBlockQuantized node, if it takes rows of a table as we write it."""
        inputs = stored_inputs(node, producers)
        if len(inputs) != 4 or any(inputs[i] not in constants for i in (0, 2, 3)):
            raise FormatError(f"{self.path}: {module} lacks scales or zero_points; export again")
        codes, scales, zeros = (constants[inputs[i]] for i in (0, 2, 3))
        attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": 4}  # the operator's defaults
        attributes |= {a.name: a.i for a in node.attribute}
        if (attributes["gather_axis"], attributes["quantize_axis"]) != (0, 1):
            raise FormatError(f"{self.path}: {module} does not take rows; export again")
        rows, size = codes.dims
        attributes |= {"N": rows, "K": 8 * size // attributes["bits"]}
        cast = scales.name != node.input[2]
        found = _Node(attributes, codes, scales, zeros, cast, looked_up=True)
        self._check_shapes(module, found)
        return found

    def _check_shapes(self, module: str, node: _Node) -> None:
        """Raises FormatError unless the constants have the shapes that the attributes ask for."""
        found = node.attributes
        lacking = {"K", "N", "bits", "block_size"} - set(found)
        if lacking:
            raise FormatError(
                f"{self.path}: {module} lacks the attribute {min(lacking)}; export again"
            )
        inputs, outputs, bits, block = (found[k] for k in ("K", "N", "bits", "block_size"))
        if bits not in (2, 4, 8) or block not in (16, 32, 64, 128, 256) or min(inputs, outputs) < 1:
            raise FormatError(
                f"{self.path}: {module} has {bits} bits in blocks of {block};"
                " ONNX Runtime takes 2, 4, 8 in 16 to 256"
            )
        blocks = -(-inputs // block)
        size = block * bits // 8
        codes = (outputs, blocks * size) if node.looked_up else (outputs, blocks, size)
        expected = [
            (node.weight, (_UINT8,), codes),
            (node.scales, _SCALES, (outputs, blocks)),
            (node.zeros, (_UINT8,), (outputs, -(-blocks * bits // 8))),
        ]
        if node.order is not None:
            expected.append((node.order, (_INT64,), (inputs,)))
        for tensor, kinds, shape in expected:
            if tensor.data_type not in kinds or tuple(tensor.dims) != shape:
                raise FormatError(
                    f"{self.path}: {tensor.name} has shape {list(tensor.dims)},"
                    f" its node asks for {list(shape)}"
                )

    def _rows(
        self,
        node: NodeProto,
        module: str,
        outputs: int,  # of the node
        consumers: Mapping[str, NodeProto],  # value → a node that reads it
        constants: Mapping[str, TensorProto],
    ) -> list[tuple[str, slice]]:
        """The linears of a node, and the rows of each.

        A Split or an attention behind a merged node takes its linears apart, perhaps after an Add
        of their biases. Those of an expert have as many rows each, and are taken apart together
        with those of the other experts.
        """
        names = merged_linears(module)
        if len(names) == 1:
            return [(module, slice(None))]
        reader = consumers.get(node.output[0])
        if reader is not None and reader.op_type == "Add":
            reader = consumers.get(reader.output[0])
        sizes: list[int] = []
        if reader is not None and reader.op_type == "Split":
            lengths = constants.get(reader.input[1])
            sizes = [] if lengths is None else self.array(lengths).tolist()
        elif reader is not None and reader.op_type == "GroupQueryAttention":
            # Keys and values are inputs of their own unless they come with the queries.
            sizes = [] if any(reader.input[1:3]) else _head_rows(reader, outputs)
        elif reader is not None and reader.op_type == "Concat":
            sizes = [outputs // len(names)] * len(names)
        if len(sizes) != len(names) or sum(sizes) != outputs or min(sizes) < 1:
            raise FormatError(
                f"{self.path}: {module} is not split into {len(names)} linears; export again"
            )
        ends = np.cumsum(sizes).tolist()
        return [
            (name, slice(end - size, end))
            for name, size, end in zip(names, sizes, ends, strict=True)
        ]

    @property
    def linears(self) -> list[str]:
        """Hub names of the quantized modules."""
        return list(self._linears)

    @property
    def accuracy_levels(self) -> set[int]:
        """The accuracy levels of all MatMulNBits nodes. Where there is no node it is {0}."""
        nodes = (node for node, _ in self._linears.values() if not node.looked_up)
        return {node.attributes.get("accuracy_level", 0) for node in nodes} or {0}

    @property
    def half(self) -> bool:
        """Whether activations and cache of the decoder are float16."""
        return self.models["text"].graph.input[0].type.tensor_type.elem_type == _FLOAT16

    def rounded_to(self, name: str) -> type:
        """The numpy type that a float weight of the source was rounded to.

        That is float16 where the decoder computes in float16. Any other weight has the source's own
        value: float32 graphs cast what they store in 16 bits.
        """
        stored = {t.data_type for t in self.floats.get(name, [])}
        half = self.half and name not in self._vision and _FLOAT16 in stored
        return np.float16 if half else np.float32

    @guarded
    def linear(self, name: str) -> Linear:
        """A quantized module by its hub name."""
        node, rows = self._linears[name]
        inputs, columns = node.attributes["K"], None
        if node.order is not None:
            columns = self.array(node.order)
            if not np.array_equal(np.sort(columns), np.arange(inputs)):
                raise FormatError(
                    f"{self.path}: {node.order.name} is not an order of the columns; export again"
                )
        bits, block = node.attributes["bits"], node.attributes["block_size"]
        scales = self.array(node.scales)[rows]
        if node.cast:
            scales = scales.astype(np.float32)
        return Linear(
            name,
            bits,
            block,
            self.array(node.weight)[rows].reshape(*scales.shape, -1),
            scales,
            self.array(node.zeros)[rows],
            columns,
            inputs,
            node.attributes.get("accuracy_level", 0),
            node.looked_up,
        )

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The data of a constant, with bfloat16 as float32."""
        from onnx import numpy_helper

        try:
            values = numpy_helper.to_array(tensor, str(self.path))
            return values.astype(np.float32) if tensor.data_type == _BFLOAT16 else values
        except (ValueError, OSError) as e:
            raise FormatError(
                f"{self.path}: {tensor.name} cannot be read ({e}); export again"
            ) from None

    @guarded
    def weight(self, name: str) -> np.ndarray | None:
        """A float weight by its hub name, decoded if it is quantized.

        None if the file does not hold it, and NaN where copies differ.
        """
        module = name.removesuffix(".weight")
        if module in self._linears:
            return self.linear(module).decode()
        return agreeing([self.array(t) for t in self.floats.get(name, [])])


def merged_linears(module: str) -> list[str]:
    """The linears of a node by its name: `x.q_proj|k_proj` is a merged one."""
    first, *others = module.split("|")
    return [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]


def stored_inputs(node: NodeProto, producers: Mapping[str, NodeProto]) -> list[str]:
    """The inputs of a MatMulNBits or a GatherBlockQuantized, by the names that constants have.

    Its scales are the third. They may be what a Cast to float32 gives, and then this is its input.
    producers: value → the node that gives it.
    """
    inputs = list(node.input)
    cast = producers.get(inputs[2]) if len(inputs) > 2 else None
    if cast is not None and cast.op_type == "Cast":
        (to,) = (a.i for a in cast.attribute if a.name == "to")
        inputs[2] = cast.input[0] if to == _FLOAT32 else inputs[2]
    return inputs


def _head_rows(attention: NodeProto, outputs: int) -> list[int]:
    """The rows of query, key and value in a product of `outputs` rows, by the numbers of heads."""
    integers = {a.name: a.i for a in attention.attribute}
    heads, pairs = integers["num_heads"], integers["kv_num_heads"]
    size = outputs // (heads + 2 * pairs)
    return [heads * size, pairs * size, pairs * size]


def agreeing(copies: list[np.ndarray]) -> np.ndarray | None:
    """What all copies of a weight say, and NaN where they differ. None if there is no copy.

    A tied output matrix is a copy of the embedding.
    """
    if not copies:
        return None
    first, *others = copies
    for other in others:
        if first.shape == other.shape:
            first = np.where(first == other, first, np.nan)
        else:
            first = np.full_like(first, np.nan)
    return first


def load_graph(path: Path) -> ModelProto:
    """A graph without its data. Raises FormatError if it is missing or no ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FormatError(f"{path}: missing; export again")
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as e:
        raise FormatError(f"{path}: not an ONNX file ({e}); export again") from None


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Every TensorProto in a message, also those of attributes, subgraphs and functions."""
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
def check_external(folder: Path, name: str, model: ModelProto) -> None:
    """Checks where the data of a graph lie.

    Raises FormatError unless every data file is a plain file in `folder`, and exactly as long as
    its tensors need. The file of another graph may be longer, because that graph checks it.
    """
    others = {f"{graph}.onnx.data" for graph in GRAPHS} - {f"{name}.data"}
    ends: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location == _EXTERNAL:
            location, end = _span(folder, name, tensor)
            ends[location] = max(ends.get(location, 0), end)
    for location, end in ends.items():
        file = folder / location
        if not file.is_file():
            raise FormatError(f"{file}: missing; export again")
        if file.stat().st_nlink > 1:
            raise FormatError(
                f"{file}: a hard link, which the onnx package refuses to read; copy the file"
            )
        size = file.stat().st_size
        if size < end or (size > end and location not in others):
            raise FormatError(f"{file}: {size} bytes where the graph needs {end}; export again")


def _span(folder: Path, name: str, tensor: TensorProto) -> tuple[str, int]:
    """The file of an external tensor, and where in it the tensor's data end."""
    entry = {e.key: e.value for e in tensor.external_data}
    location = entry.get("location", "")
    file = folder / location
    if location in ("", ".", "..") or Path(location).name != location or file.is_symlink():
        raise FormatError(
            f"{folder / name}: {tensor.name} points outside the folder ({location}); do not load it"
        )
    offset, length = entry.get("offset", "0"), entry.get("length", "")
    if not (offset.isdecimal() and length.isdecimal()):
        raise FormatError(
            f"{folder / name}: {tensor.name} lies at {offset!r}, {length!r} bytes; export again"
        )
    return location, int(offset) + int(length)
