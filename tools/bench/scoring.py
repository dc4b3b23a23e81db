"""KL to full precision, top-1 agreement and exact match of a fake-quantized model on held-out rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vlmq_export.quantizer.calibration import Preprocessor, Row, Sample
from vlmq_export.quantizer.checkpoint import Checkpoint


@dataclass(frozen=True)
class Score:
    """Means over all answer tokens (kl, agreement), over all text tokens (kl_text), over rows (exact, by task too)."""

    kl: float
    kl_text: float
    agreement: float
    exact: float
    tasks: dict[str, float] = field(default_factory=dict)


def source_weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint in float32, by hub name."""
    checkpoint = Checkpoint(folder)
    return ((name, checkpoint.tensor(name).float().numpy()) for name in checkpoint.tensors)


def load_model(folder: Path, weights: Iterable[tuple[str, np.ndarray]]) -> torch.nn.Module:
    """A float32 model of the architecture in `folder` with these weights, by hub name."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in weights}
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


def batches(samples: list[Sample], size: int = 64) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Samples of equal length and image size together, so that nothing is padded."""
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
    """The full-precision model's own figures, computed once; every quantized model is held against them."""

    def __init__(self, folder: Path, model: torch.nn.Module, rows: list[Row]):
        self.preprocessor = Preprocessor(folder)
        self.rows = rows
        self.samples = [self.preprocessor.sample(r) for r in rows]
        self.prompts = [self.preprocessor.sample(r, prompt_only=True) for r in rows]
        self.tasks = sorted({row.task for row in rows} - {""})
        self.eos = self.preprocessor.tokenizer.eos_token_id
        self.full = self._log_probabilities(model)
        self.baseline = self.score(model)

    @torch.no_grad()
    def _log_probabilities(self, model: torch.nn.Module) -> list[torch.Tensor]:
        out: list[torch.Tensor] = [torch.empty(0)] * len(self.samples)
        for part, inputs in batches(self.samples):
            log_p = model(**inputs, use_cache=False).logits.float().log_softmax(-1)
            for i, row in zip(part, log_p):
                out[i] = row
        return out

    def score(self, model: torch.nn.Module) -> Score:
        kl, kl_text, agree = [], [], []
        for sample, p, q in zip(self.samples, self.full, self._log_probabilities(model)):
            each = (p.exp() * (p - q)).sum(-1)[:-1]  # at position t: the prediction of token t+1
            answer, text = sample.answer[1:], ~sample.vision[1:]
            kl.append(each[answer])
            kl_text.append(each[text])
            agree.append((p.argmax(-1) == q.argmax(-1))[:-1][answer].float())
        return Score(*(float(torch.cat(x).mean()) for x in (kl, kl_text, agree)), **self.exact(model))

    @torch.no_grad()
    def exact(self, model: torch.nn.Module) -> dict:
        """Share of rows whose greedy answer is the expected one, character for character: over all, and by task."""
        right = [False] * len(self.rows)
        for part, inputs in batches(self.prompts):
            ids = model.generate(
                **inputs, max_new_tokens=12, do_sample=False, eos_token_id=self.eos, pad_token_id=self.eos
            )
            texts = self.preprocessor.tokenizer.batch_decode(
                ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(part, texts):
                right[i] = text.strip() == self.rows[i].answer
        tasks = {task: [r for r, row in zip(right, self.rows) if row.task == task] for task in self.tasks}
        return {"exact": _share(right), "tasks": {task: _share(each) for task, each in tasks.items()}}


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)
