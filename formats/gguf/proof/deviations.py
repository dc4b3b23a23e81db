"""Where the installed llama.cpp computes something else than transformers.

It is probed in each run, so that a build which no longer deviates shows here first. None of these
rows gates, because the gates are about the files. The pictures of the gated rows are resized before
either side sees them, so that both see the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.hooks import RemovableHandle

from vlmq_export.formats.gguf.files.mmproj import CLASS_ROW
from vlmq_export.formats.gguf.proof.rows import Exported, image_error
from vlmq_export.formats.gguf.proof.twin_file import copy_container
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.runtime import runner
from vlmq_export.formats.gguf.runtime.prompts import Prompts, mtmd_rows
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.proof.checks import Check, relative_error
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.image_rules import Lines, Tiles, resized
from vlmq_export.quantizer.samples.sample import Sample

CUT = 4  # most prompts through mtmd where it cuts each image into many tiles, and encodes them all
_STRETCHED = 0.05  # most error of embeddings where mtmd resizes as transformers does


def _info(name: str, value: float | None, detail: str, worst: str = "") -> Check:
    return Check("gguf", "L3", name, "info", value, None, "rel", 1, detail, worst)


def rms_epsilon(layout: Layout, printed: float) -> str:
    """What llama.cpp's load log says of the norms of the language model."""
    own = layout.text_params.rms_eps
    if np.float32(printed) == np.float32(own):
        return f"llama.cpp reads config.json's RMS epsilon ({own:g})"
    return f"llama.cpp computes with the RMS epsilon {printed:g} where config.json says {own:g}"


def many_tiles(export: Exported) -> bool:
    """Whether mtmd cuts every image into a grid of tiles."""
    rule = export.reference.preprocessor.images
    return isinstance(rule, Tiles) and rule.longest > rule.side


def as_mtmd_cuts(export: Exported, sample: Sample) -> Sample:
    """The sample with its images cut as mtmd will cut them.

    mtmd enlarges an image as the processor does, whatever the limit on a sample's length. Where the
    processor gives one tile, mtmd gives a grid of that one tile and then the whole image, so that
    the model sees the same pixels twice.
    """
    preprocessor = export.reference.preprocessor
    rule = preprocessor.images
    if not isinstance(rule, Tiles) or not sample.images:
        return sample
    assert sample.row is not None and sample.pixel_values is not None, "it has images"
    if many_tiles(export):
        whole = preprocessor.sample(sample.row, prompt_only=True)
        return whole if whole.images[0].size != sample.images[0].size else sample
    token = preprocessor.image_token
    ids = preprocessor.ids(sample.text, [rule.text(1, 1, token)] * len(sample.images))
    return replace(
        sample,
        input_ids=torch.tensor(ids),
        vision=torch.tensor(ids) == preprocessor.image_token_id,
        answer=torch.zeros(len(ids), dtype=torch.bool),
        pixel_values=sample.pixel_values.repeat_interleave(2, dim=0),
        id=f"{sample.id}, twice",
    )


def seen_twice(export: Exported, sample: Sample, cut: Sample) -> Iterator[Check]:
    """What it costs that mtmd cuts an image which the processor leaves whole."""
    if cut.id == sample.id:
        return
    before, after = (export.reference.logits(s)[-1] for s in (sample, cut))
    yield _info(
        "an image of one tile, which mtmd gives twice",
        relative_error(after, before),
        f"{int(cut.vision.sum())} image tokens where the processor makes"
        f" {int(sample.vision.sum())}; the reference's own logits of the next token for both",
        sample.id,
    )


def line_breaks(export: Exported, sample: Sample) -> Iterator[Check]:
    """What it costs a caller to give an image alone, where the processor writes line breaks too."""
    around = export.layout.vision_params.graph.around
    if not around:
        return
    preprocessor = export.reference.preprocessor
    token = preprocessor.image_token
    written = preprocessor.images.encode(sample.images, token).written
    bare = [text.removeprefix(around).removesuffix(around) for text in written]
    ids = torch.tensor(preprocessor.ids(sample.text, bare))
    without = replace(
        sample,
        input_ids=ids,
        vision=ids == preprocessor.image_token_id,
        answer=torch.zeros(len(ids), dtype=torch.bool),
        id=f"{sample.id}, bare",
    )
    before, after = (export.reference.logits(s)[-1] for s in (sample, without))
    yield _info(
        "an image without the line breaks around it",
        relative_error(after, before),
        f"the processor writes {around!r} before and behind an image, and mtmd does not; here they"
        " stand around the marker; the reference's own logits of the next token",
        sample.id,
    )


def oblong(export: Exported, sample: Sample) -> Sample:
    """The sample with pictures of a shape that no tower takes as it is."""
    p, reference = export.layout.vision_params, export.reference
    rule, pixels = reference.preprocessor.images, sample.pixel_values
    unit = p.merge * p.patch
    longest = rule.longest if many_tiles(export) and isinstance(rule, Tiles) else p.image
    size = (6 * unit, 4 * unit + unit // 3) if p.graph.any_size else (longest, longest * 2 // 3)
    images = tuple(image.resize(size, Image.Resampling.BICUBIC) for image in sample.images)
    token = reference.preprocessor.image_token
    shown, ids = images, {}
    if isinstance(rule, Lines):  # whose `encode` takes images that have their size
        shown = tuple(resized(image, rule.size(image.size)) for image in images)
    encoded = rule.encode(shown, token)
    inputs = encoded.inputs
    if isinstance(rule, Tiles) and pixels is not None and len(inputs["pixel_values"]) < len(pixels):
        inputs["pixel_values"] = inputs["pixel_values"].repeat_interleave(2, dim=0)
    if isinstance(rule, Lines):
        tokens = torch.tensor(reference.preprocessor.ids(sample.text, encoded.written))
        ids = {"input_ids": tokens, "vision": tokens == reference.preprocessor.image_token_id}
    layout = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    return replace(
        sample,
        id=f"{sample.id}-oblong",
        images=images,
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs.get("image_grid_thw"),
        layout=layout,
        **ids,
    )


def resizing(
    reference: Reference,
    layout: Layout,
    sample: Sample,  # an `oblong` one
    got: np.ndarray,  # mtmd's embeddings of its images, [image tokens, width]
) -> Check:
    """Whether mtmd resizes a picture as transformers does."""
    want = mtmd_rows(reference, layout, sample)
    size = "{} × {}".format(*sample.images[0].size)
    name = "mtmd's own resizing"
    if got.shape != want.shape:
        tokens = f"{len(got)} image tokens for a picture of {size}, {len(want)} in transformers"
        return _info(name, None, tokens)
    value = relative_error(got, want)
    how = "stretches it as transformers does"
    if value > _STRETCHED:
        how = "keeps its shape on a plain ground, transformers stretches it"
    seen = "pictures are resized here before either sees them"
    return _info(name, value, f"a picture of {size}: mtmd {how}; {seen}")


def half_precision(
    export: Exported,
    samples: Sequence[Sample],
    got: Mapping[str, np.ndarray],  # sample → mtmd's embeddings, [image tokens, width]
    plain: float,  # worst error against the reference as it is
) -> Check:
    """The gated error of mtmd's embeddings again, with a reference that rounds as llama.cpp."""
    with _rounding_like_llama_cpp(export):
        errors = {s.id: image_error(export, s, got[s.id]) for s in samples}
    worst = max(errors, key=lambda name: errors[name])
    return _info(
        "image embeddings of mtmd, the reference rounding as it does",
        errors[worst],
        "pixels and patch weights in float16, GELU as the tanh form from a float16 table;"
        f" {plain:.1e} without",
        worst,
    )


@contextmanager
def _rounding_like_llama_cpp(export: Exported) -> Iterator[None]:
    """The reference's vision tower with ggml's im2col in float16 and with its GELU tables.

    Source: ggml/src/ggml-cpu at llama.cpp b11549.
    """
    places, model = export.layout.vision, export.reference.model
    patches = model.get_submodule(places["v.patch_embd.weight"].module.removesuffix(".weight"))
    weight = patches.weight.data
    patches.weight.data = weight.half().float()
    hooks = [patches.register_forward_pre_hook(lambda _, args: (_half(args[0]), *args[1:]))]
    # The first two parts of a name tell the tower, the projector, or a tensor without a module.
    towers = {".".join(place.module.split(".")[:2]) for place in places.values()}
    for tower in towers - {"model.image_newline", "model.language_model"}:
        hooks += [
            _looked_up(module, _TABLES[kind])
            for module in model.get_submodule(tower).modules()
            if (kind := type(module).__name__) in _TABLES
        ]
    try:
        yield
    finally:
        patches.weight.data = weight
        for hook in hooks:
            hook.remove()


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def _looked_up(module: torch.nn.Module, function: Callable) -> RemovableHandle:
    """Make a module compute `function` as a table of float16 has it."""
    return module.register_forward_hook(lambda _, args, __: _half(function(_half(args[0]))))


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


_TABLES = {  # class of an activation in transformers → what llama.cpp's table holds
    "GELU": _tanh_gelu,
    "GELUActivation": _tanh_gelu,
    "GELUTanh": _tanh_gelu,
    "PytorchGELUTanh": _tanh_gelu,
    "QuickGELUActivation": _quick_gelu,
}


def class_row(
    export: Exported,
    sample: Sample,
    shipped: float,  # error of the sample's embeddings as the file ships
    scratch: Path,
) -> Iterator[Check]:
    """For a tower with a class token: the same picture with that token's row at the other end."""
    said = GGUFFile(export.mmproj).metadata.get(CLASS_ROW)
    if said is None:
        return
    other = {"last": "first", "first": "last"}[str(said)]
    flipped, step = scratch / "mmproj-other.gguf", 1 if said == "last" else -1

    def change(name: str, array: np.ndarray) -> np.ndarray:
        return np.roll(array, step, axis=0) if name == "v.position_embd.weight" else array

    copy_container(export.mmproj, flipped, change=change)
    reference = export.reference
    request = Prompts(reference, export.layout, scratch).mtmd(sample, "other")
    run = runner.run(scratch, export.text, flipped, [request], reference, export.threads, 1)
    got = run.array(run.prompts[0]["image"])
    value = image_error(export, sample, got)
    right = said if shipped < value else other
    yield _info(
        f"image embeddings with the class token's position row {other}",
        value,
        f"{shipped:.1e} with it {said}, as in this file;"
        f" this build wants it {right} (--class-row {right})",
        sample.id,
    )
