"""Train the third reference VLM: a tower that a frozen language model can read.

    loss = cross-entropy of the answers + w · localisation

Only the tower, the connector and the added tokens' rows learn. The language model runs in bfloat16,
whose values its weights have anyway. Each drawing is asked its own question first, and then further
ones that its labels answer, in the same conversation: the image is read once for all of them.

The tower starts as the second reference's. The connector starts as the least-squares map from the
tower's patches to the embeddings of the words for what they show, so that the language model is
shown words from the first step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import RandomState
from safetensors.torch import load_file
from torch.nn import functional

from tools.reference_vlm import drawing, onevision, smolvlm
from tools.reference_vlm.drawing import COLOURS, KEYS, NAMES, Drawing
from tools.reference_vlm.model import IGNORED, replace_tensors
from tools.reference_vlm.training import (
    TRAINING_SEED,
    BaseTrainer,
    Settings,
    decay_groups,
    localisation_loss,
)

WARM_UP_STEPS = 100
GRID = smolvlm.SIDE // smolvlm.PATCH // smolvlm.SHUFFLE  # vision tokens along a side
MUON_RATE = 5  # times AdamW's rate, because a step of Muon is an orthogonal matrix times its rate
FITTED = 1500  # drawings that the connector is fitted on before the first step
FURTHER = 2  # questions about a drawing after its own

Turn = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Phase:
    """What the schedule prescribes at one moment of training."""

    learning_rate: float
    easy: float  # chance of a one-character drawing
    localisation: float  # weight of the localisation loss


def schedule(settings: Settings, step: int, progress: float) -> Phase:
    """The phase at `progress`, from 0 to 1, of the whole training."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return Phase(
        learning_rate=settings.learning_rate * warm_up * (0.97 * cosine + 0.03),
        easy=max(0.0, 0.5 - 3 * progress),
        localisation=0.3 * max(0.0, 1 - progress / 0.8),
    )


# --- conversations --------------------------------------------------------------------------------


def further_turns(row: Drawing) -> list[Turn]:
    """Other questions that the labels of a drawing answer, its own left out."""
    names = [label.name for label in row.labels]
    colours = [name for name in names if name in COLOURS]
    if colours and len(colours) == len(names):
        turns = _about_bars(row, colours)
    elif colours:
        turns = _about_shapes(colours, [name for name in names if name in drawing.SHAPES])
    elif any(name in KEYS for name in names):
        turns = list(_about_form(names))
    else:
        text = "".join(names)
        turns = [
            ("What is the first character?", text[0]),
            ("What is the last character?", text[-1]),
            ("Spell it.", " ".join(text)),
        ]
    return [turn for turn in turns if turn[0] != row.question]


def _about_bars(row: Drawing, colours: list[str]) -> list[Turn]:
    tops = [label.y for label in row.labels]
    by_height = [colour for _, colour in sorted(zip(tops, colours))]
    return [
        ("Which bar is tallest?", by_height[0]),
        ("Which bar is shortest?", by_height[-1]),
        ("How many bars?", str(len(colours))),
        ("Name the bars from left to right.", ", ".join(colours)),
        ("Name the bars from tallest to shortest.", ", ".join(by_height)),
    ]


def _about_shapes(colours: list[str], shapes: list[str]) -> list[Turn]:
    number, kinds = Counter(colours), Counter(shapes)
    things = [f"{colour} {shape}" for colour, shape in zip(colours, shapes)]
    single = [(c, s) for c, s in zip(colours, shapes) if kinds[s] == 1]
    return [
        ("How many shapes?", str(len(shapes))),
        ("What is shown?", ", ".join(sorted(things))),
        *((f"How many {colour} shapes?", str(number[colour])) for colour in COLOURS),
        *((f"What color is the {shape}?", colour) for colour, shape in single),
    ]


def _about_form(names: list[str]) -> Iterator[Turn]:
    """Each key's number, and everything that is written."""
    rows: dict[str, str] = {}
    for name in names:
        if name in KEYS:
            key = name
            rows[key] = ""
        else:
            rows[key] += name
    yield from ((f"What is the {key.lower()}?", value) for key, value in rows.items())
    yield "Read the form.", ", ".join(f"{key}: {value}" for key, value in rows.items())


def draw(rng: RandomState, phase: Phase) -> tuple[Drawing, list[Turn]]:
    """One training drawing, and the questions that are asked about it, its own first."""
    size = drawing.pick(rng, drawing.SIZES)
    row = drawing.TASKS[drawing.pick_task(rng)](rng, *size, easy=phase.easy)
    more = further_turns(row)
    chosen = drawing.sample(rng, more, min(FURTHER, len(more)))
    return row, [(row.question, row.answer), *chosen]


def conversation(tokenizer, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Tokens and labels of one image's conversation; only what the assistant says has labels."""
    tokens: list[int] = []
    labels: list[int] = []
    for place, (question, answer) in enumerate(turns):
        asked = smolvlm.turn(question) if place else smolvlm.prompt(question)
        for text, learned in ((asked, False), (f" {answer}{smolvlm.END}", True)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += ids
            labels += ids if learned else [IGNORED] * len(ids)
    return tokens, labels


def cells(row: Drawing) -> torch.Tensor:
    """What stands under each vision token of a squeezed drawing: 0/1 [16, names]."""
    target = torch.zeros(GRID, GRID, len(NAMES))
    for name, x, y in row.labels:
        across = min(max(int(x / row.image.width * GRID), 0), GRID - 1)
        down = min(max(int(y / row.image.height * GRID), 0), GRID - 1)
        target[down, across, NAMES.index(name)] = 1
    return target.flatten(0, 1)


@dataclass
class Batch:
    """The drawings of one step."""

    pixels: torch.Tensor  # [B, 3, 112, 112]
    tokens: torch.Tensor  # [B, L], padded on the right
    labels: torch.Tensor  # [B, L]
    shown: torch.Tensor  # [B, 16, names]


def make_batch(tokenizer, rows: Iterable[tuple[Drawing, list[Turn]]]) -> Batch:
    """Drawings and conversations as tensors."""
    rows = list(rows)
    said = [conversation(tokenizer, turns) for _, turns in rows]
    length = max(len(tokens) for tokens, _ in said)
    pad = tokenizer.pad_token_id
    return Batch(
        torch.from_numpy(np.stack([smolvlm.tile(row.image) for row, _ in rows])),
        torch.tensor([tokens + [pad] * (length - len(tokens)) for tokens, _ in said]),
        torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in said]),
        torch.stack([cells(row) for row, _ in rows]),
    )


# --- training -------------------------------------------------------------------------------------


class SmolVLMTrainer(BaseTrainer):
    """The training of the third reference VLM."""

    def __init__(self, settings: Settings):
        torch.manual_seed(settings.seed)
        language, tokenizer = smolvlm.language_model()
        smolvlm.add_tokens(tokenizer)
        super().__init__(settings, tokenizer, smolvlm.make_model(language).requires_grad_(False))
        core = self.model.model
        self.tower, self.connector = core.vision_model, core.connector
        self.rows = torch.nn.Parameter(
            core.text_model.embed_tokens.weight[smolvlm.LANGUAGE_ROWS :].clone()
        )
        _run_fast(core.text_model)
        self.head = torch.nn.Linear(core.text_model.config.hidden_size, len(NAMES))
        start_tower(self.tower)
        self._fit_connector()
        for module in (self.tower, self.connector):
            module.requires_grad_(True)
        self.optimizers = self._optimizers()

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by name. The language model is not among it."""
        modules = {"tower": self.tower, "connector": self.connector, "localisation": self.head}
        named = {
            f"{part}.{name}": value
            for part, module in modules.items()
            for name, value in module.named_parameters()
        }
        return named | {"added_tokens": self.rows}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the tower's blocks, AdamW for the rest."""
        moving = self.parameters()
        by_muon = {
            name: p
            for name, p in moving.items()
            if p.ndim == 2 and name.startswith("tower.encoder")
        }
        rest = [p for name, p in moving.items() if name not in by_muon]
        return [
            torch.optim.AdamW(decay_groups(rest, 0.02), betas=(0.9, 0.98)),
            torch.optim.Muon(list(by_muon.values()), weight_decay=0.02, momentum=0.95),
        ]

    @torch.no_grad()
    def _fit_connector(self) -> None:
        """Ridge regression from shuffled patches to the mean embedding of the words they show."""
        table = self.model.model.text_model.embed_tokens.weight.float()
        words = torch.stack([_meaning(table, self.tokenizer, name) for name in NAMES])
        features, targets = [], []
        for place in range(FITTED // 50):
            rng = RandomState([TRAINING_SEED, 99, place])
            batch = make_batch(self.tokenizer, [draw(rng, Phase(0, 0.2, 0)) for _ in range(50)])
            features.append(self._patches(batch.pixels).flatten(0, 1))
            shown = batch.shown.flatten(0, 1)
            targets.append(shown @ words / shown.sum(1, keepdim=True).clamp(min=1) ** 0.5)
        x, y = torch.cat(features).double(), torch.cat(targets).double()
        gram = x.T @ x
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        fitted = torch.linalg.solve(gram, x.T @ y).T  # [576, 768]
        self.connector.modality_projection.proj.weight.copy_(fitted.float())

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tower's output, shuffled: [B, 16, 768]."""
        grid = smolvlm.SIDE // smolvlm.PATCH
        whole = torch.ones(len(pixels), grid, grid, dtype=torch.bool)
        seen = self.tower(pixel_values=pixels, patch_attention_mask=whole).last_hidden_state
        return self.connector.pixel_shuffle(seen, smolvlm.SHUFFLE)

    def step(self, progress: float) -> tuple[float, float]:
        """Draw a batch, take one step; returns (answer loss, localisation loss)."""
        phase = schedule(self.settings, self.step_count, progress)
        return self.step_on(self.batch(self.step_count, progress), phase)

    def batch(self, step: int, progress: float) -> Batch:
        """The drawings of a step."""
        phase = schedule(self.settings, step, progress)
        rng = RandomState([TRAINING_SEED, self.settings.seed, step])
        return make_batch(
            self.tokenizer, [draw(rng, phase) for _ in range(self.settings.batch_size)]
        )

    def step_on(self, batch: Batch, phase: Phase) -> tuple[float, float]:
        """One optimizer step on a given batch."""
        for optimizer, factor in zip(self.optimizers, (1, MUON_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = factor * phase.learning_rate
        image = self.connector.modality_projection(self._patches(batch.pixels))  # [B, 16, 576]
        localisation = localisation_loss(self.head(image), batch.shown)
        logits, labels = self.answer_logits(batch, image)
        answer = functional.cross_entropy(logits, labels)
        (answer + phase.localisation * localisation).backward()
        self.take_step()
        return answer.item(), localisation.item()

    def answer_logits(self, batch: Batch, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits at every token of an answer, [answer tokens, vocabulary], and the tokens."""
        decoder = self.model.model.text_model
        own = (batch.tokens - smolvlm.LANGUAGE_ROWS).clamp(min=0)
        is_own = (batch.tokens >= smolvlm.LANGUAGE_ROWS)[..., None]
        inputs = torch.where(is_own, self.rows[own], decoder.embed_tokens(batch.tokens).float())
        place = batch.tokens == self.model.config.image_token_id
        inputs = inputs.masked_scatter(place[..., None], image)
        # Padding stands on the right, where causal attention does not see it: no mask is needed.
        hidden = decoder(inputs_embeds=inputs.bfloat16(), use_cache=False).last_hidden_state
        asked = batch.labels[:, 1:] != IGNORED
        hidden = hidden[:, :-1][asked]
        frozen = decoder.embed_tokens.weight[: smolvlm.LANGUAGE_ROWS]
        logits = torch.cat([hidden @ frozen.T, hidden @ self.rows.bfloat16().T], 1)
        return logits.float(), batch.labels[:, 1:][asked]

    @torch.no_grad()
    def exact_match(self, rows: list[tuple[str, Drawing]]) -> dict[str, float]:
        """The share of drawings whose own question is answered greedily to the last token.

        An answer is greedy decoding's if every token of it is the likeliest after those before it.
        """
        hits: dict[str, list[bool]] = {}
        for start in range(0, len(rows), 50):
            part = rows[start : start + 50]
            turns = [(row, [(row.question, row.answer)]) for _, row in part]
            batch = make_batch(self.tokenizer, turns)
            image = self.connector.modality_projection(self._patches(batch.pixels))
            logits, labels = self.answer_logits(batch, image)
            right = logits.argmax(-1) == labels
            count = (batch.labels != IGNORED).sum(1).tolist()
            for (task, _), said in zip(part, right.split(count)):
                hits.setdefault(task, []).append(bool(said.all()))
        shares = {task: sum(good) / len(good) for task, good in hits.items()}
        every = [hit for good in hits.values() for hit in good]
        return shares | {"all": sum(every) / len(every)}

    def write_trained(self, path) -> None:
        """Replace the file of the trained part, in bfloat16."""
        parts = {f"model.vision_model.{k}": v for k, v in self.tower.state_dict().items()}
        parts |= {f"model.connector.{k}": v for k, v in self.connector.state_dict().items()}
        parts |= {"added_tokens": self.rows.detach()}
        replace_tensors(path, {name: value.bfloat16() for name, value in parts.items()})


def _run_fast(decoder) -> None:
    """Run the frozen decoder in bfloat16, layer by layer compiled.

    The sequences are short, where attention written out is faster on a CPU than the fused kernel:
    a step takes 1.35 s on two cores, and 3.4 s without the two.
    """
    decoder.to(torch.bfloat16)
    decoder.set_attn_implementation("eager")
    for layer in decoder.layers:
        layer.compile(dynamic=True)


def _meaning(table: torch.Tensor, tokenizer, name: str) -> torch.Tensor:
    """The embedding of a word, the mean of its tokens; words have a space before them."""
    text = name if len(name) == 1 else f" {name}"
    return table[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)


@torch.no_grad()
def start_tower(tower) -> None:
    """Start the tower as the second reference's, whose shape it has.

    The last norm, which LLaVA-OneVision does not use, starts as the identity.
    """
    weights = load_file(onevision.FOLDER / "model.safetensors")
    prefix = "vision_tower.vision_model."
    own = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
    own |= {"post_layernorm.weight": torch.ones(192), "post_layernorm.bias": torch.zeros(192)}
    tower.load_state_dict({name: value.float() for name, value in own.items()})
