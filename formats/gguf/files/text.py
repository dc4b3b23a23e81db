"""Writes the language model as a GGUF file.

Every linear gets the block type that holds its grid exactly. Everything else is as in the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.completeness import require_complete
from vlmq_export.formats.gguf.files.container import Entry, float_bytes, source_type, write_shards
from vlmq_export.formats.gguf.files.metadata import add_general, add_keys
from vlmq_export.formats.gguf.files.tokenizer import read_tokenizer
from vlmq_export.formats.gguf.tables.layout import Layout, Place
from vlmq_export.formats.gguf.types.exact import home_of, pack_linear
from vlmq_export.formats.gguf.types.order import in_order
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.artifact.manifest import VISION
from vlmq_export.quantizer.artifact.read import Artifact

if TYPE_CHECKING:
    import gguf


def choose_homes(artifact: Artifact) -> dict[str, str]:
    """Hub name of every quantized linear of the language model → its block type.

    Raises FormatError for a linear that no block type holds exactly.
    """
    records = artifact.records.values()
    return {r.name: home_of(artifact.linear(r.name)) for r in records if r.layer != VISION}


def together(homes: dict[str, str], layout: Layout) -> dict[str, str]:
    """The same with one type for experts of one tensor: the largest, which holds them all."""
    found = dict(homes)
    for place in layout.text.values():
        names = [hub.removesuffix(".weight") for hub in place.hubs]
        if place.experts and found.keys() >= {*names}:
            kinds = [homes[name] for name in names]
            found |= dict.fromkeys(names, max(kinds, key=lambda k: TYPES[k].bits_per_weight))
    return found


def dominant(artifact: Artifact, homes: dict[str, str]) -> str:
    """The type that most weights have."""
    weights: Counter[str] = Counter()
    for name, home in homes.items():
        weights[home] += artifact.records[name].out_features * artifact.records[name].in_features
    return weights.most_common(1)[0][0]


def parameters(layout: Layout) -> int:
    """The number of weights of the language model."""
    return sum(prod(place.shape) for place in layout.text.values())


def write_text(
    artifact: Artifact,
    layout: Layout,
    path: Path,
    options: FormatOptions,
    twin: bool = False,  # whether every weight is written as the float32 number it decodes to
    *,
    homes: dict[str, str] | None = None,  # hub name → block type; None: chosen from the integers
) -> None:
    """Write the text model.

    Raises FormatError for what cannot be written, and for what llama.cpp would silently miss in the
    written file.
    """
    p = layout.text_params
    tokenizer = read_tokenizer(artifact.source, layout.architecture, p.vocabulary)
    if twin:
        homes = dict.fromkeys(artifact.linear_names(), "F32")
    elif homes is None:
        homes = choose_homes(artifact)
    homes = together(homes, layout)
    main = dominant(artifact, homes)
    label = "F32" if twin else artifact.config.gguf_type or main

    def metadata(writer: gguf.GGUFWriter) -> None:
        add_general(
            writer,
            artifact,
            kind="model",
            name=options.name,
            parameters=parameters(layout),
            dominant=label,
        )
        add_keys(writer, p.keys() | tokenizer.keys())

    entries = _entries(artifact, layout, homes, twin)
    limit = 0 if twin else options.gguf_split_bytes
    first = write_shards(path, p.graph.arch, metadata, entries, limit)
    require_complete(first, layout, artifact.source)


def _entries(artifact: Artifact, layout: Layout, homes: dict[str, str], twin: bool) -> list[Entry]:
    """The tensors of the file.

    Raises FormatError for a tensor of the artifact that the file has no place for, for a place that
    the artifact has no tensor for, and for rows that do not fill the blocks of their type.
    """
    weights = [*artifact.float_names(), *(f"{name}.weight" for name in homes)]
    if lost := layout.without_place(weights):
        arch = layout.text_params.graph.arch
        raise FormatError(
            f"{artifact.path}: {', '.join(lost[:4])} would be lost: {arch} has no place for it"
        )
    dtypes = {name: dtype for name, _, dtype in artifact.float_info()}
    biases = {f"{name}.bias": name for name, r in artifact.records.items() if r.bias}
    entries = []
    for name, place in layout.text.items():
        hub, shape = place.hub, place.shape
        linear = hub.removesuffix(".weight")
        if linear in homes:
            kind = homes[linear]
            data = decoded(artifact, place) if twin else packed(artifact, place, kind)
        elif hub in biases:
            kind, data = "F32", bias_of(artifact, biases[hub], place)
        elif hub in dtypes:
            # llama.cpp wants vectors in F32.
            kind = "F32" if twin or place.wide or len(shape) == 1 else source_type(dtypes[hub])
            data = _float(artifact, place, kind)
        else:
            raise FormatError(
                f"{artifact.path}: {hub} is missing from the artifact; the GGUF would lack {name}"
            )
        if len(shape) > 1 and shape[-1] % TYPES[kind].block:
            raise FormatError(
                f"{linear}: rows of {shape[-1]} columns do not fit {kind}'s blocks of"
                f" {TYPES[kind].block}"
            )
        entries.append(Entry(name, shape, kind, data))
    return entries


# The following return functions, so that a tensor is read when its turn in the file comes.


def packed(artifact: Artifact, place: Place, kind: str) -> Callable[[], np.ndarray]:
    """The blocks of a linear, or of experts one behind the other."""
    linears = [hub.removesuffix(".weight") for hub in place.hubs]

    def one(name: str) -> np.ndarray:
        return place.of_rows(pack_linear(in_order(artifact.linear(name), place), kind))

    def read() -> np.ndarray:
        parts = [one(name) for name in linears]
        return np.concatenate(parts) if place.experts else parts[0]

    return read


def decoded(artifact: Artifact, place: Place) -> Callable[[], np.ndarray]:
    """The weights that a linear decodes to, float32, or experts one behind the other."""
    linears = [hub.removesuffix(".weight") for hub in place.hubs]

    def read() -> np.ndarray:
        parts = [place.of_array(artifact.linear(name).decode().numpy()) for name in linears]
        return np.concatenate(parts) if place.experts else parts[0]

    return read


def bias_of(artifact: Artifact, linear: str, place: Place) -> Callable[[], np.ndarray]:
    """The bias of a linear, float32."""

    def read() -> np.ndarray:
        bias = artifact.linear(linear).bias
        assert bias is not None, "the record says that there is a bias"
        return float_bytes(place.of(bias), "F32")

    return read


def _float(artifact: Artifact, place: Place, kind: str) -> Callable[[], np.ndarray]:
    """A tensor that is not quantized."""
    return lambda: float_bytes(place.of(artifact.float_tensor(place.hub)), kind)
