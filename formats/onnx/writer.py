"""artifact → vision.onnx, embedding.onnx, text.onnx, each with one data file, and what must lie beside them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import onnx_ir as ir

from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.onnx.fill import fill
from vlmq_export.formats.onnx.fuse import fuse, fuse_transposed
from vlmq_export.formats.onnx.genai import write_genai
from vlmq_export.formats.onnx.graphs import float_graphs
from vlmq_export.formats.onnx.merge import merge
from vlmq_export.formats.onnx.planning import is_fused, notes_for
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.families import text_config

log = logging.getLogger("vlmq_export")
_INLINE_BYTES = 1024  # smaller constants stay in the protobuf


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """The whole VLM into an empty folder. Returns notes for log and card; raises FormatError on any miss."""
    found: list[str] = []
    known = {*artifact.float_names(), *(f"{n}.{part}" for n in artifact.linear_names() for part in ("weight", "bias"))}
    dtype = ir.DataType.FLOAT16 if options.onnx_dtype == "float16" else ir.DataType.FLOAT
    notes = notes_for(artifact.config, options)
    for name, model in float_graphs(artifact.source, known, dtype).items():
        fused, single = name == "text" and is_fused(options), options.onnx_graph == "single"
        if fused and not fuse(model, _mrope_section(artifact.source_config), single=single):
            raise FormatError(
                f"the decoder graph of {artifact.manifest.model_type} has no attention to fuse; use --onnx-graph plain"
            )
        found += fill(model, artifact, options.onnx_accuracy_level)
        if fused:
            merge(model)
        if is_fused(options):
            fuse_transposed(model)
        save(model, folder / f"{name}.onnx")
    missing = set(artifact.linear_names()) - set(found)
    if missing or len(found) != len(artifact.linear_names()):
        raise FormatError(
            f"{len(missing)} quantized linears have no node in the graphs, first {min(missing, default='twice')}"
        )
    for file in sorted(artifact.source.iterdir()):
        shutil.copyfile(file, folder / file.name)
    return [*notes, *write_genai(artifact, folder, options)]


def _mrope_section(config: dict) -> list[int] | None:
    """Frequencies of the temporal, height and width position; None for a model with one position a token."""
    text = text_config(config)
    section = (text.get("rope_parameters") or text.get("rope_scaling") or {}).get("mrope_section")
    return None if section is None else [int(n) for n in section]


def save(model: ir.Model, path: Path) -> None:
    """One graph and its data file, both new, both readable by everyone."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # never append to an old one
    try:
        ir.save(model, path, external_data=data.name, size_threshold_bytes=_INLINE_BYTES)
    except ir.serde.SerdeError as e:  # what a lazy constant raises comes wrapped, once a level of the graph
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, FormatError):
            cause = cause.__cause__
        raise (cause or e) from None
    for file in (path, data):
        file.chmod(0o644)
