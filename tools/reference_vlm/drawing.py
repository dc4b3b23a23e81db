"""The five tasks that the reference VLM knows. Each draws an image and asks a question about it.

    read     1 to 4 printed characters
    digits   1 to 3 handwritten digits
    form     find a row by its key and read its value
    bars     which bar is tallest or shortest, or how many there are
    shapes   how many there are, or what colour one has

A task is a pure function of its random generator, `task(rng, width, height, *, easy, pool)`:

    easy   the chance of a one-character (one-row) drawing, with which training begins; the released
           data has none
    pool   the indices into scikit-learn's UCI digits that may be pasted

The generator is numpy's legacy RandomState. numpy promises that its streams never change (NEP 19),
so that the bundled data can be drawn again on any machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.random import RandomState
from PIL import Image, ImageDraw, ImageFont

T = TypeVar("T")
Pool = Sequence[int]  # indices into scikit-learn's UCI digits
# Width and height in pixels: multiples of 28, so that no runtime resizes the images.
SIZES = ((84, 84), (112, 112), (168, 112))
CHARACTERS = "0123456789ABCEHKTX"
KEYS = ("Total", "Tax", "Date", "Item", "Paid", "Room", "Age", "Code")
COLOURS = {
    "red": (214, 39, 40),
    "blue": (31, 119, 180),
    "green": (44, 160, 44),
    "orange": (255, 150, 30),
    "purple": (130, 60, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
# What a label may name. The localisation loss has one class for each.
NAMES = (*CHARACTERS, *KEYS, *COLOURS, *SHAPES)
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf")

# Every fifth handwritten digit is held out of training and of calibration.
DIGIT_COUNT = 1797
TRAINING_DIGITS = tuple(index for index in range(DIGIT_COUNT) if index % 5 != 0)
HELDOUT_DIGITS = tuple(index for index in range(DIGIT_COUNT) if index % 5 == 0)


class Label(NamedTuple):
    """Something that a drawing shows."""

    name: str  # one of NAMES
    x: float  # pixel where it stands
    y: float


class Drawing(NamedTuple):
    """An image, a question about it, the answer, and everything that the image shows."""

    image: Image.Image
    question: str
    answer: str
    labels: list[Label]


def read(
    rng: RandomState, width: int, height: int, *, easy: float = 0.0, pool: Pool = TRAINING_DIGITS
) -> Drawing:
    """One line of print. The question asks for the text."""
    image = background(rng, width, height)
    length = 1 if chance(rng, easy) else integer(rng, 1, 3 if width < 100 else 4)
    text = "".join(pick(rng, CHARACTERS) for _ in range(length))
    font = load_font(pick(rng, FONTS), integer(rng, 20, 28))
    left, top, right, bottom = font.getbbox(text)
    x = integer(rng, 2, max(3, width - int(right - left) - 4)) - left
    y = integer(rng, 2, max(3, height - int(bottom - top) - 4)) - top
    ink = tuple(integer(rng, 0, 90) for _ in range(3))
    ImageDraw.Draw(image).text((x, y), text, fill=ink, font=font)
    question = pick(rng, ("What text is shown?", "Read the text."))
    return Drawing(image, question, text, letters(text, x, y, font))


def digits(
    rng: RandomState, width: int, height: int, *, easy: float = 0.0, pool: Pool = TRAINING_DIGITS
) -> Drawing:
    """A row of handwritten digits. The question asks for the number."""
    image = background(rng, width, height)
    count = 1 if chance(rng, easy) else integer(rng, 1, 3)
    side = integer(rng, 22, 27)
    x = integer(rng, 2, max(3, width - count * side - 2))
    y = integer(rng, 2, max(3, height - side - 2))
    bitmaps, targets = handwriting()
    labels = []
    for place in range(count):
        index = pick(rng, pool)
        stroke = Image.fromarray(bitmaps[index]).resize((side, side), Image.Resampling.BICUBIC)
        image.paste((25, 25, 40), (x + place * side, y), stroke)
        labels.append(Label(str(targets[index]), x + (place + 0.5) * side, y + side / 2))
    question = pick(rng, ("What number is handwritten?", "Read the handwriting."))
    return Drawing(image, question, "".join(label.name for label in labels), labels)


def form(
    rng: RandomState, width: int, height: int, *, easy: float = 0.0, pool: Pool = TRAINING_DIGITS
) -> Drawing:
    """Rows of a key and a number. The question names a key and asks for its number."""
    image = background(rng, width, height)
    draw = ImageDraw.Draw(image)
    rows = 1 if chance(rng, easy / 2) else integer(rng, 2, 2 if height < 100 else 3)
    keys = sample(rng, KEYS, rows)
    values = [str(integer(rng, 1, 9 if chance(rng, easy) else 99)) for _ in keys]
    font = load_font(pick(rng, FONTS[:2]), integer(rng, 15, 17))
    x, y = integer(rng, 1, 3 if width < 100 else 20), integer(rng, 3, 14)
    labels = []
    for key, value in zip(keys, values):
        draw.text((x, y), f"{key}:", fill=(20, 20, 20), font=font)
        draw.text((x + 56, y), value, fill=(20, 20, 60), font=font)
        labels += [Label(key, x + 14, y + 8), *letters(value, x + 56, y, font)]
        y += integer(rng, 26, 32)
    asked = integer(rng, 0, rows - 1)
    return Drawing(image, f"What is the {keys[asked].lower()}?", values[asked], labels)


def bars(
    rng: RandomState, width: int, height: int, *, easy: float = 0.0, pool: Pool = TRAINING_DIGITS
) -> Drawing:
    """A bar chart. The question asks for the colour of a bar, or for their number."""
    image = background(rng, width, height)
    draw = ImageDraw.Draw(image)
    count = integer(rng, 2, 5)
    colours = sample(rng, tuple(COLOURS), count)
    values = sample(rng, range(2, 11), count)
    step, floor = (width - 16) // count, height - 6
    labels = []
    for place, (colour, value) in enumerate(zip(colours, values)):
        x, top = 8 + place * step, floor - value * (height - 16) // 10
        draw.rectangle((x, top, x + step - 4, floor), fill=COLOURS[colour])
        labels.append(Label(colour, x + step / 2 - 2, top))
    draw.line((4, floor, width - 4, floor), fill=(0, 0, 0))
    answers = {
        "Which bar is tallest?": colours[values.index(max(values))],
        "Which bar is shortest?": colours[values.index(min(values))],
        "How many bars?": str(count),
    }
    question = pick(rng, tuple(answers))
    return Drawing(image, question, answers[question], labels)


def shapes(
    rng: RandomState, width: int, height: int, *, easy: float = 0.0, pool: Pool = TRAINING_DIGITS
) -> Drawing:
    """Coloured shapes on a grid of 40 pixels. The question asks for a number or a colour."""
    image = background(rng, width, height)
    draw = ImageDraw.Draw(image)
    cells = [(column, row) for column in range(width // 40) for row in range(height // 40)]
    cells = sample(rng, cells, integer(rng, 1, min(5, len(cells))))
    drawn, labels = [], []
    for column, row in cells:
        colour, shape, radius = pick(rng, tuple(COLOURS)), pick(rng, SHAPES), integer(rng, 10, 16)
        x, y = column * 40 + 20 + integer(rng, -3, 3), row * 40 + 20 + integer(rng, -3, 3)
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLOURS[colour])
        drawn.append((colour, shape))
        labels += [Label(colour, x, y), Label(shape, x, y)]

    if chance(rng, 0.5):
        # Mostly a colour that is there. Otherwise the answer would often be 0.
        colour = pick(rng, tuple(COLOURS)) if chance(rng, 0.4) else drawn[0][0]
        count = sum(other == colour for other, _ in drawn)
        return Drawing(image, f"How many {colour} shapes?", str(count), labels)
    single = [(c, s) for c, s in drawn if sum(other == s for _, other in drawn) == 1]
    if not single:
        return Drawing(image, "How many shapes?", str(len(drawn)), labels)
    colour, shape = pick(rng, single)
    return Drawing(image, f"What color is the {shape}?", colour, labels)


TASKS: dict[str, Callable[..., Drawing]] = {
    "read": read,
    "digits": digits,
    "form": form,
    "bars": bars,
    "shapes": shapes,
}
# How often training and calibration ask each task, relative to the others: the hard ones more.
TASK_WEIGHTS = {"read": 3.0, "digits": 2.0, "form": 4.0, "bars": 1.5, "shapes": 1.5}


def pick_task(rng: RandomState) -> str:
    """The name of a task, drawn by TASK_WEIGHTS."""
    sums = np.cumsum(list(TASK_WEIGHTS.values()))
    total = sum(TASK_WEIGHTS.values())
    return list(TASKS)[np.searchsorted(sums, rng.random_sample() * total, side="right")]


# --- parts ----------------------------------------------------------------------------------------


def background(rng: RandomState, width: int, height: int) -> Image.Image:
    """Bright paper: a colour, a slant of light across it, and a little grain."""
    paper = np.array([integer(rng, 225, 255) for _ in range(3)], float)
    slant = np.linspace(-1, 1, width)[None, :, None] * rng.uniform(-10, 10)
    slant = slant + np.linspace(-1, 1, height)[:, None, None] * rng.uniform(-10, 10)
    grain = rng.standard_normal((height, width, 1)) * rng.uniform(0, 4)
    pixels = paper + slant + grain  # [height, width, 3]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def letters(text: str, x: float, y: float, font: ImageFont.FreeTypeFont) -> list[Label]:
    """The centre of each character of `text` when it is drawn at (x, y)."""
    _, top, _, bottom = font.getbbox(text)
    middle = y + (top + bottom) / 2
    edges = [font.getlength(text[:end]) for end in range(len(text) + 1)]
    return [
        Label(c, x + (left + right) / 2, middle) for c, left, right in zip(text, edges, edges[1:])
    ]


@functools.cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the DejaVu fonts that matplotlib ships.

    The basic layout engine needs no system library.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """The UCI digits of scikit-learn, and the digit that each shows, [1797].

    The bitmaps are uint8 [1797, 8, 8] with bright ink.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * 15.9).astype(np.uint8), data.target


def integer(rng: RandomState, low: int, high: int) -> int:
    """Uniform in low..high, both ends included."""
    return int(rng.randint(low, high + 1))


def pick(rng: RandomState, choices: Sequence[T]) -> T:
    """One of the choices."""
    return choices[rng.randint(len(choices))]


def sample(rng: RandomState, choices: Sequence[T], count: int) -> list[T]:
    """`count` different choices in random order."""
    return [choices[index] for index in rng.permutation(len(choices))[:count]]


def chance(rng: RandomState, probability: float) -> bool:
    """True with this probability."""
    return bool(rng.random_sample() < probability)
