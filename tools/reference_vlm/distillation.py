"""Train the second reference VLM from the first: one step of each of its three stages.

    look      the tower's tokens, after the projector, become the first reference's: each of the 8 · 8 is regressed on
              the merged token that stands under it in the original image, and where an image is 112 × 112 (patches are
              the same then) the first four blocks' first 128 channels on the first reference's residual stream
    read      cross-entropy of the answer; the tower stands still
    together  cross-entropy of the answer; everything moves

Matrices move by Muon, everything else by AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from numpy.random import RandomState
from PIL import Image, ImageDraw

from tools.reference_vlm import drawing, onevision
from tools.reference_vlm.drawing import Drawing
from tools.reference_vlm.model import BUNDLED, load_model, patches
from tools.reference_vlm.training import TRAINING_SEED, BaseTrainer, Settings

LOOK_UNTIL, READ_UNTIL = 0.3, 0.4  # of the whole schedule
WARM_UP_STEPS = 40
MUON_RATE = 10  # times AdamW's: Muon's steps are orthogonal matrices times its rate
GRID = onevision.SIDE // onevision.PATCH
PAGES = 0.4  # share of the images of stage `look` that are pages


class Stage(StrEnum):
    look = "look"
    read = "read"
    together = "together"


@dataclass(frozen=True)
class Phase:
    """What the schedule prescribes at one moment of training."""

    stage: Stage
    learning_rate: float
    easy: float  # chance of a one-character drawing
    size: tuple[int, int]  # of this step's images


def schedule(settings: Settings, step: int, progress: float) -> Phase:
    """The phase at `progress` (0..1) of the whole training; the rate falls to a twentieth twice, at each stage's end."""
    stage = Stage.look if progress < LOOK_UNTIL else Stage.read if progress < READ_UNTIL else Stage.together
    looking = stage is Stage.look
    within = progress / LOOK_UNTIL if looking else (progress - LOOK_UNTIL) / (1 - LOOK_UNTIL)
    rate = settings.learning_rate * (1 if looking else 0.4)
    return Phase(
        stage=stage,
        learning_rate=rate * min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.05, min(1.0, (1 - within) / 0.6)),
        easy=max(0.0, 0.6 - 1.2 * within) if looking else max(0.0, 0.6 - 0.8 * within),
        size=drawing.SIZES[step % len(drawing.SIZES)],
    )


class OneVisionTrainer(BaseTrainer):
    """The second reference, the first one that teaches it, and both optimizers, `step_count` steps in."""

    def __init__(self, settings: Settings, tokenizer):
        torch.manual_seed(settings.seed)
        super().__init__(settings, tokenizer, onevision.make_model(onevision.make_config(tokenizer)).train())
        teacher = load_model(BUNDLED)
        onevision.start_from(self.model, teacher)
        self.teacher = Teacher(teacher.model.visual)
        tower = self.model.model.vision_tower
        tower.post_layernorm.requires_grad_(False)  # LLaVA-OneVision takes the last block's output before it
        self._blocks = Recorder(tower.encoder.layers[: self.teacher.depth])
        moving = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        hidden = [p for name, p in moving if p.ndim == 2 and "embed" not in name]
        taken = {id(p) for p in hidden}
        rest = [p for _, p in moving if id(p) not in taken]
        self.optimizers = [
            torch.optim.AdamW(
                [
                    {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.02},
                    {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
                ],
                betas=(0.9, 0.98),
            ),
            torch.optim.Muon(hidden, weight_decay=0.02, momentum=0.95),
        ]

    def step(self, progress: float) -> tuple[float, float]:
        """Draw a batch, take one step; returns (answer loss, distance to the teacher), 0 for what the stage has not."""
        phase = schedule(self.settings, self.step_count, progress)
        rng = RandomState([TRAINING_SEED, self.settings.seed, self.step_count])
        rows = [self.draw(rng, phase) for _ in range(self.settings.batch_size)]
        return self.step_on(rows, phase)

    @staticmethod
    def draw(rng: RandomState, phase: Phase) -> Drawing:
        if phase.stage is Stage.look and drawing.chance(rng, PAGES):
            return page(rng, *phase.size)
        return drawing.TASKS[drawing.pick_task(rng)](rng, *phase.size, easy=phase.easy)

    def step_on(self, rows: list[Drawing], phase: Phase) -> tuple[float, float]:
        """One optimizer step on given drawings."""
        self.model.model.vision_tower.encoder.requires_grad_(phase.stage is not Stage.read)
        self.model.model.vision_tower.embeddings.requires_grad_(phase.stage is not Stage.read)
        loss = self.distance(rows) if phase.stage is Stage.look else self.answer_loss(rows)
        loss.backward()
        for optimizer, factor in zip(self.optimizers, (1, MUON_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = factor * phase.learning_rate
        self.take_step()
        return (0.0, loss.item()) if phase.stage is Stage.look else (loss.item(), 0.0)

    def answer_loss(self, rows: list[Drawing]) -> torch.Tensor:
        """Cross-entropy at the answers' tokens."""
        batch = onevision.make_batch(self.tokenizer, [(row.image, row.question, row.answer) for row in rows])
        del batch["attention_mask"]  # the padding is on the right: no token of a row sees it
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**batch).loss

    def distance(self, rows: list[Drawing]) -> torch.Tensor:
        """Squared distance to the teacher's tokens and, for 112 × 112 images, blocks, each over the tokens' variance."""
        merged, blocks = self.teacher([row.image for row in rows])
        pixels = torch.from_numpy(np.stack([onevision.tile(row.image) for row in rows]))
        tower = self.model.model.vision_tower
        with torch.autocast("cpu", torch.bfloat16):
            seen = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
            projected = self.model.model.multi_modal_projector(seen)
        loss = 3 * relative_distance(projected, merged)
        for mine, theirs in zip(self._blocks.outputs, blocks):
            loss = loss + 0.7 * relative_distance(mine[..., : theirs.shape[-1]], theirs)
        return loss


def relative_distance(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean squared distance over the variance within `theirs` [images, tokens, width]: 1 is as good as its mean."""
    mine, theirs = mine.float(), theirs.float()
    return (mine - theirs).square().mean() / theirs.var((0, 1)).mean()


class Recorder:
    """The latest output of each of some modules."""

    def __init__(self, modules):
        self.outputs: list[torch.Tensor] = [torch.empty(0)] * len(modules)
        for place, module in enumerate(modules):
            module.register_forward_hook(lambda _, inputs, output, place=place: self._keep(place, output))

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
        """Of images of one size: the merged token under each patch [n, 64, 256], and the blocks' outputs [n, 64, 128]
        where that size is 112 × 112, else none."""
        count, (width, height) = len(images), images[0].size
        values, grids = zip(*(patches(image) for image in images))
        with torch.autocast("cpu", torch.bfloat16):
            merged = self.visual(torch.from_numpy(np.concatenate(values)), grid_thw=torch.tensor(grids)).pooler_output
        centres = torch.arange(GRID) * onevision.PATCH + onevision.PATCH // 2  # of patches, in the squeezed image
        down, right = (centres * side // onevision.SIDE // 28 for side in (height, width))
        merged = merged.view(count, height // 28, width // 28, -1)[:, down][:, :, right].flatten(1, 2)
        native = (width, height) == (onevision.SIDE, onevision.SIDE)
        return merged, [_row_by_row(block, count) for block in self._blocks.outputs] if native else []


def _row_by_row(block: torch.Tensor, count: int) -> torch.Tensor:
    """Qwen's order of patches (4, 4, 2, 2) to rows of eight: [n · 64, width] to [n, 64, width]."""
    return block.view(count, 4, 4, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(count, GRID * GRID, -1)


def page(rng: RandomState, width: int, height: int) -> Drawing:
    """Lines of print, handwriting and form rows from top to bottom: more to see than in any task's drawing."""
    image = drawing.background(rng, width, height)
    y = drawing.integer(rng, 1, 14)
    while y < height - 18:
        y = drawing.pick(rng, (_printed, _printed, _handwritten, _form_row))(rng, image, y)
    return Drawing(image, "", "", [])


def _printed(rng: RandomState, image: Image.Image, y: int) -> int:
    """Draw a line of print below `y`; returns where the next line may begin."""
    font = drawing.load_font(drawing.pick(rng, drawing.FONTS), drawing.integer(rng, 18, 28))
    text = "".join(drawing.pick(rng, drawing.CHARACTERS) for _ in range(drawing.integer(rng, 1, image.width // 18)))
    left, top, right, bottom = font.getbbox(text)
    x = drawing.integer(rng, 2, max(3, image.width - int(right - left) - 4)) - left
    ink = tuple(drawing.integer(rng, 0, 90) for _ in range(3))
    ImageDraw.Draw(image).text((x, y - top), text, fill=ink, font=font)
    return y + int(bottom - top) + drawing.integer(rng, 2, 10)


def _handwritten(rng: RandomState, image: Image.Image, y: int) -> int:
    side = drawing.integer(rng, 22, 27)
    count = drawing.integer(rng, 1, image.width // side)
    x = drawing.integer(rng, 2, max(3, image.width - count * side - 2))
    bitmaps, _ = drawing.handwriting()
    for place in range(count):
        bitmap = Image.fromarray(bitmaps[drawing.pick(rng, drawing.TRAINING_DIGITS)])
        stroke = bitmap.resize((side, side), Image.Resampling.BICUBIC)
        image.paste((25, 25, 40), (x + place * side, y), stroke)
    return y + side + drawing.integer(rng, 0, 6)


def _form_row(rng: RandomState, image: Image.Image, y: int) -> int:
    font = drawing.load_font(drawing.pick(rng, drawing.FONTS[:2]), drawing.integer(rng, 15, 17))
    x = drawing.integer(rng, 1, 3 if image.width < 100 else 20)
    draw = ImageDraw.Draw(image)
    draw.text((x, y), f"{drawing.pick(rng, drawing.KEYS)}:", fill=(20, 20, 20), font=font)
    draw.text((x + 56, y), str(drawing.integer(rng, 1, 99)), fill=(20, 20, 60), font=font)
    return y + drawing.integer(rng, 20, 32)
