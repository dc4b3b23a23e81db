"""Where the installed llama.cpp computes something else than transformers: probed in each run, named in the report.

None of these rows gates: the gates hold the files, and the pictures of the gated rows are resized so that both sides see
the same pixels. A build that no longer deviates shows here first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmq_export.formats.base import Check, relative_error
from vlmq_export.formats.gguf import runner
from vlmq_export.formats.gguf.mmproj import CLASS_ROW
from vlmq_export.formats.gguf.names import vision_places
from vlmq_export.formats.gguf.params import text_params, vision_params
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.twin import copy_container
from vlmq_export.quantizer.calibration import Sample
from vlmq_export.reference import Reference


def _info(name: str, value: float | None, detail: str, worst: str = "") -> Check:
    return Check("gguf", "L3", name, "info", value, None, "rel", 1, detail, worst)


def rms_epsilon(reference: Reference, printed: float) -> str:
    """What the load log says of the language model's norms."""
    own = text_params(reference.config).rms_eps
    if np.float32(printed) == np.float32(own):
        return f"llama.cpp reads config.json's RMS epsilon ({own:g})"
    return f"llama.cpp computes with the RMS epsilon {printed:g} where config.json says {own:g}"


# --- images that need resizing ----------------------------------------------------------------------------------------


def oblong(reference: Reference, sample: Sample) -> Sample:
    """The sample with pictures of a shape that no tower takes as it is, and what transformers makes of them."""
    p = vision_params(reference.config)
    unit = p.graph.merge * p.patch
    size = (6 * unit, 4 * unit + unit // 3) if p.graph.any_size else (p.image, p.image * 2 // 3)
    images = tuple(image.resize(size, Image.Resampling.BICUBIC) for image in sample.images)
    inputs = reference.preprocessor.images.encode(images).inputs
    layout = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    return replace(
        sample, id=f"{sample.id}-oblong", images=images, pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs.get("image_grid_thw"), layout=layout,
    )  # fmt: skip


def resizing(reference: Reference, sample: Sample, got: np.ndarray) -> Check:
    """`got`: mtmd's image embeddings of an `oblong` sample."""
    want = runner.image_rows(reference, sample)
    size = "{} × {}".format(*sample.images[0].size)
    name = "mtmd's own resizing"
    if got.shape != want.shape:
        return _info(name, None, f"{len(got)} image tokens for a picture of {size}, {len(want)} in transformers")
    value = relative_error(got, want)
    how = (
        "keeps its shape on a plain ground, transformers stretches it"
        if value > 0.05
        else "stretches it as transformers does"
    )
    return _info(name, value, f"a picture of {size}: mtmd {how}; pictures are resized here before either sees them")


# --- float16 pixels and tables ----------------------------------------------------------------------------------------


def half_precision(reference: Reference, samples: list[Sample], got: dict[str, np.ndarray], plain: float) -> Check:
    """The gated error of mtmd's embeddings again, the reference rounding as llama.cpp does.

    `got`: sample id → embeddings; `plain`: worst error against the reference as it is.
    """
    with _rounding_like_llama_cpp(reference):
        errors = {s.id: relative_error(got[s.id], runner.image_rows(reference, s)) for s in samples}
    worst = max(errors, key=errors.get)
    return _info(
        "image embeddings of mtmd, the reference rounding as it does", errors[worst],
        f"pixels and patch weights in float16, GELU as the tanh form from a float16 table; {plain:.1e} without", worst,
    )  # fmt: skip


@contextmanager
def _rounding_like_llama_cpp(reference: Reference) -> Iterator[None]:
    """Source: ggml's im2col in float16 and its GELU tables (ggml/src/ggml-cpu, b11549)."""
    places = vision_places(vision_params(reference.config))
    model = reference.model
    patches = model.get_submodule(places["v.patch_embd.weight"].module.removesuffix(".weight"))
    weight, hooks = patches.weight.data, []
    patches.weight.data = weight.half().float()
    hooks.append(patches.register_forward_pre_hook(lambda _, args: (args[0].half().float(), *args[1:])))
    towers = {".".join(place.module.split(".")[:2]) for place in places.values()}
    for module in (m for t in towers if t != "model.image_newline" for m in model.get_submodule(t).modules()):
        if table := _TABLES.get(type(module).__name__):
            hooks.append(module.register_forward_hook(lambda _, args, __, table=table: _looked_up(table, args[0])))
    try:
        yield
    finally:
        patches.weight.data = weight
        for hook in hooks:
            hook.remove()


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _looked_up(function, x: torch.Tensor) -> torch.Tensor:
    return function(x.half().float()).half().float()


_TABLES = {
    "GELU": _tanh_gelu, "GELUActivation": _tanh_gelu, "GELUTanh": _tanh_gelu, "PytorchGELUTanh": _tanh_gelu,
    "QuickGELUActivation": _quick_gelu,
}  # fmt: skip


# --- the class token's position row -----------------------------------------------------------------------------------


def class_row(
    mmproj: Path, text: Path, reference: Reference, sample: Sample, shipped: float, scratch: Path, threads: int
) -> Iterator[Check]:
    """The same picture with the class token's row at the other end, for towers that have one; `shipped`: the error as it
    ships."""
    said = GGUFFile(mmproj).metadata.get(CLASS_ROW)
    if said is None:
        return
    other = {"last": "first", "first": "last"}[str(said)]
    flipped, step = scratch / "mmproj-other.gguf", 1 if said == "last" else -1

    def change(name: str, array: np.ndarray) -> np.ndarray:
        return np.roll(array, step, axis=0) if name == "v.position_embd.weight" else array

    copy_container(mmproj, flipped, change=change)
    prompt = runner.mtmd_prompt(reference, sample, scratch, "other")
    run = runner.run(scratch, text, flipped, [prompt], reference, threads, 1)
    value = relative_error(run.array(run.prompts[0]["image"]), runner.image_rows(reference, sample))
    right = said if shipped < value else other
    yield _info(
        f"image embeddings with the class token's position row {other}", value,
        f"{shipped:.1e} with it {said}, as in this file; this build wants it {right} (--class-row {right})", sample.id,
    )  # fmt: skip
