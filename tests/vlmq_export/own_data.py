"""A user's own folder of pictures and a file of rows about them, elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def photo(file: Path, number: int, size: tuple[int, int] = (1280, 720)) -> Path:
    """A picture with the soft colours, the noise and the edges of a photo."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / (height, width)[0]
    waves = [np.sin(x * (3 + number) + c) * np.cos(y * (2 + c)) for c in range(3)]
    noise = np.random.default_rng(number).normal(0, 6, (height, width, 3))
    pixels = 128 + 90 * np.stack(waves, -1) + noise
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    box = [width // 4, height // 4, width // 2, height // 2]
    ImageDraw.Draw(image).ellipse(box, fill=(200, 16 * number % 256, 40))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, quality=88)
    return file


def own_rows(folder: Path, count: int = 12, size: tuple[int, int] = (84, 56)) -> Path:
    """chats.json in `folder`, about pictures that lie in `folder`/images: the image root."""
    rows = []
    for i in range(count):
        photo(folder / "images" / f"p{i:02}.jpg", i, size)
        turns = [
            {"from": "human", "value": "<image>\nWhat is in the picture?"},
            {"from": "gpt", "value": f"A disc, number {i}."},
        ]
        rows.append({"id": f"own-{i:02}", "image": f"p{i:02}.jpg", "conversations": turns})
    (folder / "chats.json").write_text(json.dumps(rows), "utf-8")
    return folder / "chats.json"
