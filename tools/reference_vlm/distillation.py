"""Train the second reference VLM from the first: one step of each of its two stages.

    look   The tower and the projector learn. Each of the 8 · 8 tokens becomes the first reference's
           merged token that stands under it in the original image. A linear head on the token names
           what stands there, as in the first reference's training. Where an image is 112 × 112, the
           patches of both towers are the same, and the first 128 channels of the first four blocks
           follow the first reference's residual stream.
    read   The decoder learns to answer from tokens between the tower's own and the first
           reference's. At the end they are mostly the tower's.

Muon moves the matrices, and AdamW everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from numpy.random import RandomState
from PIL import Image, ImageDraw

from tools.reference_vlm import drawing, onevision
from tools.reference_vlm.drawing import Drawing, Label
from tools.reference_vlm.model import BUNDLED, load_model, patches
from tools.reference_vlm.training import (
    TRAINING_SEED,
    BaseTrainer,
    Settings,
    cells,
    decay_groups,
    localisation_loss,
)

LOOK_UNTIL = 0.6  # of the whole schedule
WARM_UP_STEPS = 40
MUON_RATE = 10  # times AdamW's rate, because a step of Muon is an orthogonal matrix times its rate
GRID = onevision.SIDE // onevision.PATCH  # patches along a side
PAGES = 0.4  # share of the images of stage `look` that are pages


class Stage(StrEnum):
    """The two stages of the training; the module's text says what each teaches."""

    look = "look"
    read = "read"


@dataclass(frozen=True)
class Phase:
    """What the schedule prescribes at one moment of training."""

    stage: Stage
    learning_rate: float
    easy: float  # chance of a one-character drawing
    taught: float  # largest share of the way from the tower's tokens to the teacher's
    size: tuple[int, int]  # width and height of this step's images


def schedule(settings: Settings, step: int, progress: float) -> Phase:
    """The phase at `progress`, from 0 to 1, of the whole training.

    In each stage the learning rate falls to a twentieth.
    """
    looking = progress < LOOK_UNTIL
    within = progress / LOOK_UNTIL if looking else (progress - LOOK_UNTIL) / (1 - LOOK_UNTIL)
    rate = settings.learning_rate * (1 if looking else 0.6)
    return Phase(
        stage=Stage.look if looking else Stage.read,
        learning_rate=rate * min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.05, 1 - within),
        easy=max(0.0, 0.5 - within),
        taught=1 - 0.6 * within,
        size=drawing.SIZES[step % len(drawing.SIZES)],
    )


class OneVisionTrainer(BaseTrainer):
    """The training of the second reference VLM, with the first as its teacher."""

    def __init__(self, settings: Settings, tokenizer):
        torch.manual_seed(settings.seed)
        model = onevision.make_model(onevision.make_config(tokenizer)).train()
        super().__init__(settings, tokenizer, model)
        teacher = load_model(BUNDLED)
        onevision.start_from(self.model, teacher)
        self.teacher = Teacher(teacher.model.visual)
        self.head = torch.nn.Linear(self.model.config.text_config.hidden_size, len(drawing.NAMES))
        core = self.model.model
        tower = core.vision_tower
        self._blocks = Recorder(tower.encoder.layers[: self.teacher.depth])
        self.moving = {
            Stage.look: [tower.embeddings, tower.encoder, core.multi_modal_projector],
            Stage.read: [core.language_model],
        }
        # LLaVA-OneVision takes the last block's output from before this norm.
        tower.post_layernorm.requires_grad_(False)
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, and Muon for the matrices of the blocks."""
        moving = {name: p for name, p in self.parameters().items() if p.requires_grad}
        outside = ("embed", "localisation")  # matrices that Muon does not take
        by_muon = {
            name: p
            for name, p in moving.items()
            if p.ndim == 2 and not any(part in name for part in outside)
        }
        rest = [p for name, p in moving.items() if name not in by_muon]
        return [
            torch.optim.AdamW(decay_groups(rest, 0.02), betas=(0.9, 0.98)),
            torch.optim.Muon(list(by_muon.values()), weight_decay=0.02, momentum=0.95),
        ]

    def step(self, progress: float) -> tuple[float, float]:
        """Draw a batch, take one step; returns (answer loss, vision loss).

        A stage has one of the two losses; the other is 0.
        """
        phase = schedule(self.settings, self.step_count, progress)
        rng = RandomState([TRAINING_SEED, self.settings.seed, self.step_count])
        rows = [self.draw(rng, phase) for _ in range(self.settings.batch_size)]
        return self.step_on(rows, phase, rng)

    @staticmethod
    def draw(rng: RandomState, phase: Phase) -> Drawing:
        """One training drawing of the phase's size and ease; in stage `look` it may be a page."""
        if phase.stage is Stage.look and drawing.chance(rng, PAGES):
            return page(rng, *phase.size)
        return drawing.TASKS[drawing.pick_task(rng)](rng, *phase.size, easy=phase.easy)

    def step_on(self, rows: list[Drawing], phase: Phase, rng: RandomState) -> tuple[float, float]:
        """One optimizer step on given drawings; `rng` says how the decoder's tokens are mixed."""
        for stage, modules in self.moving.items():
            for module in modules:
                module.requires_grad_(stage is phase.stage)
        for optimizer, factor in zip(self.optimizers, (1, MUON_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = factor * phase.learning_rate
        looking = phase.stage is Stage.look
        if looking:
            loss = self.look(rows)
        else:
            loss = self.read(rows, torch.from_numpy(rng.uniform(0, phase.taught, len(rows))))
        loss.backward()
        self.take_step()
        return (0.0, loss.item()) if looking else (loss.item(), 0.0)

    def look(self, rows: list[Drawing]) -> torch.Tensor:
        """The loss of stage `look`: distances to the teacher's tokens and blocks, localisation."""
        merged, blocks = self.teacher([row.image for row in rows])
        projected = self.tokens(rows)
        localisation = localisation_loss(self.head(projected.float()), under_patches(rows))
        loss = 3 * relative_distance(projected, merged) + localisation
        for mine, theirs in zip(self._blocks.outputs, blocks):
            loss = loss + 0.3 * relative_distance(mine[..., : theirs.shape[-1]], theirs)
        return loss

    def read(self, rows: list[Drawing], share: torch.Tensor) -> torch.Tensor:
        """The loss of stage `read`: the cross-entropy of the answers.

        The image's tokens are moved `share` [rows] of the way from the tower's to the teacher's.
        """
        batch = onevision.make_batch(
            self.tokenizer, [(row.image, row.question, row.answer) for row in rows]
        )
        with torch.no_grad():
            own = self.tokens(rows).float()
            taught = self.teacher([row.image for row in rows])[0].float()
            seen = own + share.float().view(-1, 1, 1) * (taught - own)  # [rows, 64, width]
        newline = self.model.model.image_newline.expand(len(rows), 1, -1)
        ids = batch["input_ids"]
        embedded = self.model.get_input_embeddings()(ids)
        place = (ids == self.model.config.image_token_index)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(place, torch.cat([seen, newline], 1))
        # There is no mask: the padding is on the right, where no token of a row sees it.
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(inputs_embeds=embedded, labels=batch["labels"]).loss

    def tokens(self, rows: list[Drawing]) -> torch.Tensor:
        """The projector's tokens of the images, without the newline: [rows, 64, width]."""
        pixels = torch.from_numpy(np.stack([onevision.tile(row.image) for row in rows]))
        tower = self.model.model.vision_tower
        with torch.autocast("cpu", torch.bfloat16):
            seen = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
            return self.model.model.multi_modal_projector(seen)


def relative_distance(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean squared distance over the variance within `theirs`, [images, tokens, width] each.

    At 1, `mine` is as good as the mean of `theirs`.
    """
    mine, theirs = mine.float(), theirs.float()
    return (mine - theirs).square().mean() / theirs.var((0, 1)).mean()


class Recorder:
    """Keeps the latest output of each of some modules."""

    def __init__(self, modules):
        self.outputs: list[torch.Tensor] = [torch.empty(0)] * len(modules)
        for place, module in enumerate(modules):
            module.register_forward_hook(
                lambda _, inputs, output, place=place: self._keep(place, output)
            )

    def _keep(self, place: int, output) -> None:
        self.outputs[place] = output[0] if isinstance(output, tuple) else output


class Teacher:
    """The first reference's vision tower, seen from the second's patches."""

    def __init__(self, visual):
        self.visual = visual
        self.depth = len(visual.blocks)
        self._blocks = Recorder(visual.blocks)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The merged token under each patch [n, 64, 256], and the blocks' outputs [n, 64, 128].

        All images are of one size. There are no blocks' outputs unless it is 112 × 112.
        """
        count, (width, height) = len(images), images[0].size
        values, grids = zip(*(patches(image) for image in images))
        pixels = torch.from_numpy(np.concatenate(values))
        with torch.autocast("cpu", torch.bfloat16):
            merged = self.visual(pixels, grid_thw=torch.tensor(grids)).pooler_output
        merged = at_patches(merged.view(count, height // 28, width // 28, -1), width, height)
        if (width, height) != (onevision.SIDE, onevision.SIDE):
            return merged, []
        return merged, [_row_by_row(block, count) for block in self._blocks.outputs]


def _row_by_row(block: torch.Tensor, count: int) -> torch.Tensor:
    """Patches in Qwen's order (4, 4, 2, 2) as rows of eight: [n · 64, width] to [n, 64, width]."""
    merged_order = block.view(count, 4, 4, 2, 2, -1)
    return merged_order.permute(0, 1, 3, 2, 4, 5).reshape(count, GRID * GRID, -1)


def at_patches(grid: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The merged token under each patch, [n, 64, …].

    grid: merged tokens of the original image, [n, height / 28, width / 28, …].
    """
    centres = torch.arange(GRID) * onevision.PATCH + onevision.PATCH // 2  # in the squeezed image
    down, right = (centres * side // onevision.SIDE // 28 for side in (height, width))
    return grid[:, down][:, :, right].flatten(1, 2)


def under_patches(rows: list[Drawing]) -> torch.Tensor:
    """What stands under each patch: 0/1 [rows, 64, names]."""
    width, height = rows[0].image.size
    grids = [cells(row).view(height // 28, width // 28, -1) for row in rows]
    return at_patches(torch.stack(grids), width, height)


def page(rng: RandomState, width: int, height: int) -> Drawing:
    """A drawing without a question: print, handwriting and form rows from top to bottom.

    It shows more than the drawing of any task.
    """
    image = drawing.background(rng, width, height)
    y = drawing.integer(rng, 1, 14)
    labels: list[Label] = []
    while y < height - 18:
        new, y = drawing.pick(rng, (_printed, _printed, _handwritten, _form_row))(rng, image, y)
        labels += new
    inside = [label for label in labels if label.x < width - 4 and label.y < height - 4]
    return Drawing(image, "", "", inside)


def _printed(rng: RandomState, image: Image.Image, y: int) -> tuple[list[Label], int]:
    """Draw a line of print below `y`. Returns what it shows, and where the next line may begin."""
    font = drawing.load_font(drawing.pick(rng, drawing.FONTS), drawing.integer(rng, 18, 28))
    length = drawing.integer(rng, 1, image.width // 18)
    text = "".join(drawing.pick(rng, drawing.CHARACTERS) for _ in range(length))
    left, top, right, bottom = font.getbbox(text)
    x = drawing.integer(rng, 2, max(3, image.width - int(right - left) - 4)) - left
    ink = tuple(drawing.integer(rng, 0, 90) for _ in range(3))
    ImageDraw.Draw(image).text((x, y - top), text, fill=ink, font=font)
    below = y + int(bottom - top) + drawing.integer(rng, 2, 10)
    return drawing.letters(text, x, y - top, font), below


def _handwritten(rng: RandomState, image: Image.Image, y: int) -> tuple[list[Label], int]:
    """The same for a line of handwritten digits."""
    side = drawing.integer(rng, 22, 27)
    count = drawing.integer(rng, 1, image.width // side)
    x = drawing.integer(rng, 2, max(3, image.width - count * side - 2))
    bitmaps, targets = drawing.handwriting()
    labels = []
    for place in range(count):
        index = drawing.pick(rng, drawing.TRAINING_DIGITS)
        stroke = Image.fromarray(bitmaps[index]).resize((side, side), Image.Resampling.BICUBIC)
        image.paste((25, 25, 40), (x + place * side, y), stroke)
        labels.append(Label(str(targets[index]), x + (place + 0.5) * side, y + side / 2))
    return labels, y + side + drawing.integer(rng, 0, 6)


def _form_row(rng: RandomState, image: Image.Image, y: int) -> tuple[list[Label], int]:
    """The same for a key and its number."""
    font = drawing.load_font(drawing.pick(rng, drawing.FONTS[:2]), drawing.integer(rng, 15, 17))
    x = drawing.integer(rng, 1, 3 if image.width < 100 else 20)
    key, value = drawing.pick(rng, drawing.KEYS), str(drawing.integer(rng, 1, 99))
    draw = ImageDraw.Draw(image)
    draw.text((x, y), f"{key}:", fill=(20, 20, 20), font=font)
    draw.text((x + 56, y), value, fill=(20, 20, 60), font=font)
    labels = [Label(key, x + 14, y + 8), *drawing.letters(value, x + 56, y, font)]
    return labels, y + drawing.integer(rng, 20, 32)
