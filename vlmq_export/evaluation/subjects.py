"""What is evaluated: the source, the artifact and the files of a run, each in its own runtime."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vlmq_export.errors import BenchmarkError, MissingRuntime, UsageError
from vlmq_export.evaluation.answers import files_hash
from vlmq_export.evaluation.questions import Question
from vlmq_export.formats import NAMES
from vlmq_export.formats.contract import FORMATS
from vlmq_export.formats.proof.answers import Answerer, Told, greedy_answers
from vlmq_export.formats.proof.reference import Reference, too_large
from vlmq_export.proving.beside_source import float_source
from vlmq_export.proving.scores import SOURCE
from vlmq_export.quantizer.arithmetic import pick_device
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.host import free_memory, give_back
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import RECIPE_FILE, load_recipe
from vlmq_export.sources.locate import same_source

ARTIFACT = "artifact"
KINDS = (ARTIFACT, *NAMES)  # what `--on` may name
_RUNS = {  # the package whose version decides what is computed
    SOURCE: "transformers",
    ARTIFACT: "transformers",
    "gptq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "onnx": "onnxruntime",
    "gguf": "xllamacpp",
}


@dataclass
class Subject:
    """One model that is asked.

    files: SHA-256 of what it is made of.
    load: makes what answers. It is called once, when the first answer is wanted.
    """

    name: str
    files: str
    reference: Reference
    load: Callable[[], Answerer]

    @property
    def runtime(self) -> str:
        """The package that runs it, with its version."""
        return f"{_RUNS[self.name]} {version(_RUNS[self.name])}"

    @cached_property
    def _answerer(self) -> Answerer:
        return self.load()

    def answer(self, questions: Sequence[Question], tell: Told) -> list[str]:
        """The answers to questions that have the same limit.

        The prompt is the images, then the text, in the chat template of the model.
        """
        prompts = [self._prompt(question) for question in questions]
        found = self._answerer(prompts, questions[0].limit, tell)
        decode = self.reference.preprocessor.tokenizer.decode
        texts = [decode(ids, skip_special_tokens=True) for ids in found]
        return [question.cut(text) for question, text in zip(questions, texts, strict=True)]

    def close(self) -> None:
        """Drop what was loaded."""
        self.__dict__.pop("_answerer", None)
        self.reference.__dict__.pop("model", None)
        give_back()

    def _prompt(self, question: Question) -> Sample:
        """The prompt of a question, with images as large as the model's processor makes them."""
        images = tuple(question.pictures())
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question.text}]
        row = Row(question.id, ({"role": "user", "content": parts},), images)
        return self.reference.preprocessor.sample(row, prompt_only=True)


def open_subjects(out: Path, on: Sequence[str], baseline: bool, device: str) -> list[Subject]:
    """The models of an output folder in the order of KINDS, full precision first.

    on: names of KINDS; empty: every format of the run.
    device: where the source and the artifact are run.

    Raises UsageError for what is not there, MissingRuntime, and BenchmarkError for a model that is
    too large.
    """
    if not (out / RECIPE_FILE).is_file():
        raise UsageError(f"{out}: no {RECIPE_FILE} here; give the --out folder of an earlier run")
    recipe = load_recipe(out / RECIPE_FILE, {})
    names = _asked(out, on or recipe.format)
    artifact = Artifact(out / ARTIFACT)
    floats = same_source(recipe.model, artifact)
    reference = Reference(artifact.path, [], floats)
    place = pick_device(device)
    if place.type == "cpu" and (baseline or ARTIFACT in names):
        _refuse_large(reference, recipe)
    found = [_full_precision(recipe, floats, artifact, reference, place)] if baseline else []
    for name in names:
        if name != ARTIFACT and (lacking := FORMATS[name].missing()):
            raise MissingRuntime(f"{lacking} not installed; pip install 'vlmq-export[{name}]'")
        load = _loader(name, out, reference, recipe, place)
        found.append(Subject(name, files_hash(out / name), reference, load))
    return found


def _asked(out: Path, on: Sequence[str]) -> list[str]:
    """The names of what is evaluated, in the order of KINDS."""
    given = [one.strip() for x in on for one in x.split(",")]
    for name in given:
        if name not in KINDS:
            raise UsageError(f"--on {name}: choose one or more of {', '.join(KINDS)}")
        if not (out / name).is_dir():
            there = ", ".join(k for k in KINDS if (out / k).is_dir())
            raise UsageError(f"--on {name}: {out} has no {name}/; it has {there}")
    return [name for name in KINDS if name in given]


def _refuse_large(reference: Reference, recipe: Recipe) -> None:
    """Raises BenchmarkError for a model that cannot be run whole in float32 on this host."""
    memory, _ = free_memory(pick_device("cpu"), recipe.max_memory)
    if why := too_large(reference.weights.count, memory):
        raise BenchmarkError(f"source and artifact {why}; evaluate the files alone")


def _full_precision(
    recipe: Recipe,
    floats: Path | None,
    artifact: Artifact,
    reference: Reference,
    device: torch.device,
) -> Subject:
    """The source. Raises UsageError where it is not at hand."""
    folder, why = float_source(recipe.model, floats, artifact)
    if folder is None:
        raise UsageError(f"--baseline: {why}")

    def load() -> Answerer:
        return _in_transformers(load_model(Checkpoint(folder), device), reference, device)

    files = json.dumps(artifact.manifest.source, sort_keys=True)
    return Subject(SOURCE, hashlib.sha256(files.encode()).hexdigest(), reference, load)


def _loader(
    name: str, out: Path, reference: Reference, recipe: Recipe, device: torch.device
) -> Callable[[], Answerer]:
    """What makes the answerer of the artifact, or of a format."""
    if name == ARTIFACT:
        return lambda: _in_transformers(reference.model, reference, device)
    options = recipe.format_options(reference.folder.name)
    return lambda: FORMATS[name].answerer(out / name, reference, options, reference.threads)


def _in_transformers(model: Any, reference: Reference, device: torch.device) -> Answerer:
    """A whole model in float32 on a device."""
    model = model.to(device).eval()

    def answer(prompts: Sequence[Sample], limit: int, tell: Told) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        inputs = [prompt.model_inputs(device) for prompt in prompts]
        for place, ids in greedy_answers(model, inputs, reference.stop_ids, limit):
            found[place] = ids
            tell(len(found))
        return [found[place] for place in range(len(prompts))]

    return answer
