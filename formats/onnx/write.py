"""Writes an artifact as vision.onnx, embedding.onnx and text.onnx, each with one data file."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.onnx.genai_config import write_genai
from vlmq_export.formats.onnx.graphs.build import float_graphs
from vlmq_export.formats.onnx.passes.fill import fill
from vlmq_export.formats.onnx.passes.fuse import fuse, fuse_transposed
from vlmq_export.formats.onnx.passes.merge import merge
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
    notes = notes_for(artifact.config, options)
    for name, model in float_graphs(artifact.source, known, dtype).items():
        fused, single = name == "text" and options.onnx_fused, options.onnx_graph == "single"
        if fused and not fuse(model, _mrope_section(artifact.architecture.text), single=single):
            raise FormatError(
                f"the decoder graph of {artifact.manifest.model_type} has no attention to fuse;"
                " use --onnx-graph plain"
            )
        found += fill(model, artifact, options.onnx_accuracy_level)
        if fused:
            merge(model)
        if options.onnx_fused:
            fuse_transposed(model)
        save(model, folder / f"{name}.onnx")
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


def save(model: ir.Model, path: Path) -> None:
    """Write one graph and its data file. Both are new, and everyone can read them.

    Raises FormatError where a constant cannot be made.
    """
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # or the new data would be appended to the old
    try:
        ir.save(model, path, external_data=data.name, size_threshold_bytes=_INLINE_BYTES)
    # What a lazy constant raises is wrapped once for each level of the graph.
    except ir.serde.SerdeError as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, FormatError):
            cause = cause.__cause__
        raise (cause or e) from None
    for file in (path, data):
        file.chmod(0o644)
