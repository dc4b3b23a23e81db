"""Scores of a fake-quantized model on held-out rows.

They are the KL divergence to full precision, the agreement of the most probable tokens, and the
exact match of greedy answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmq_export.formats.proof.answers import greedy_answers, stop_ids
from vlmq_export.formats.proof.reference import fused
from vlmq_export.quantizer.calibration.divergence import distance_of
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.sample import Sample

_ANSWER = 12  # most tokens of an answer


@dataclass(frozen=True)
class Score:
    """How far a model is from full precision on the held-out rows."""

    kl: float  # to full precision, mean over the answer tokens, in nats
    kl_text: float  # the same over all text tokens
    agreement: float  # share of the answer tokens whose most probable token is the same
    exact: float  # share of the rows that are answered exactly
    tasks: dict[str, float] = field(default_factory=dict)  # `exact` of each task


def source_weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint in float32, with its hub name."""
    checkpoint = Checkpoint(folder)
    return ((name, checkpoint.tensor(name).float().numpy()) for name in checkpoint.tensors)


def load_model(folder: Path, weights: Iterable[tuple[str, np.ndarray]]) -> torch.nn.Module:
    """A float32 model of the architecture in `folder`, with these weights by hub name."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in weights}
    state = fused(state)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


def batches(
    samples: list[Sample], size: int = 64
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of samples of equal length and image size, so that nothing is padded.

    Each is the places of its samples in the list, and the model's inputs.
    """
    alike = defaultdict(list)
    for i, s in enumerate(samples):
        size_of_images = "" if s.image_grid_thw is None else str(s.image_grid_thw.tolist())
        alike[len(s.input_ids), size_of_images].append(i)
    for group in alike.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            inputs = [samples[i].model_inputs() for i in part]
            yield part, {k: torch.cat([x[k] for x in inputs]) for k in inputs[0]}


class Scorer:
    """Held-out rows, and what the full-precision model gives on them.

    The latter is computed once, and every quantized model is compared with it.
    """

    def __init__(self, folder: Path, model: torch.nn.Module, rows: list[Row]):
        self.preprocessor = Preprocessor(folder)
        self.rows = rows
        self.samples = [self.preprocessor.sample(r) for r in rows]
        self.prompts = [self.preprocessor.sample(r, prompt_only=True) for r in rows]
        self.tasks = sorted({row.task for row in rows} - {""})
        self.stop_ids = stop_ids(folder, self.preprocessor.tokenizer)
        self.full = self._log_probabilities(model)
        self.baseline = self.score(model)

    @torch.no_grad()
    def _log_probabilities(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """The log-probabilities of the next token, [tokens, vocabulary] for each sample."""
        out: list[torch.Tensor] = [torch.empty(0)] * len(self.samples)
        for part, inputs in batches(self.samples):
            log_p = model(**inputs, use_cache=False).logits.float().log_softmax(-1)
            for i, row in zip(part, log_p):
                out[i] = row
        return out

    def score(self, model: torch.nn.Module) -> Score:
        """Score a model on all rows."""
        kl, kl_text, agree = [], [], []
        for sample, p, q in zip(self.samples, self.full, self._log_probabilities(model)):
            each = distance_of(p[:-1], q[:-1])  # at position t: the prediction of token t+1
            answer, text = sample.answer[1:], ~sample.vision[1:]
            kl.append(each.kl[answer])
            kl_text.append(each.kl[text])
            agree.append(each.same[answer].double())
        means = [float(torch.cat(x).mean()) for x in (kl, kl_text, agree)]
        exact, tasks = self.exact(model)
        return Score(means[0], means[1], means[2], exact, tasks)

    def exact(self, model: Any) -> tuple[float, dict[str, float]]:
        """The share of rows whose greedy answer is the expected one, over all rows and by task.

        Answers are compared character by character.
        """
        right = [False] * len(self.rows)
        inputs = [prompt.model_inputs() for prompt in self.prompts]
        for i, ids in greedy_answers(model, inputs, self.stop_ids, _ANSWER):
            text = self.preprocessor.tokenizer.decode(ids, skip_special_tokens=True)
            right[i] = text.strip() == self.rows[i].answer
        tasks = {
            task: _share([r for r, row in zip(right, self.rows) if row.task == task])
            for task in self.tasks
        }
        return _share(right), tasks


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)
