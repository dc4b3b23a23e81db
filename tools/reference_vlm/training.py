"""Train a reference VLM from scratch: one step, its schedule, and its saved state.

    loss = cross-entropy of the answer + w · localisation

The localisation loss teaches the vision tower to see before the decoder learns to ask. A linear
head on every merged vision token (28 × 28 pixels) names the characters, keys, colours and shapes
that stand there. The weight w falls to zero during training, and the head is thrown away at the
end.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from numpy.random import RandomState
from safetensors import safe_open
from torch.nn import functional

from tools.reference_vlm import drawing
from tools.reference_vlm.model import (
    load_initial_weights,
    make_batch,
    make_config,
    make_model,
    replace_tensors,
)

TRAINING_SEED = 3  # 1 and 2 are make_data's calibration and held-out streams
WARM_UP_STEPS = 150
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW and Muon


@dataclass(frozen=True)
class Settings:
    """What a resumed training must share with the one it continues."""

    arch: str = "qwen2_5_vl"
    seed: int = 0
    batch_size: int = 32
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Phase:
    """What the schedule prescribes at one moment of training."""

    learning_rate: float
    easy: float  # chance of a one-character drawing
    localisation: float  # weight of the localisation loss
    # Width and height of this step's images. One size a batch: only the text has to be padded.
    size: tuple[int, int]


def schedule(settings: Settings, step: int, progress: float) -> Phase:
    """The phase at `progress`, from 0 to 1.

    Training begins with easy and small drawings, and ends with all sizes in turn and nothing easy.
    """
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return Phase(
        learning_rate=settings.learning_rate * warm_up * (0.97 * cosine + 0.03),
        easy=max(0.0, 0.9 - 3 * progress),
        localisation=max(0.0, 1 - progress / 0.8),
        size=drawing.SIZES[0] if progress < 0.3 else drawing.SIZES[step % len(drawing.SIZES)],
    )


class BaseTrainer(ABC):
    """A training that has taken `step_count` steps: a model, a localisation head, and optimizers.

    This class ends a step, and saves and loads everything. A subclass says what a step is.
    """

    head: torch.nn.Linear  # the localisation head, which the subclass makes

    def __init__(self, settings: Settings, tokenizer, model):
        self.settings = settings
        self.tokenizer = tokenizer
        self.model = model
        self.optimizers: list[torch.optim.Optimizer] = []
        self.step_count = 0
        self.seconds = 0.0  # spent training, over all resumptions

    @abstractmethod
    def step(self, progress: float) -> tuple[float, float]:
        """Draw a batch, take one step; returns (answer loss, loss of the vision tokens).

        The drawings depend on (seed, step) alone, so that a resumed training sees what an unbroken
        one would have seen.
        """

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters of the model and of the localisation head, by name."""
        head = {f"localisation.{name}": value for name, value in self.head.named_parameters()}
        return dict(self.model.named_parameters()) | head

    def take_step(self) -> None:
        """Clip the gradients, and let every optimizer take its step."""
        torch.nn.utils.clip_grad_norm_(self.parameters().values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_count += 1

    def save(self, path: Path) -> None:
        """Write the whole state of the training.

        Float32 weights and moments are tensors; what no tensor holds is JSON in the metadata.
        """
        tensors = {}
        for name, parameter in self.parameters().items():
            tensors[f"weight.{name}"] = parameter.detach()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{key}.{name}"] = value
        told = {
            "settings": asdict(self.settings),
            "step_count": self.step_count,
            "seconds": self.seconds,
        }
        replace_tensors(path, tensors, {"training": json.dumps(told)})

    def load(self, path: Path) -> None:
        """Continue from a saved state. Raises ValueError for one of other settings."""
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["training"])
            if told["settings"] != asdict(self.settings):
                raise ValueError(
                    f"{path} was trained with {told['settings']}, not with {asdict(self.settings)}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, parameter in self.parameters().items():
            parameter.data.copy_(tensors[f"weight.{name}"])
            state = {key: tensors[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in tensors}
            for optimizer in self.optimizers:
                owned = (p for group in optimizer.param_groups for p in group["params"])
                if state and any(parameter is p for p in owned):
                    optimizer.state[parameter] = state
        self.step_count, self.seconds = told["step_count"], told["seconds"]


class Trainer(BaseTrainer):
    """Training from scratch: the model and the localisation head learn together."""

    def __init__(self, settings: Settings, tokenizer, *, init: Path | None = None):
        torch.manual_seed(settings.seed)
        model = make_model(make_config(settings.arch, tokenizer)).train()
        super().__init__(settings, tokenizer, model)
        self.head = torch.nn.Linear(model.config.text_config.hidden_size, len(drawing.NAMES))
        # How many tensors `init` gave, and how many there are.
        self.taken = load_initial_weights(model, init) if init else None
        self.optimizers = [
            torch.optim.AdamW(
                decay_groups(self.parameters().values(), 0.05),
                lr=settings.learning_rate,
                betas=(0.9, 0.98),
            )
        ]
        self._vision_tokens = None
        self.model.model.visual.register_forward_hook(self._keep_vision_tokens)

    def step(self, progress: float) -> tuple[float, float]:
        """Draw a batch, take one optimizer step; returns (answer loss, localisation loss)."""
        phase = schedule(self.settings, self.step_count, progress)
        rng = RandomState([TRAINING_SEED, self.settings.seed, self.step_count])
        rows = [draw(rng, phase) for _ in range(self.settings.batch_size)]
        return self.step_on(rows, phase)

    def step_on(self, rows: list[drawing.Drawing], phase: Phase) -> tuple[float, float]:
        """One optimizer step on given drawings."""
        for group in self.optimizers[0].param_groups:
            group["lr"] = phase.learning_rate
        batch = make_batch(self.tokenizer, [(row.image, row.question, row.answer) for row in rows])
        answer = self.model(**batch).loss
        named = self.head(self._vision_tokens)  # [vision tokens, names]
        localisation = localisation_loss(named, torch.cat([cells(row) for row in rows]))
        (answer + phase.localisation * localisation).backward()
        self.take_step()
        return answer.item(), localisation.item()

    def _keep_vision_tokens(self, module, inputs, output) -> None:
        self._vision_tokens = output.pooler_output  # [vision tokens, 256]


def decay_groups(parameters: Iterable[torch.nn.Parameter], decay: float) -> list[dict]:
    """Two parameter groups of an optimizer: matrices with weight decay, vectors without."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def localisation_loss(named: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the head's logits [..., names] against 0/1: summed over names, then mean."""
    each = functional.binary_cross_entropy_with_logits(named, target, reduction="none")
    return each.sum(-1).mean()


def draw(rng: RandomState, phase: Phase) -> drawing.Drawing:
    """One training drawing of the phase's size and ease."""
    return drawing.TASKS[drawing.pick_task(rng)](rng, *phase.size, easy=phase.easy)


def cells(row: drawing.Drawing) -> torch.Tensor:
    """What stands in each merged vision token of a drawing: 0/1 [vision tokens, names].

    The tokens stand row by row.
    """
    columns, rows = row.image.width // 28, row.image.height // 28
    target = torch.zeros(rows, columns, len(drawing.NAMES))
    for name, x, y in row.labels:
        across = min(max(int(x // 28), 0), columns - 1)
        down = min(max(int(y // 28), 0), rows - 1)
        target[down, across, drawing.NAMES.index(name)] = 1
    return target.flatten(0, 1)


def tokenizer_texts(count: int = 3000) -> Iterator[str]:
    """The texts that a new tokenizer is trained on.

    They are questions, the words of the chat template, and colours. Other answers are spelled
    character by character.
    """
    for row in range(count):
        rng = RandomState([TRAINING_SEED, row])
        question, answer = drawing.TASKS[drawing.pick_task(rng)](rng, 112, 112)[1:3]
        yield from (question, "user\n", "assistant\n")
        if answer in drawing.COLOURS:
            yield answer
