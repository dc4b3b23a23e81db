"""L3: the written folder in onnxruntime-genai, from image files.

genai decodes, resizes and normalizes images with code of its own. Answers are compared on images
that it need not resize, which are then fed as the reference feeds them. What its resize makes of
other images is measured apart, without a gate: the filter is Pillow's, as the reference's is, and
pixels differ by 1.5e-7.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from vlmq_export.formats.onnx.genai_config import MOST_IMAGES
from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.proof.checks import Check, CheckSettings, Steps, relative_error
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.sample import Sample

ANSWERS = 0.05  # share of answers that may differ; none does on the reference VLM at level 0
# Without a resize both sides compute (value/255 − mean)/std in float32. Measured was 1.3e-7.
PIXELS = 1e-5
ODD = 9  # pixels added to either side of an image, so that no side is a multiple of a merged patch
RESIZED = 32  # prompts on which the resize is measured
LIMIT = 16  # tokens of an answer, as many as Reference.answer gives

Pictured = tuple[Sample, Sequence[Image]]  # a prompt, and the images that genai is given
Differs = Callable[[Sample, list[int]], bool]  # whether genai's answer to a prompt is another one


@contextmanager
def image_files(images: Sequence[Image]) -> Iterator[list[Path]]:
    """The images as PNG files, for as long as they are needed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(len(images))]
        for image, file in zip(images, files, strict=True):
            image.save(file)
        yield files


class GenaiModel:
    """onnxruntime-genai on a folder of ours. Raises what the runtime raises."""

    def __init__(self, folder: Path):
        import onnxruntime_genai

        self.genai: Any = onnxruntime_genai  # it comes without types
        self.model = self.genai.Model(str(folder))
        self.processor = self.model.create_multimodal_processor()

    def inputs(self, text: str, files: Sequence[Path]) -> Any:
        """genai's own tensors of a prompt, made of its text and image files."""
        images = self.genai.Images.open(*map(str, files)) if files else None
        return self.processor(text, images=images)

    def pixels(self, text: str, files: Sequence[Path]) -> np.ndarray:
        """float32 [patches, columns], or [3·side of all images, side]."""
        values = self.inputs(text, files)["pixel_values"].as_numpy()
        return values.reshape(-1, values.shape[-1]).astype(np.float32)

    def answer(
        self, prompt: Sample, files: Sequence[Path], stop: frozenset[int], limit: int = LIMIT
    ) -> list[int]:
        """Greedy token ids, at most `limit`, up to and without the stop token."""
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=len(prompt.input_ids) + limit, do_sample=False)
        generator = self.genai.Generator(self.model, params)
        generator.set_inputs(self.inputs(prompt.text, files))
        new: list[int] = []
        while len(new) < limit and not generator.is_done():
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
            if new[-1] in stop:
                return new[:-1]
        return new


def genai_rows(
    folder: Path,
    reference: Reference,
    settings: CheckSettings,
    level: int,  # the accuracy_level of the file
    tie: float,  # relative error of logits that may exchange two tokens
    steps: Steps,
) -> list[Check]:
    """Pixels and answers, on images that keep their size and on others.

    There is no row for a model without a genai_config.json. At accuracy_level 4 the
    file's own rounding changes answers in every runtime. genai's answers are then compared with
    those of plain ONNX Runtime on the same file.
    """
    if not (folder / "genai_config.json").is_file():
        return []
    name = "onnxruntime-genai: greedy answers that differ"
    name += " from plain ONNX Runtime's" if level else ""
    prompts = [p for p in reference.prompts[: settings.questions] if p.images]
    most = MOST_IMAGES.get(reference.architecture.model_type)
    if most is not None:
        prompts = [p for p in prompts if len(p.images) <= most]
    if find_spec("onnxruntime_genai") is None:
        return [Check.not_run("onnx", "L3", name, "onnxruntime-genai is not installed")]
    if not prompts:
        why = "no held-out prompt has an image"
        why += "" if most is None else f", or each has more than {most}"
        return [Check.not_run("onnx", "L3", name, why)]
    model, plain = GenaiModel(folder), OnnxRunner(folder, threads=settings.threads)

    def differs(prompt: Sample, answer: list[int]) -> bool:
        if not level:
            return reference.judge(prompt, answer, tie) == "other"
        positions = reference.position_ids(prompt)
        return answer != plain.answer(prompt, positions, stop=reference.stop_ids)

    stop, few = reference.stop_ids, prompts[:RESIZED]
    every = len(prompts) + len(few)
    odd = _odd_sizes(reference, few)
    if not level:
        reference.answer_all([*prompts, *(prompt for prompt, _ in odd)])

    def told(pictured: Iterable[Pictured], before: int) -> Iterator[Pictured]:
        for done, each in enumerate(pictured, before):
            steps.begin("image files", done, every)
            yield each

    kept = _compare(model, differs, stop, told([(p, p.images) for p in prompts], 0))
    resized = _compare(model, differs, stop, told(odd, len(prompts)))
    return [*_gated_rows(kept, name), *_resized_rows(resized)]


@dataclass(frozen=True)
class _Compared:
    """How genai's pixels and answers compare on some prompts."""

    pixels: list[tuple[float, str]]  # (relative error, prompt) of each
    different: list[str]  # the prompts whose answer differs

    @property
    def worst(self) -> tuple[float, str]:
        """The largest error of the pixels, and its prompt. NaN is the largest."""
        return max(self.pixels, key=lambda e: (np.isnan(e[0]), e[0]))

    @property
    def share(self) -> float:
        """The share of answers that differ."""
        return len(self.different) / len(self.pixels)


def _compare(
    model: GenaiModel, differs: Differs, stop: frozenset[int], prompts: Iterable[Pictured]
) -> _Compared:
    compared = _Compared([], [])
    for prompt, images in prompts:
        assert prompt.pixel_values is not None, "a prompt with images has their pixels"
        with image_files(images) as files:
            want, got = prompt.pixel_values.numpy(), model.pixels(prompt.text, files)
            want = want.reshape(-1, want.shape[-1])
            error = relative_error(got, want) if got.shape == want.shape else float("inf")
            compared.pixels.append((error, prompt.id))
            if differs(prompt, model.answer(prompt, files, stop)):
                compared.different.append(prompt.id)
    return compared


def _odd_sizes(reference: Reference, prompts: Sequence[Sample]) -> list[Pictured]:
    """The same prompts with images that both sides must resize.

    The sample has what the reference sees. The images beside it are not resized yet.
    """
    made: list[Pictured] = []
    for prompt in prompts:
        assert prompt.row is not None, "held-out prompts are made of rows"
        images = [i.resize((i.width + ODD, i.height + ODD)) for i in prompt.images]
        with image_files(images) as files:
            row = replace(prompt.row, id=f"{prompt.id}, resized", images=tuple(files))
            made.append((reference.preprocessor.sample(row, prompt_only=True), images))
    return made


def _gated_rows(compared: _Compared, name: str) -> list[Check]:
    """The rows of images that keep their size. `name` is that of the answers' row."""
    error, worst = compared.worst
    pixels = Check.at_most(
        "onnx",
        "L3",
        "onnxruntime-genai: pixels of images that keep their size",
        error,
        PIXELS,
        unit="rel",
        compared=len(compared.pixels),
        worst=worst,
    )
    answers = Check.at_most(
        "onnx",
        "L3",
        name,
        compared.share,
        ANSWERS,
        unit="share",
        compared=len(compared.pixels),
        detail="from image files, through its own image steps",
        worst=", ".join(compared.different[:8]),
    )
    return [pixels, answers]


def _resized_rows(compared: _Compared) -> list[Check]:
    """The rows of images that genai resizes."""
    error, worst = compared.worst
    detail = f"sides {ODD} pixels longer than the reference is fed: no gate, the filter is its own"
    pixels = Check(
        "onnx",
        "L3",
        "onnxruntime-genai: pixels of images that it resizes",
        "info",
        error,
        unit="rel",
        compared=len(compared.pixels),
        detail=detail,
        worst=worst,
    )
    answers = Check(
        "onnx",
        "L3",
        "onnxruntime-genai: answers that differ, images that it resizes",
        "info",
        compared.share,
        unit="share",
        compared=len(compared.pixels),
        detail=detail,
        worst=", ".join(compared.different[:8]),
    )
    return [pixels, answers]
