"""Artifact → the two files of a GGUF export."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf import imatrix
from vlmq_export.formats.gguf.metadata import file_stem
from vlmq_export.formats.gguf.mmproj import write_mmproj
from vlmq_export.formats.gguf.params import image_params, vision_params
from vlmq_export.formats.gguf.plan import plan, plan_notes
from vlmq_export.formats.gguf.text import choose_homes, dominant, parameters, write_text
from vlmq_export.plan import artifact_plan
from vlmq_export.quantizer.artifact import Artifact

LLAMA_CPP_TOKENS = 4096  # of one image, where an mmproj does not say


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write both files into `folder`. Refuses before it writes; raises FormatError with one line."""
    model = artifact_plan(artifact)
    if refusals := plan(model, options).refusals:
        raise FormatError(refusals[0])
    homes = choose_homes(artifact)
    size = parameters(artifact)
    text = folder / f"{file_stem(options.name, size, artifact.config.gguf_type or dominant(artifact, homes))}.gguf"
    energies = imatrix.energies(artifact) if options.gguf_imatrix else {}
    vision = folder / f"mmproj-{file_stem(options.name, size, options.mmproj_dtype)}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_mmproj(artifact, vision, options.mmproj_dtype, options.name, options.mmproj_class_row)
        write_text(artifact, text, options, homes=homes)
        if energies:
            imatrix.write_imatrix(folder / imatrix.IMATRIX, energies, artifact.manifest.calibration)
    except BaseException:
        for file in (
            text,
            vision,
            folder / imatrix.IMATRIX,
            *folder.glob(f"{escape(text.stem)}-*-of-*.gguf"),
        ):  # all or none
            file.unlink(missing_ok=True)
        raise
    return [*plan_notes(model, homes), *_image_note(artifact)]


def _image_note(artifact: Artifact) -> list[str]:
    """The processor's own pixel limits go into the mmproj; a large one means long prompts."""
    most = image_params(artifact.source).max_pixels or 0
    p = vision_params(artifact.source_config)
    tokens = most // (p.graph.merge * p.patch) ** 2
    if tokens <= LLAMA_CPP_TOKENS:
        return []
    return [
        f"images keep the processor's limit of {tokens} tokens (llama.cpp's own is {LLAMA_CPP_TOKENS}); --image-max-tokens lowers it"
    ]
