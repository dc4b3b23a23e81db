"""What a row names as an image → a file under the image root, or bytes that the row holds."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vlmq_export.errors import one_line
from vlmq_export.quantizer.samples.images import MAX_IMAGE_BYTES, ImageBytes

_LONGEST_NAME = 100  # characters of a name in a message


def shown(value: object) -> str:
    """A name as messages show it. A data URI is a whole image, of which the start is enough."""
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, str) and value.startswith("data:"):
        return f"{one_line(value[:30])}… ({len(value)} characters)"
    text = str(value)
    return one_line(text[:_LONGEST_NAME]) + ("…" if len(text) > _LONGEST_NAME else "")


def image_source(value: Any, root: Path, name: str) -> Path | ImageBytes:
    """The image that `value` stands for. `name` is what messages call an image without a path.

    value: a path, a file:// URL or a data URI; bytes; or {"bytes", "path"}, as Hugging Face
    datasets store images. Raises ValueError for anything else.
    """
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes | bytearray):
        return _held(bytes(value), name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is no path but {shown(value)} ({type(value).__name__})")
    if value.startswith("data:"):
        return _held(_decoded(value, name), name)
    return _file(value, root)


def _held(data: bytes, name: str) -> ImageBytes:
    """The bytes of an image file. Raises ValueError where there are none, or too many."""
    if not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes; 1 to {MAX_IMAGE_BYTES} are expected")
    return ImageBytes(name, data)


def _decoded(uri: str, name: str) -> bytes:
    """The bytes of a data URI in base64. Raises ValueError for any other."""
    head, comma, text = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{name} is a data URI that is not base64: {shown(uri)}")
    if len(text) > MAX_IMAGE_BYTES * 3 // 2:
        raise ValueError(f"{name} has {len(text)} characters of base64, which is too large")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} is a data URI with damaged base64: {shown(uri)}") from None


def _file(name: str, root: Path) -> Path:
    """A file under `root`. Raises ValueError for a URL, a file elsewhere, and a missing file.

    The name alone must stay under `root`. Links are followed wherever they lead, because whoever
    made the folder put them there (docs/security.md).
    """
    said = shown(name)
    if name.startswith("file://"):
        url = urlsplit(name)
        if url.netloc not in ("", "localhost"):
            raise ValueError(f"image {said} lies on another machine; copy it and give a path")
        name = unquote(url.path)
    elif "://" in name or name.startswith(("file:", "//", "\\\\")):
        raise ValueError(f"image {said} is a URL or a network path; download it and give a path")
    # Path.resolve would follow the links.
    path = Path(os.path.abspath(root / name))  # noqa: PTH100
    top = Path(os.path.abspath(root))  # noqa: PTH100
    try:
        there = path.is_relative_to(top) and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise ValueError(f"image {said} is not under {root}; set --image-root")
    return path
