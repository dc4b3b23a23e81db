"""Writes the two GGUF files of an artifact, a Modelfile, and the importance matrix if asked for."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.files import imatrix
from vlmq_export.formats.gguf.files.metadata import file_stem
from vlmq_export.formats.gguf.files.mmproj import dominant_type, write_mmproj
from vlmq_export.formats.gguf.files.modelfile import MODELFILE, modelfile, stop_tokens
from vlmq_export.formats.gguf.files.text import choose_homes, dominant, parameters, write_text
from vlmq_export.formats.gguf.files.tokenizer import Tokenizer, read_tokenizer
from vlmq_export.formats.gguf.plan import plan, plan_notes, token_notes, vision_notes
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.gguf.tables.params import image_params
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.samples.companions import load_image_processor
from vlmq_export.quantizer.storage.whole_files import write_atomic

LLAMA_CPP_TOKENS = 4096  # the most tokens of an image where an mmproj sets no limit


def write(artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
    """Write the files into `folder`. Returns notes for the log and the card.

    Raises FormatError with one line for an export that is refused, before anything is written. If
    writing fails, none of the files is left.
    """
    model = artifact_plan(artifact)
    if refusals := plan(model, options).refusals:
        raise FormatError(refusals[0])
    layout = Layout.of(artifact.architecture, options.mmproj_class_row, artifact.source)
    tokenizer = read_tokenizer(artifact.source, layout.architecture, layout.text_params.vocabulary)
    homes = choose_homes(artifact)
    size = parameters(layout)
    mix = artifact.config.gguf_type or dominant(artifact, homes)
    tower = dominant_type(artifact, options.mmproj_dtype)
    text = folder / f"{file_stem(options.name, size, mix)}.gguf"
    vision = folder / f"mmproj-{file_stem(options.name, size, tower)}.gguf"
    matrix = folder / imatrix.IMATRIX
    energies = imatrix.energies(artifact, layout) if options.gguf_imatrix else {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_mmproj(artifact, layout, vision, options.mmproj_dtype, options.name)
        write_text(artifact, layout, text, options, homes=homes)
        if energies:
            imatrix.write_imatrix(matrix, energies, artifact.manifest.calibration)
        _write_modelfile(artifact, tokenizer, text, vision)
    except BaseException:
        for file in (*_written(text), vision, matrix, folder / MODELFILE):
            file.unlink(missing_ok=True)
        raise
    notes = [*plan_notes(model, homes), *vision_notes(model, layout, options)]
    return [*notes, *token_notes(tokenizer), *_image_note(artifact, layout)]


def _written(text: Path) -> list[Path]:
    """The file of the text model, or those that it was split into."""
    parts = sorted(text.parent.glob(f"{escape(text.stem)}-*-of-*.gguf"))
    return parts or [text]


def _write_modelfile(artifact: Artifact, tokenizer: Tokenizer, text: Path, vision: Path) -> None:
    """Write the Modelfile beside the files that it names."""
    names = [file.name for file in (*_written(text), vision)]
    content = modelfile(names, stop_tokens(artifact.source, tokenizer))
    write_atomic(text.with_name(MODELFILE), lambda path: path.write_text(content, "utf-8"))


def _image_note(artifact: Artifact, layout: Layout) -> list[str]:
    """Says so if images may take more tokens than llama.cpp would let them.

    The mmproj has the pixel limits of the source's image processor, and a high limit makes long
    prompts. Some mmproj can have none.
    """
    most = image_params(artifact.source).max_pixels or 0
    p = layout.vision_params
    unit = p.merge * p.patch
    if own := p.graph.most:
        longest = -(-load_image_processor(artifact.source).size["longest_edge"] // unit)
        return [
            f"llama.cpp makes images of more than {own} tokens smaller, where the processor leaves"
            f" them up to {longest**2}; --image-max-tokens raises it"
        ]
    tokens = most // unit**2
    if tokens <= LLAMA_CPP_TOKENS:
        return []
    return [
        f"images keep the processor's limit of {tokens} tokens (llama.cpp's own is"
        f" {LLAMA_CPP_TOKENS}); --image-max-tokens lowers it"
    ]
