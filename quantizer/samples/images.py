"""Image files → pixels, with limits on what a file of others may cost to decode."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vlmq_export.errors import CalibrationError, one_line

MAX_PIXELS = 64 * 2**20  # of an image; a larger one is refused before it is decoded
MAX_IMAGE_BYTES = 256 * 2**20  # of a file
MAX_RATIO = 200  # of an image's sides: what Qwen's own preprocessing allows
# Pillow knows more formats, and starts programs for some of them.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
LONGEST_WHY = 300  # characters of a reason in a message


@dataclass(frozen=True)
class ImageBytes:
    """An image file that a row holds itself, in base64 or in a column of bytes."""

    name: str = field(compare=False)  # for messages
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


def load_image(image_file: Path | ImageBytes | Image.Image) -> Image.Image:
    """The first frame of an image file, in RGB on white, turned upright as its EXIF tag says.

    An image that is decoded already is only converted. Raises CalibrationError for what cannot be
    decoded, is too large or too narrow.
    """
    if isinstance(image_file, Image.Image):
        return image_file.convert("RGB")
    with _opened(image_file) as image:
        return _on_white(_eight_bits(ImageOps.exif_transpose(image)))


def image_size(image_file: Path | ImageBytes | Image.Image) -> tuple[int, int]:
    """Width and height in pixels of what `load_image` gives, from the file's header alone.

    A PNG may have its EXIF tag behind its pixels, which are not read: it counts as upright then.
    Raises CalibrationError as `load_image` does, but for damaged pixels.
    """
    if isinstance(image_file, Image.Image):
        return image_file.size
    with _opened(image_file) as image:
        width, height = image.size
        # Pillow turns a TIFF's size while it opens it, and asks a PNG's pixels for a tag.
        turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(image_file: Path | ImageBytes) -> Iterator[Image.Image]:
    """An image file whose header is read, and none of its pixels.

    Raises CalibrationError for a size beyond the limits, and for what goes wrong inside the block.
    """
    try:
        if isinstance(image_file, ImageBytes):
            size, opened = len(image_file.data), io.BytesIO(image_file.data)
        else:
            size, opened = image_file.stat().st_size, image_file
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{size} bytes; {MAX_IMAGE_BYTES} is the limit")
        # Pillow warns of sizes, which are checked below, and of damage that it can read past.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(opened, formats=IMAGE_FORMATS) as image,
        ):
            w, h = image.size
            if w * h > MAX_PIXELS:
                raise ValueError(f"{w}×{h} pixels; {MAX_PIXELS} is the limit")
            if max(w, h) > MAX_RATIO * min(w, h):
                raise ValueError(
                    f"{w}×{h} pixels; a side of {MAX_RATIO} times the other is the limit"
                )
            yield image
    except MemoryError:
        raise
    except Exception as e:  # Pillow's decoders raise all kinds of errors on damaged files
        why = one_line(str(e).replace(str(image_file), "it"))[:LONGEST_WHY]
        raise CalibrationError(
            f"{image_file}: cannot be read as an image ({why}); replace it or drop its row"
        ) from None


def _on_white(image: Image.Image) -> Image.Image:
    """The image in RGB. What is transparent shows white behind it.

    A plain conversion would show the colour that a transparent pixel happens to have, which is
    black in most files: black writing on nothing would become all black.
    """
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with at most 8 bits a channel. Raises ValueError for other wide pixels.

    16-bit grey is divided by 256. Pillow's own conversion would cut it off at 255.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}; save it with 8 bits a channel")
    return image
