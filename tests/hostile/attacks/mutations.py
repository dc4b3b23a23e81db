"""Mutations of good files: values of JSON, headers of safetensors, and bytes of any file."""

from __future__ import annotations

import json
import random
import struct

_WORDS = [n.to_bytes(8, "little") for n in (0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)]
_DEEP = json.loads("[" * 200 + "]" * 200)
# Values that take the place of others in a JSON document.
_VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**30,
    0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "a", "../x", "/etc/passwd", "a/../../b", "\0", "\x1b[2J\n", "\ud800", "x" * 5000,
    "<image>", "F32", "F64", "U8", "gptq", "https://h/x.png",
    [], [1], [None], [2**62, 4], [0, 2**63], [-1, 1], ["a"], [[]],
    {}, {"a": 1}, {"type": "image"}, {"quant_method": "gptq"}, _DEEP,
]  # fmt: skip
# Bytes that are inserted into a file.
_RAW = [
    b"NaN", b"1e999", b"-", b"9" * 5000, b"[" * 3000, b'{"a":1,"a":2}', b"\xff", b"\xef\xbb\xbf",
    b"\\u0000",
]  # fmt: skip


def mutate(seed: bytes, rng: random.Random) -> bytes:
    """`seed` with a few changes.

    JSON and the headers of safetensors mostly stay valid, so that readers get past their parser.
    """
    how = rng.random()
    if how < 0.55 and (value := _json(seed)) is not None:
        return _dump(_damaged(value, rng), rng)
    if how < 0.55 and (split := _header(seed)) is not None:
        header, data = split
        text = _dump(_damaged(header, rng), rng)
        return struct.pack("<Q", len(text)) + text + data
    raw = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        _damage_bytes(raw, rng)
    return bytes(raw)


def _json(raw: bytes):
    """The value of a JSON text, or None."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _header(raw: bytes):
    """(header, data) of a safetensors file, or None."""
    length = int.from_bytes(raw[:8], "little")
    if 8 < length + 8 <= len(raw) and (header := _json(raw[8 : 8 + length])) is not None:
        return header, raw[8 + length :]
    return None


def _dump(value, rng: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        at = rng.randrange(len(raw))
        raw = raw[:at] + rng.choice(_RAW) + raw[at:]
    return raw


def _damaged(value, rng: random.Random):
    """`value` with one to three of its places changed, dropped, renamed or repeated."""
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return rng.choice(_VALUES)
        parent, at = rng.choice(places)
        how = rng.random()
        if how < 0.15:
            del parent[at]
        elif how < 0.25 and isinstance(parent, dict):
            parent[str(rng.choice(_VALUES))] = parent.pop(at)
        elif how < 0.35:
            other, there = rng.choice(places)
            if there in other if isinstance(other, dict) else there < len(other):
                parent[at] = json.loads(json.dumps(other[there]))
        elif how < 0.5 and isinstance(parent[at], int) and not isinstance(parent[at], bool):
            parent[at] += rng.choice([-1, 1, 8, 2**32])
        else:
            parent[at] = json.loads(json.dumps(rng.choice(_VALUES)))
    return value


def _places(value):
    """Every place in a JSON value, as (the list or dict that it is in, its index or key)."""
    stack = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, (dict, list)):
            keys = list(top) if isinstance(top, dict) else range(len(top))
            for k in keys:
                yield top, k
                stack.append(top[k])


def _damage_bytes(raw: bytearray, rng: random.Random) -> None:
    how, at = rng.random(), rng.randrange(len(raw) + 1)
    if how < 0.35 and raw:
        raw[min(at, len(raw) - 1)] = rng.randrange(256)
    elif how < 0.55:
        raw[at : at + 8] = rng.choice(_WORDS)
    elif how < 0.65:
        del raw[at:]
    elif how < 0.75:
        del raw[at : at + rng.randint(1, 16)]
    elif how < 0.9:
        random_bytes = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        raw[at:at] = rng.choice([*_RAW, random_bytes])
    else:
        raw[at:at] = raw[max(0, at - 16) : at]
