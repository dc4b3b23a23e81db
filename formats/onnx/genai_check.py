"""The written folder in onnxruntime-genai, from image files, against the fake-quantized reference.

genai decodes, resizes and normalises images with code of its own. Answers are compared on images that it need not resize,
as the reference is fed; what its resize makes of other images is measured apart, without a gate (1.5e-7: Pillow's filter,
which is the reference's too).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vlmq_export.formats.base import Check, CheckSettings, relative_error
from vlmq_export.formats.onnx.runner import OnnxRunner

ANSWERS = 0.05  # share of answers that may differ: none does on the reference VLM at level 0
PIXELS = 1e-5  # without a resize both sides compute (value/255 − mean)/std in float32 (measured 1.3e-7)
ODD = 9  # pixels added to either side of an image, so that no side is a multiple of a merged patch
RESIZED = 32  # prompts on which the resize is measured
LIMIT = 16  # tokens of an answer, as many as Reference.answer gives


@contextmanager
def image_files(images) -> Iterator[list[Path]]:
    """The images as PNG files, for as long as they are needed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(len(images))]
        for image, file in zip(images, files, strict=True):
            image.save(file)
        yield files


class GenaiModel:
    """onnxruntime-genai on a folder of ours; raises what the runtime raises."""

    def __init__(self, folder: Path):
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(folder))
        self.processor = self.model.create_multimodal_processor()

    def inputs(self, text: str, files: list[Path]):
        """genai's own tensors of a prompt: text and image files."""
        return self.processor(text, images=self.genai.Images.open(*map(str, files)))

    def pixels(self, text: str, files: list[Path]) -> np.ndarray:
        """float32 [patches, columns]."""
        values = self.inputs(text, files)["pixel_values"].as_numpy()
        return values.reshape(-1, values.shape[-1]).astype(np.float32)

    def answer(self, prompt, files: list[Path], stop: frozenset[int], limit: int = LIMIT) -> list[int]:
        """Greedy token ids up to and without the stop token."""
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


def genai_rows(folder: Path, reference, settings: CheckSettings, level: int, tie: float) -> list[Check]:
    """Rows of level L3; none for a family that onnxruntime-genai does not know. `tie`: error of the logits that may exchange two tokens.

    At accuracy_level 4 the file's own rounding changes answers in every runtime: genai is then held against plain ONNX
    Runtime on the same file.
    """
    if not (folder / "genai_config.json").is_file():
        return []
    name = "onnxruntime-genai: greedy answers that differ" + (" from plain ONNX Runtime's" if level else "")
    prompts = [p for p in reference.prompts[: settings.questions] if p.images]
    if find_spec("onnxruntime_genai") is None:
        return [Check.not_run("onnx", "L3", name, "onnxruntime-genai is not installed")]
    if not prompts:
        return [Check.not_run("onnx", "L3", name, "no held-out prompt has an image")]
    model, plain = GenaiModel(folder), OnnxRunner(folder, threads=settings.threads)

    def differs(prompt, answer: list[int]) -> bool:
        if not level:
            return reference.judge(prompt, answer, tie) == "other"
        return answer != plain.answer(prompt, reference.position_ids(prompt), stop=reference.stop_ids)

    errors, different = _compare(model, differs, reference.stop_ids, [(p, p.images) for p in prompts])
    error, worst = max(errors, key=lambda e: (np.isnan(e[0]), e[0]))
    rows = [
        Check.at_most("onnx", "L3", "onnxruntime-genai: pixels of images that keep their size", error, PIXELS, unit="rel",
                      compared=len(errors), worst=worst),
        Check.at_most("onnx", "L3", name, len(different) / len(prompts), ANSWERS, unit="share", compared=len(prompts),
                      detail="from image files, through its own image steps", worst=", ".join(different[:8])),
    ]  # fmt: skip
    errors, different = _compare(model, differs, reference.stop_ids, _odd_sizes(reference, prompts[:RESIZED]))
    error, worst = max(errors, key=lambda e: (np.isnan(e[0]), e[0]))
    detail = f"sides {ODD} pixels longer than the reference is fed: no gate, the filter is its own"
    return [
        *rows,
        Check("onnx", "L3", "onnxruntime-genai: pixels of images that it resizes", "info", error, unit="rel",
              compared=len(errors), detail=detail, worst=worst),
        Check("onnx", "L3", "onnxruntime-genai: answers that differ, images that it resizes", "info",
              len(different) / len(errors), unit="share", compared=len(errors), detail=detail, worst=", ".join(different[:8])),
    ]  # fmt: skip


def _compare(
    model: GenaiModel, differs, stop: frozenset[int], prompts: list
) -> tuple[list[tuple[float, str]], list[str]]:
    """(error of the pixels, prompt) of each, and the prompts whose answer differs. `prompts`: (Sample, images)."""
    errors, different = [], []
    for prompt, images in prompts:
        with image_files(images) as files:
            want, got = prompt.pixel_values.numpy(), model.pixels(prompt.text, files)
            errors.append((relative_error(got, want) if got.shape == want.shape else float("inf"), prompt.id))
            if differs(prompt, model.answer(prompt, files, stop)):
                different.append(prompt.id)
    return errors, different


def _odd_sizes(reference, prompts: list) -> list:
    """The same prompts with images that either side must resize: (Sample as the reference sees it, images as they are)."""
    made = []
    for prompt in prompts:
        images = [i.resize((i.width + ODD, i.height + ODD)) for i in prompt.images]
        with image_files(images) as files:
            row = replace(prompt.row, id=f"{prompt.id}, resized", images=tuple(files))
            made.append((reference.preprocessor.sample(row, prompt_only=True), images))
    return made
