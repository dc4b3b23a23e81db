"""What a command wrote of a dataclass as JSON, read back field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from vlmq_export.errors import FormatError
from vlmq_export.quantizer.storage.untrusted import read_json

Found = TypeVar("Found")


def read_strictly(path: Path, cls: type[Found], what: str, command: str) -> Found:
    """The dataclass `cls` in a file, every field of its own type.

    what, command: for the error's line; which command writes such a file.

    Raises FormatError for any other file.
    """
    raw = read_json(path, error=FormatError)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(raw), strict=True)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(
            f"{path}: cannot be read as {what} ({where}: {first['msg']}); run {command} again"
        ) from None
