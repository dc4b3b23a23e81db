"""Files and assertions that the tests of bad inputs share."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from PIL import Image

from vlmq_export.errors import VlmqError

RTN = ("--method", "rtn", "--no-verify", "--quiet")  # the fastest export


def said(reader, *arguments) -> str:
    """The message with which `reader(*arguments)` refuses its input."""
    with pytest.raises(VlmqError) as e:
        reader(*arguments)
    assert str(e.value).isprintable()
    return str(e.value)


def rows_file(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    """A file of calibration rows beside an image a.png. Rows that are strings are written as is."""
    Image.new("RGB", (84, 84), "white").save(folder / "a.png")
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    (folder / name).write_text("\n".join(lines), "utf-8")
    return folder / name


def llava(image="a.png", question="<image>\nWhat?", answer="red", **more) -> dict:
    """A row in LLaVA's layout."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **more}


def raw_safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(start: int, end: int) -> dict:
    """The header entry of a float32 vector in the bytes from `start` to `end`."""
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
