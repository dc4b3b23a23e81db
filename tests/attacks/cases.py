"""What the tests of bad inputs share."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from PIL import Image

from vlmq_export.errors import VlmqError

RTN = ("--method", "rtn", "--no-verify", "--quiet")


def said(reader, *arguments) -> str:
    """The one line of a refusal."""
    with pytest.raises(VlmqError) as e:
        reader(*arguments)
    assert str(e.value).isprintable()
    return str(e.value)


def rows_file(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    Image.new("RGB", (84, 84), "white").save(folder / "a.png")
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return folder / name


def llava(image="a.png", question="<image>\nWhat?", answer="red", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **more}


def raw_safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(*offsets: int) -> dict:
    return {"dtype": "F32", "shape": [(offsets[1] - offsets[0]) // 4], "data_offsets": list(offsets)}
