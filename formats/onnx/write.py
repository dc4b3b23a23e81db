"""Writes an artifact as vision.onnx, embedding.onnx and text.onnx, each with one data file.

The output matrix of a tied model is written once, in the data file of embedding.onnx. text.onnx
points there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.onnx.genai_config import write_genai
from vlmq_export.formats.onnx.graphs.build import float_graphs
from vlmq_export.formats.onnx.graphs.edit import shape_of
from vlmq_export.formats.onnx.passes.fill import fill
from vlmq_export.formats.onnx.passes.fuse import fuse, fuse_transposed
from vlmq_export.formats.onnx.passes.merge import merge, merge_side_by_side
from vlmq_export.formats.onnx.passes.widen import widen
from vlmq_export.formats.onnx.plan import notes_for
from vlmq_export.quantizer.artifact.read import Artifact

_INLINE_BYTES = 1024  # smaller constants stay in the protobuf


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write the whole VLM into an empty folder. Returns notes for log and card.

    Raises FormatError where graphs and artifact do not fit together.
    """
    found: list[str] = []
    linears = artifact.linear_names()
    parts = (f"{name}.{part}" for name in linears for part in ("weight", "bias"))
    known = {*artifact.float_names(), *parts}
    dtype = ir.DataType.FLOAT16 if options.onnx_dtype == "float16" else ir.DataType.FLOAT
    notes, written = notes_for(artifact_plan(artifact), options), {}
    for name, model in float_graphs(artifact.source, known, dtype).items():
        fused, single = name == "text" and options.onnx_fused, options.onnx_graph == "single"
        if fused and not fuse(model, _mrope_section(artifact.architecture.text), single=single):
            raise FormatError(
                f"the decoder graph of {artifact.manifest.model_type} has no attention to fuse;"
                " use --onnx-graph plain"
            )
        found += fill(model, artifact, options.onnx_accuracy_level)
        if name == "text":
            merge_side_by_side(model)
        if fused:
            merge(model)
        if options.onnx_fused:
            fuse_transposed(model)
        widen(model)
        save(model, folder / f"{name}.onnx", written)
        if name == "embedding":
            written = _tied_head(model, artifact)
    missing = set(linears) - set(found)
    if missing or len(found) != len(linears):
        raise FormatError(
            f"{len(missing)} quantized linears have no node in the graphs,"
            f" first {min(missing, default='twice')}"
        )
    for file in sorted(artifact.source.iterdir()):
        shutil.copyfile(file, folder / file.name)
    return [*notes, *write_genai(artifact, folder, options)]


def _mrope_section(text: dict) -> list[int] | None:
    """How many frequencies turn with the temporal, height and width position.

    None for a model whose tokens have one position each.
    """
    section = text["rope_parameters"].get("mrope_section")
    return None if section is None else [int(n) for n in section]


def _tied_head(embedding: ir.Model, artifact: Artifact) -> dict[str, ir.ExternalTensor]:
    """The output matrix of a tied model, as the bytes of the embedding that has been saved.

    Its parts by their names in the decoder's graph: one float table, or codes, scales and
    zero-points. Empty for a model with an output matrix of its own; what is stored within the
    graph's file is left out.
    """
    family = artifact.architecture.family
    if {"lm_head.weight", family.head} & {*artifact.float_names(), *artifact.records}:
        return {}
    tables = {
        name.replace(family.embedding, "lm_head"): value.const_value
        for name, value in embedding.graph.initializers.items()
        if name.startswith(f"{family.embedding}.")
    }
    return {name: t for name, t in tables.items() if isinstance(t, ir.ExternalTensor)}


def save(
    model: ir.Model, path: Path, written: Mapping[str, ir.ExternalTensor] = MappingProxyType({})
) -> None:
    """Write one graph and its data file. Both are new, and everyone can read them.

    written: initializers whose data lie in the file of another graph, where they stay.

    Afterwards the large constants of `model` are those of the data file. Raises FormatError where a
    constant cannot be made.
    """
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # or the new data would be appended to the old
    elsewhere = [(v, written[n]) for n, v in model.graph.initializers.items() if n in written]
    for value, _ in elsewhere:
        value.const_value = None  # what has no value is not written
    try:
        ir.external_data.unload_from_model(
            model, path.parent, data.name, size_threshold_bytes=_INLINE_BYTES
        )
        for value, tensor in elsewhere:
            value.const_value = ir.ExternalTensor(
                tensor.location,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(shape_of(value)),
                name=value.name or "",
                base_dir=path.parent,
            )
        ir.save(model, path)
    # What a lazy constant raises is wrapped once for each level of the graph.
    except ir.serde.SerdeError as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, FormatError):
            cause = cause.__cause__
        raise (cause or e) from None
    for file in (path, data):
        file.chmod(0o644)
