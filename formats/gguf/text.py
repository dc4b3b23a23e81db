"""The language model as a GGUF file: every linear in the exact home of its grid, everything else as in the source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf.complete import require_complete
from vlmq_export.formats.gguf.homes import home_of, pack_linear
from vlmq_export.formats.gguf.metadata import add_general, add_keys, add_tokenizer, read_tokenizer
from vlmq_export.formats.gguf.names import text_shapes, text_to_hub, without_place
from vlmq_export.formats.gguf.params import TextParams, text_params
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.formats.gguf.writer import Entry, float_bytes, source_type, write_shards
from vlmq_export.quantizer.artifact import Artifact

if TYPE_CHECKING:
    import gguf


def choose_homes(artifact: Artifact) -> dict[str, str]:
    """Hub name of every quantized linear → its block type. Raises FormatError where there is none."""
    return {linear.name: home_of(linear) for linear in artifact.linears()}


def dominant(artifact: Artifact, homes: dict[str, str]) -> str:
    """The type that most weights have."""
    weights: Counter[str] = Counter()
    for name, home in homes.items():
        weights[home] += artifact.records[name].out_features * artifact.records[name].in_features
    return weights.most_common(1)[0][0]


def parameters(artifact: Artifact) -> int:
    """Number of weights of the language model."""
    return sum(int(np.prod(s)) for s in text_shapes(text_params(artifact.source_config)).values())


def write_text(
    artifact: Artifact, path: Path, options: FormatOptions, twin: bool = False, *, homes: dict[str, str] | None = None
) -> None:
    """Write the text model; with `twin`, every weight as the float32 number that it decodes to.

    `homes`: hub name → block type, chosen from the integers if not given. Raises FormatError naming what cannot be
    written, or what llama.cpp would silently miss in the written file.
    """
    p = text_params(artifact.source_config)
    tokenizer = read_tokenizer(artifact.source, artifact.source_config, p.vocabulary)
    if twin:
        homes = dict.fromkeys(artifact.linear_names(), "F32")
    elif homes is None:
        homes = choose_homes(artifact)
    main = dominant(artifact, homes)
    label = "F32" if twin else artifact.config.gguf_type or main

    def metadata(writer: gguf.GGUFWriter) -> None:
        add_general(writer, artifact, kind="model", name=options.name, parameters=parameters(artifact), dominant=label)
        add_keys(writer, p.keys())
        add_tokenizer(writer, tokenizer)

    entries = _entries(artifact, p, homes, twin)
    first = write_shards(path, p.graph.arch, metadata, entries, 0 if twin else options.gguf_split_bytes)
    require_complete(first, artifact.source_config, artifact.source)


def _entries(artifact: Artifact, p: TextParams, homes: dict[str, str], twin: bool) -> list[Entry]:
    if lost := without_place(artifact.source_config, [*artifact.float_names(), *(f"{n}.weight" for n in homes)]):
        raise FormatError(f"{artifact.path}: {', '.join(lost[:4])} would be lost: {p.graph.arch} has no place for it")
    hub_names = text_to_hub(artifact.source_config)
    dtypes = {name: dtype for name, _, dtype in artifact.float_info()}
    biases = {f"{name}.bias": name for name, r in artifact.records.items() if r.bias}
    entries = []
    for name, shape in text_shapes(p).items():
        hub = hub_names[name]
        linear = hub.removesuffix(".weight")
        if linear in homes:
            kind = homes[linear]
            data = _decoded(artifact, linear) if twin else _packed(artifact, linear, kind)
        elif hub in biases:
            kind, data = "F32", _bias(artifact, biases[hub])
        elif hub in dtypes:
            kind = "F32" if twin or len(shape) == 1 else source_type(dtypes[hub])  # llama.cpp wants vectors in F32
            data = _float(artifact, hub, kind)
        else:
            raise FormatError(f"{artifact.path}: {hub} is missing from the artifact; the GGUF would lack {name}")
        entries.append(Entry(name, shape, kind, data))
        if len(shape) == 2 and shape[1] % TYPES[kind].block:
            raise FormatError(f"{linear}: rows of {shape[1]} columns do not fit {kind}'s blocks of {TYPES[kind].block}")
    return entries


# One closure each, bound by argument: the tensors are read when their turn in the file comes.
def _packed(artifact: Artifact, linear: str, kind: str):
    return lambda: pack_linear(artifact.linear(linear), kind)


def _decoded(artifact: Artifact, linear: str):
    return lambda: artifact.linear(linear).decode().numpy()


def _bias(artifact: Artifact, linear: str):
    return lambda: float_bytes(artifact.linear(linear).bias, "F32")


def _float(artifact: Artifact, hub: str, kind: str):
    return lambda: float_bytes(artifact.float_tensor(hub), kind)
